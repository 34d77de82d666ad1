// Text to token ids and back. Id 0 is the boundary between documents in every vocabulary.

import { HostError } from './errors.mjs';
import { PileTokenizer } from './pile.mjs';
import { WorldTokenizer } from './world.mjs';

export const BOUNDARY = 0;

/** @type {Record<string, string[]>} */
const FILES = {
  world: ['rwkv_vocab_v20230424.txt', 'rwkv_vocab.txt'],
  '20B': ['20B_tokenizer.json', 'tokenizer.json'],
};

/**
 * `bytes` gives those of an id, or undefined where it stands for nothing.
 * @typedef {{ encode(text: string): number[], bytes(id: number): Uint8Array | undefined }} Tokenizer
 */

/** UTF-8 bytes as ids 1 to 255. */
export class ByteTokenizer {
  /** @param {string} text */
  encode(text) {
    const bytes = [...new TextEncoder().encode(text)];
    if (bytes.includes(BOUNDARY)) {
      throw new HostError('the text holds a NUL character, which is the boundary: remove it');
    }
    return bytes;
  }

  /** @param {number} id */
  bytes(id) {
    return id > 0 && id < 256 ? Uint8Array.of(id) : undefined;
  }
}

/**
 * Return the tokenizer that an exported folder names, read from its vocabulary.
 * @param {import('./manifest.mjs').Manifest} manifest
 * @param {import('./manifest.mjs').ReadFile} read
 * @returns {Promise<Tokenizer>}
 */
export async function openTokenizer(manifest, read) {
  const name = manifest.metadata.tokenizer;
  if (name === 'bytes') return new ByteTokenizer();
  if (!(name in FILES)) {
    throw new HostError(`unknown tokenizer ${name}; this host has bytes, world and 20B`);
  }
  const file = FILES[name].find((file) => file in manifest.files);
  if (!file) throw new HostError(`the folder lacks ${FILES[name][0]}, which its model needs`);
  const content = new TextDecoder('utf-8', { fatal: true }).decode(await read(file));
  return name === 'world' ? new WorldTokenizer(content) : new PileTokenizer(content);
}

/** Turns ids into text as they come, holding back a character until its last byte. */
export class StreamDecoder {
  #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  #tokenizer;

  /** @param {Tokenizer} tokenizer */
  constructor(tokenizer) {
    this.#tokenizer = tokenizer;
  }

  /** @param {number} id */
  push(id) {
    return this.#decoder.decode(this.#tokenizer.bytes(id), { stream: true });
  }

  flush() {
    return this.#decoder.decode();
  }
}
