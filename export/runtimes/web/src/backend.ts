// onnxruntime-web on WebGPU or on WebAssembly, the latter with threads where the page may have them.

import type * as Ort from 'onnxruntime-web';

export type Place = 'webgpu' | 'wasm';

export interface Backend {
  ort: typeof Ort;
  name: Place;
  label: string;
  halves: boolean; // whether it takes tensors of fp16
  options: Ort.InferenceSession.SessionOptions;
}

interface Adapter {
  features: ReadonlySet<string>;
}

/** Return where models may run here, the fastest first. */
export async function places(): Promise<Place[]> {
  return (await findAdapter()) ? ['webgpu', 'wasm'] : ['wasm'];
}

async function findAdapter(): Promise<Adapter | null | undefined> {
  const { gpu } = navigator as { gpu?: { requestAdapter(): Promise<Adapter | null> } };
  return gpu?.requestAdapter().catch(() => null);
}

/** Load onnxruntime-web; 0 threads leave their number to this function. */
export async function openBackend(name: Place, threads = 0): Promise<Backend> {
  return name === 'webgpu' ? openWebGpu() : openWasm(threads);
}

async function openWebGpu(): Promise<Backend> {
  const [ort, mjs, wasm] = await Promise.all([
    import('onnxruntime-web/webgpu'),
    import('onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url'),
    import('onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url'),
  ]);
  find(ort, mjs.default, wasm.default);
  ort.env.wasm.numThreads = 1;
  const options = {
    executionProviders: ['webgpu'],
    // a graph that would travel to the processor and back runs faster there altogether
    extra: { session: { disable_cpu_ep_fallback: '1' } },
  };
  const halves = (await findAdapter())?.features.has('shader-f16') ?? false;
  return { ort, name: 'webgpu', label: 'WebGPU', halves, options };
}

async function openWasm(threads: number): Promise<Backend> {
  const [ort, mjs, wasm] = await Promise.all([
    import('onnxruntime-web/wasm'),
    import('onnxruntime-web/ort-wasm-simd-threaded.mjs?url'),
    import('onnxruntime-web/ort-wasm-simd-threaded.wasm?url'),
  ]);
  find(ort, mjs.default, wasm.default);
  const wanted = threads || Math.min(4, navigator.hardwareConcurrency || 1);
  const used = crossOriginIsolated ? wanted : 1;
  ort.env.wasm.numThreads = used;
  const label = `WebAssembly, ${used} thread${used > 1 ? 's' : ''}`;
  return { ort, name: 'wasm', label, halves: true, options: { executionProviders: ['wasm'] } };
}

function find(ort: typeof Ort, mjs: string, wasm: string): void {
  const absolute = (url: string) => new URL(url, document.baseURI).href;
  ort.env.wasm.wasmPaths = { mjs: absolute(mjs), wasm: absolute(wasm) };
}
