// Choosing the next token: softmax, then top-p, then top-k, then temperature.

import { HostError } from './errors.mjs';

/**
 * `temperature` 0 takes the likeliest token; `topK` 0 keeps all. The same seed draws the same
 * tokens in this host, not those that another language's host draws.
 * @typedef {{ temperature?: number, topP?: number, topK?: number, seed?: number }} Sampling
 */

/**
 * Return a function from logits to a token id. Ids whose `known` is 0 are never drawn.
 * @param {Sampling} settings
 * @param {Uint8Array} known
 * @returns {(logits: Float32Array) => number}
 */
export function sampler({ temperature = 1, topP = 1, topK = 0, seed }, known) {
  if (!(temperature >= 0)) throw new HostError(`temperature must be 0 or more, got ${temperature}`);
  if (!(topP > 0 && topP <= 1)) throw new HostError(`top-p must be in (0, 1], got ${topP}`);
  if (!(Number.isInteger(topK) && topK >= 0)) {
    throw new HostError(`top-k must be 0 (all) or a whole number, got ${topK}`);
  }
  const random = seed === undefined ? Math.random : seeded(seed);
  return (logits) => {
    /** @type {number[]} */
    const ids = [];
    let best = -1;
    logits.forEach((logit, id) => {
      if (Number.isNaN(logit)) {
        throw new HostError("the model's logits are not numbers (NaN): its weights are damaged");
      }
      if (!known[id]) return;
      ids.push(id);
      if (best < 0 || logit > logits[best]) best = id;
    });
    return temperature === 0 ? best : draw(logits, best, ids, temperature, topP, topK, random());
  };
}

/**
 * @param {Float32Array} logits
 * @param {number} best
 * @param {number[]} ids
 * @param {number} temperature
 * @param {number} topP
 * @param {number} topK
 * @param {number} point in [0, 1)
 */
function draw(logits, best, ids, temperature, topP, topK, point) {
  const chance = (/** @type {number} */ id) => Math.exp(logits[id] - logits[best]);
  const total = ids.reduce((sum, id) => sum + chance(id), 0);
  ids.sort((a, b) => logits[b] - logits[a]);
  let keep = 0;
  // the token that crosses top-p stays in
  for (let sum = 0; keep < ids.length && sum < topP * total; keep += 1) sum += chance(ids[keep]);
  const kept = ids.slice(0, topK ? Math.min(keep, topK) : keep);
  const weights = kept.map((id) => chance(id) ** (1 / temperature));
  let left = point * weights.reduce((a, b) => a + b, 0);
  const at = weights.findIndex((weight) => (left -= weight) < 0);
  return kept[at < 0 ? kept.length - 1 : at];
}

/**
 * Return a generator of numbers in [0, 1): a 32-bit counter through a mixing function.
 * @param {number} seed
 */
function seeded(seed) {
  let counter = seed >>> 0;
  return () => {
    counter = (counter + 0x9e3779b9) >>> 0;
    let z = counter;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return ((z ^ (z >>> 15)) >>> 0) / 2 ** 32;
  };
}
