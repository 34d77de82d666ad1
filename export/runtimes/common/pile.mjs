// The vocabulary of the Pile models (20B): byte-level BPE, read from a tokenizer.json.

import { HostError } from './errors.mjs';

// GPT-2's words: contractions, then letters, numbers or signs with at most one space before them
const WORDS =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

export class PileTokenizer {
  /** @type {Map<string, number>} */
  #ids;
  /** @type {Map<number, Uint8Array>} */
  #tokens = new Map();
  /** @type {Map<string, number>} */
  #ranks;
  /** @type {Map<string, number>} */
  #added;
  #split;
  #normalization;
  #letters = letters();

  /** @param {string} content of the tokenizer.json */
  constructor(content) {
    const { model, added_tokens, normalizer, pre_tokenizer } = JSON.parse(content);
    if (model?.type !== 'BPE' || pre_tokenizer?.type !== 'ByteLevel') {
      throw new HostError('expected a tokenizer.json of byte-level BPE, such as 20B_tokenizer.json');
    }
    if (pre_tokenizer.add_prefix_space) {
      throw new HostError('this host has no tokenizer that puts a space before a text');
    }
    this.#normalization = normalizer?.type ?? '';
    this.#ids = new Map(Object.entries(model.vocab));
    this.#ranks = new Map(
      model.merges.map((/** @type {string | string[]} */ merge, /** @type {number} */ rank) => [
        typeof merge === 'string' ? merge : merge.join(' '),
        rank,
      ]),
    );
    this.#added = new Map(
      added_tokens.map((/** @type {any} */ token) => [token.content, token.id]),
    );
    const bytes = new Map(this.#letters.map((letter, byte) => [letter, byte]));
    for (const [token, id] of this.#ids) {
      this.#tokens.set(id, Uint8Array.from(token, (c) => /** @type {number} */ (bytes.get(c))));
    }
    for (const [token, id] of this.#added) this.#tokens.set(id, new TextEncoder().encode(token));
    this.#tokens.delete(0);
    const longest = [...this.#added.keys()].sort((a, b) => b.length - a.length);
    this.#split = new RegExp(`(${longest.map(escape).join('|') || '(?!)'})`, 'u');
  }

  /** @param {string} text */
  encode(text) {
    const normal = this.#normalization ? text.normalize(this.#normalization) : text;
    const ids = normal.split(this.#split).flatMap((piece) => {
      const added = this.#added.get(piece);
      if (added !== undefined) return [added];
      return (piece.match(WORDS) ?? []).flatMap((word) => this.#encodeWord(word));
    });
    if (ids.includes(0)) {
      throw new HostError('the text holds the name of the document boundary: remove it');
    }
    return ids;
  }

  /** @param {number} id */
  bytes(id) {
    return this.#tokens.get(id);
  }

  /** Merge the pair of lowest rank until none is left. @param {string} word */
  #encodeWord(word) {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => this.#letters[byte]);
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i += 1) {
        const rank = this.#ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => /** @type {number} */ (this.#ids.get(part)));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }
}

/** Return byte → letter: what prints in Latin-1 is itself, the rest counts up from U+0100. */
function letters() {
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => {
    const prints = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    return String.fromCodePoint(prints ? byte : next++);
  });
}

/** @param {string} text */
const escape = (text) => text.replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&');
