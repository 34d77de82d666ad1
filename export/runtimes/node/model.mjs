// An exported folder on a desktop: onnxruntime-node, and sharp for pictures.

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import ort from 'onnxruntime-node';
import { HostError } from '../common/errors.mjs';
import { checkHash, hashes, initialState, readManifest } from '../common/manifest.mjs';
import { generate, streamTokens } from '../common/text.mjs';
import { openTokenizer } from '../common/tokenizer.mjs';
import { fromRgba, preprocess, ranked } from '../common/vision.mjs';

export { HostError };

/** @typedef {import('../common/manifest.mjs').Manifest} Manifest */
/** @typedef {import('../common/manifest.mjs').Values} Values */

/**
 * Return the model in an exported folder, every file checked against the manifest.
 * @param {string} folder
 * @param {{ threads?: number }} [options] 0 threads leaves the number to onnxruntime
 */
export async function open(folder, { threads = 0 } = {}) {
  const read = async (/** @type {string} */ name) =>
    /** @type {Uint8Array<ArrayBuffer>} */ (await readFile(join(folder, name)));
  const manifest = await readManifest(read);
  for (const file of Object.keys(hashes(manifest))) {
    await checkHash(manifest, file, await read(file));
  }
  return new Model(folder, manifest, read, threads);
}

class Model {
  /** @type {Map<string, ort.InferenceSession>} */
  #sessions = new Map();
  #folder;
  #read;
  #threads;

  /**
   * @param {string} folder
   * @param {Manifest} manifest
   * @param {import('../common/manifest.mjs').ReadFile} read
   * @param {number} threads
   */
  constructor(folder, manifest, read, threads) {
    this.manifest = manifest;
    this.#folder = folder;
    this.#read = read;
    this.#threads = threads;
  }

  /**
   * Yield the continuation of a prompt piece by piece, never part of a character.
   * @param {string} prompt
   * @param {Parameters<typeof generate>[3]} [settings]
   */
  async *generate(prompt, settings = {}) {
    const tokenizer = await openTokenizer(this.manifest, this.#read);
    yield* generate(await this.#stream(), tokenizer, prompt, settings);
  }

  /**
   * Yield the ids of the continuation.
   * @param {string} prompt
   * @param {Parameters<typeof streamTokens>[3]} [settings]
   */
  async *tokens(prompt, settings = {}) {
    const tokenizer = await openTokenizer(this.manifest, this.#read);
    yield* streamTokens(await this.#stream(), tokenizer, prompt, settings);
  }

  /**
   * Return the classes of a picture and their probabilities, likeliest first.
   * @param {string} path
   */
  async classify(path) {
    const { metadata } = this.manifest;
    const picture = await decode(path, metadata.channels);
    const session = await this.session('image');
    const { logits } = await session.run({ image: tensor(preprocess(picture, metadata)) });
    return ranked(/** @type {Float32Array} */ (logits.data), metadata.labels);
  }

  /**
   * Return the session of a graph, opened when it is first asked for.
   * @param {string} graph
   */
  async session(graph) {
    const opened = this.#sessions.get(graph);
    if (opened) return opened;
    if (!(graph in this.manifest.graphs)) {
      const has = Object.keys(this.manifest.graphs).join(', ');
      throw new HostError(`${this.#folder} has no graph ${graph}; it has ${has}`);
    }
    const session = await ort.InferenceSession.create(
      join(this.#folder, this.manifest.graphs[graph].file),
      { intraOpNumThreads: this.#threads, interOpNumThreads: 1 },
    );
    this.#sessions.set(graph, session);
    return session;
  }

  async #stream() {
    await this.session('step');
    return new Stream(this, await initialState(this.manifest.graphs.step, this.#read));
  }
}

/** A sequence being read. Its state lies in two sets of buffers that swap after every call. */
class Stream {
  #model;
  #now;
  #next;

  /**
   * @param {Model} model
   * @param {Record<string, Values>} state before the first call
   */
  constructor(model, state) {
    this.#model = model;
    this.manifest = model.manifest;
    const copies = () =>
      Object.entries(state).map(([name, { type, data, dims }]) => [
        name,
        tensor({ type, data: data.slice(), dims }),
      ]);
    this.#now = copies();
    this.#next = copies();
  }

  /**
   * Feed a graph and return its logits.
   * @param {string} graph
   * @param {Record<string, Values>} inputs
   */
  async run(graph, inputs) {
    const session = await this.#model.session(graph);
    const feeds = Object.entries(inputs).map(([name, values]) => [name, tensor(values)]);
    const results = await session.run(Object.fromEntries([...feeds, ...this.#now]), {
      logits: null,
      ...Object.fromEntries(this.#next.map(([name, buffer]) => [`${name}_out`, buffer])),
    });
    [this.#now, this.#next] = [this.#next, this.#now];
    return /** @type {Float32Array} */ (results.logits.data);
  }
}

/**
 * Return a tensor over `data` itself. Where Node has Float16Array (24 and newer), the constructor makes
 * one of the bits of fp16, and onnxruntime-node 1.30 takes that for empty.
 * @param {Values} values
 */
const tensor = ({ type, data, dims }) =>
  Object.assign(new ort.Tensor(type, data, dims), { cpuData: data });

/**
 * Return a picture file upright, in the channels of the model.
 * @param {string} path
 * @param {number} channels
 */
async function decode(path, channels) {
  const { default: sharp } = await import('sharp');
  try {
    const { data, info } = await sharp(path, { ignoreIcc: true })
      .rotate()
      .toColourspace('srgb')
      .ensureAlpha()
      .raw()
      .toBuffer({ resolveWithObject: true });
    return fromRgba(data, info.width, info.height, channels);
  } catch (error) {
    throw new HostError(`${path} is damaged or no picture: ${/** @type {Error} */ (error).message}`);
  }
}
