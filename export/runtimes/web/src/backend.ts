// onnxruntime-web on what the browser has: WebGPU, else WebAssembly, with threads where allowed.

import type * as Ort from 'onnxruntime-web';

export interface Backend {
  ort: typeof Ort;
  name: 'webgpu' | 'wasm';
  label: string;
}

/** Load onnxruntime-web; `wanted` forces a backend, `threads` their number (0 chooses). */
export async function openBackend(wanted: string | null, threads = 0): Promise<Backend> {
  const gpu = wanted !== 'wasm' && (await hasWebGpu());
  if (wanted === 'webgpu' && !gpu) throw new Error('this browser offers no WebGPU');
  const [ort, mjs, wasm] = gpu
    ? await Promise.all([
        import('onnxruntime-web/webgpu'),
        import('onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url'),
        import('onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url'),
      ])
    : await Promise.all([
        import('onnxruntime-web/wasm'),
        import('onnxruntime-web/ort-wasm-simd-threaded.mjs?url'),
        import('onnxruntime-web/ort-wasm-simd-threaded.wasm?url'),
      ]);
  const absolute = (url: string) => new URL(url, document.baseURI).href;
  ort.env.wasm.wasmPaths = { mjs: absolute(mjs.default), wasm: absolute(wasm.default) };
  const possible = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const used = crossOriginIsolated && threads ? threads : possible;
  ort.env.wasm.numThreads = used;
  const label = gpu ? 'WebGPU' : `WebAssembly, ${used} thread${used > 1 ? 's' : ''}`;
  return { ort, name: gpu ? 'webgpu' : 'wasm', label };
}

async function hasWebGpu(): Promise<boolean> {
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<unknown> } }).gpu;
  try {
    return !!(await gpu?.requestAdapter());
  } catch {
    return false;
  }
}
