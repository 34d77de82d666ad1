// The World vocabulary, one token a line: `id literal length`, where the literal is a Python string
// or bytes literal. A text is cut greedily: at each place the longest token that fits.

import { HostError } from './errors.mjs';

const LINE = /^([1-9][0-9]*) (b?)(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)") ([1-9][0-9]*)$/u;
const ESCAPE = /\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|[^xuU0-7N])/gu;
const LETTERS = { a: 7, b: 8, f: 12, n: 10, r: 13, t: 9, v: 11, '\\': 92, "'": 39, '"': 34 };

/** A byte's place in the trie: the id of the token that ends there or 0, and the next bytes. */
class Node {
  id = 0;
  /** @type {Map<number, Node>} */
  next = new Map();
}

export class WorldTokenizer {
  #root = new Node();
  /** @type {Map<number, Uint8Array>} */
  #tokens = new Map();

  /** @param {string} content of the vocabulary file */
  constructor(content) {
    const lines = content.split('\n');
    if (lines.at(-1) === '') lines.pop();
    lines.forEach((line, i) => {
      const [id, token] = readLine(line.replace(/\r$/, ''), i + 1);
      this.#tokens.set(id, token);
      let node = this.#root;
      for (const byte of token) {
        if (!node.next.has(byte)) node.next.set(byte, new Node());
        node = /** @type {Node} */ (node.next.get(byte));
      }
      node.id = id;
    });
    const missing = [...Array(256).keys()].find((byte) => !this.#root.next.get(byte)?.id);
    if (missing !== undefined) {
      throw new HostError(`the vocabulary lacks the byte ${missing}; expected all 256`);
    }
  }

  /** @param {string} text */
  encode(text) {
    const bytes = new TextEncoder().encode(text);
    const ids = [];
    for (let start = 0; start < bytes.length; ) {
      let id = 0;
      let end = start;
      let node = this.#root.next.get(bytes[start]);
      for (let at = start + 1; node; at += 1) {
        if (node.id) [id, end] = [node.id, at];
        node = at < bytes.length ? node.next.get(bytes[at]) : undefined;
      }
      ids.push(id);
      start = end;
    }
    return ids;
  }

  /** @param {number} id */
  bytes(id) {
    return this.#tokens.get(id);
  }
}

/**
 * @param {string} line
 * @param {number} number
 * @returns {[number, Uint8Array]}
 */
function readLine(line, number) {
  const parts = LINE.exec(line);
  if (!parts) {
    throw new HostError(`line ${number} of the vocabulary is no 'id literal length': ${line}`);
  }
  const [, id, prefix, single, double, length] = parts;
  const text = single ?? double;
  const token = prefix
    ? Uint8Array.from(unescape(text), (c) => /** @type {number} */ (c.codePointAt(0)))
    : new TextEncoder().encode(unescape(text));
  if (token.length !== Number(length)) {
    throw new HostError(`line ${number} of the vocabulary: expected ${token.length} bytes`);
  }
  return [Number(id), token];
}

/** @param {string} text */
function unescape(text) {
  return text.replace(ESCAPE, (_, /** @type {string} */ code) => {
    if (/^[0-7]/.test(code)) return String.fromCodePoint(parseInt(code, 8));
    if (code.length > 1) return String.fromCodePoint(parseInt(code.slice(1), 16));
    const known = LETTERS[/** @type {keyof typeof LETTERS} */ (code)];
    if (known === undefined) throw new HostError(`unknown escape \\${code} in the vocabulary`);
    return String.fromCodePoint(known);
  });
}
