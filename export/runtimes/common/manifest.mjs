// manifest.json: what an exported folder holds. The fields are described in export/README.md.

import { HostError } from './errors.mjs';
import { toHalf } from './halves.mjs';

const FORMAT = 1;
const ARRAYS = {
  float32: Float32Array,
  float16: Uint16Array, // their bits
  int64: BigInt64Array,
  int32: Int32Array,
  uint8: Uint8Array,
};

/**
 * A named tensor; strings in its shape name free dimensions, `initial` is a state's first value or
 * the name of a file that holds it.
 * @typedef {{ name: string, dtype: keyof typeof ARRAYS, shape: (number | string)[],
 *             initial?: number | string }} TensorInfo
 * @typedef {{ file: string, sha256: string, opset: number, inputs: TensorInfo[],
 *             outputs: string[], state: TensorInfo[] }} GraphInfo
 * @typedef {{ format: number, adapter: string, metadata: Record<string, any>,
 *             files: Record<string, string>, graphs: Record<string, GraphInfo> }} Manifest
 * @typedef {{ type: keyof typeof ARRAYS, data: any, dims: number[] }} Values
 */

/**
 * Reads a file of the folder by its name.
 * @typedef {(name: string) => Promise<Uint8Array<ArrayBuffer>>} ReadFile
 */

/**
 * Return the manifest of a folder.
 * @param {ReadFile} read
 * @returns {Promise<Manifest>}
 */
export async function readManifest(read) {
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder().decode(await read('manifest.json')));
  } catch (error) {
    throw new HostError(`this is not an exported model: ${message(error)}`);
  }
  if (manifest?.format !== FORMAT) {
    throw new HostError(`manifest.json has format ${manifest?.format}; this host reads ${FORMAT}`);
  }
  for (const file of Object.keys(hashes(manifest))) {
    if (/[/\\]/.test(file) || file.startsWith('.')) {
      throw new HostError(`manifest.json names ${file}, which is outside the folder`);
    }
  }
  return manifest;
}

/**
 * Return file → SHA-256 of everything the manifest vouches for.
 * @param {Manifest} manifest
 * @returns {Record<string, string>}
 */
export function hashes(manifest) {
  const graphs = Object.values(manifest.graphs).map((graph) => [graph.file, graph.sha256]);
  return { ...manifest.files, ...Object.fromEntries(graphs) };
}

/**
 * Throw where a file is not the one that was exported.
 * @param {Manifest} manifest
 * @param {string} file
 * @param {Uint8Array<ArrayBuffer>} content
 */
export async function checkHash(manifest, file, content) {
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', content));
  const got = Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
  if (got !== hashes(manifest)[file]) {
    throw new HostError(
      `${file} is not the file that was exported: its hash differs from the manifest's; ` +
        'export the model again',
    );
  }
}

/**
 * Return the state of one sequence before its first token.
 * @param {GraphInfo} graph
 * @param {ReadFile} read
 * @returns {Promise<Record<string, Values>>}
 */
export async function initialState(graph, read) {
  /** @type {Record<string, Values>} */
  const state = {};
  for (const { name, dtype, shape, initial } of graph.state) {
    const dims = shape.map((size) => (typeof size === 'string' ? 1 : size));
    const size = dims.reduce((a, b) => a * b, 1);
    const array = ARRAYS[dtype];
    if (!array) throw new HostError(`the state ${name} is of ${dtype}, which this host lacks`);
    let data = new array(size);
    if (typeof initial === 'string') {
      const content = await read(initial);
      if (content.byteLength !== data.byteLength) {
        throw new HostError(
          `${initial} holds ${content.byteLength} bytes, the state ${name} ${data.byteLength}`,
        );
      }
      data = new array(content.slice().buffer);
    } else {
      const first = { int64: BigInt, float16: toHalf }[/** @type {string} */ (dtype)] ?? Number;
      // @ts-expect-error: an element of this very array
      data.fill(first(initial ?? 0));
    }
    state[name] = { type: dtype, data, dims };
  }
  return state;
}

/**
 * Return whole numbers as the input that a graph declares, which for phones is of 32 bits.
 * @param {GraphInfo} graph
 * @param {string} name
 * @param {number[]} values
 * @param {number[]} dims
 * @returns {Values}
 */
export function integers({ file, inputs }, name, values, dims) {
  const dtype = inputs.find((input) => input.name === name)?.dtype;
  if (dtype === 'int64') return { type: dtype, data: BigInt64Array.from(values, BigInt), dims };
  if (dtype === 'int32') return { type: dtype, data: Int32Array.from(values), dims };
  throw new HostError(`${file} takes ${name} as ${dtype ?? 'nothing'}; this host gives integers`);
}

/** @param {unknown} error */
const message = (error) => (error instanceof Error ? error.message : String(error));
