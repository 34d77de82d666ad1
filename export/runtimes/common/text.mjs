// Running a language model: the prompt at once where the model can, then token by token.

import { HostError } from './errors.mjs';
import { integers } from './manifest.mjs';
import { sampler } from './sampling.mjs';
import { BOUNDARY, StreamDecoder } from './tokenizer.mjs';

const PIECE = 256; // tokens read at once
const CHUNK = 16; // tokens that the graph "chunk" reads

/**
 * A sequence that is being read: `run` feeds a graph and returns its logits, the state stays inside.
 * @typedef {{ manifest: import('./manifest.mjs').Manifest,
 *   run(graph: string, inputs: Record<string, import('./manifest.mjs').Values>):
 *     Promise<Float32Array> }} Stream
 */

/**
 * Read tokens and return the logits after the last one.
 * @param {Stream} stream
 * @param {number[]} tokens at least one
 */
export async function readTokens(stream, tokens) {
  const { graphs, metadata } = stream.manifest;
  const unknown = tokens.find((id) => !(id >= 0 && id < metadata.vocab_size));
  if (unknown !== undefined) {
    throw new HostError(`token ${unknown} is outside the vocabulary of ${metadata.vocab_size}`);
  }
  /** @type {Float32Array} */
  let logits = new Float32Array();
  for (let at = 0; at < tokens.length; ) {
    const left = tokens.length - at;
    const [graph, size] =
      'prefill' in graphs && left > 1
        ? ['prefill', Math.min(left, PIECE)]
        : 'chunk' in graphs && left >= CHUNK
          ? ['chunk', CHUNK]
          : ['step', 1];
    /** @type {Record<string, import('./manifest.mjs').Values>} */
    const inputs = {
      tokens: integers(graphs[graph], 'tokens', tokens.slice(at, at + size), [1, size]),
    };
    if (graph !== 'step') {
      inputs.positions = integers(graphs[graph], 'positions', [size - 1], [1]);
    }
    logits = await stream.run(graph, inputs);
    at += size;
  }
  return logits;
}

/**
 * Yield tokens after a boundary and the prompt, until a boundary or `maxTokens`.
 * @param {Stream} stream that has read nothing yet
 * @param {import('./tokenizer.mjs').Tokenizer} tokenizer
 * @param {string} prompt
 * @param {import('./sampling.mjs').Sampling & { maxTokens?: number }} settings
 */
export async function* streamTokens(stream, tokenizer, prompt, { maxTokens = 100, ...sampling }) {
  // embeddings have more rows than there are tokens
  const known = Uint8Array.from({ length: stream.manifest.metadata.vocab_size }, (_, id) =>
    id === BOUNDARY || tokenizer.bytes(id)?.length ? 1 : 0,
  );
  const choose = sampler(sampling, known);
  let logits = await readTokens(stream, [BOUNDARY, ...tokenizer.encode(prompt)]);
  for (let n = 0; n < maxTokens; n += 1) {
    const token = choose(logits);
    if (token === BOUNDARY) return;
    yield token;
    logits = await readTokens(stream, [token]);
  }
}

/**
 * Yield the continuation of a prompt piece by piece, never part of a character.
 * @param {Stream} stream that has read nothing yet
 * @param {import('./tokenizer.mjs').Tokenizer} tokenizer
 * @param {string} prompt
 * @param {import('./sampling.mjs').Sampling & { maxTokens?: number }} settings
 */
export async function* generate(stream, tokenizer, prompt, settings = {}) {
  const decoder = new StreamDecoder(tokenizer);
  for await (const token of streamTokens(stream, tokenizer, prompt, settings)) {
    const piece = decoder.push(token);
    if (piece) yield piece;
  }
  const rest = decoder.flush();
  if (rest) yield rest;
}
