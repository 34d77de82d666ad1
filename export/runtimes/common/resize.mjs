// Resizing as models are evaluated with in Python: Pillow's filters, widened when a picture shrinks,
// in integers, so that both give the same bytes (but for a last bit where Pillow resizes columns
// first).

import { HostError } from './errors.mjs';

const BITS = 22; // of a weight's fraction

/** @type {Record<string, { reach: number, weight: (x: number) => number }>} */
const FILTERS = {
  bilinear: { reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { reach: 2, weight: (x) => cubic(Math.abs(x)) },
};

/** Keys' cubic with a = -1/2. @param {number} x */
function cubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/**
 * @typedef {{ width: number, height: number, channels: number, pixels: Uint8Array }} Picture
 */

/**
 * Return a picture of another size, rows first resized, then columns.
 * @param {Picture} picture
 * @param {number} width
 * @param {number} height
 * @param {string} interpolation
 * @returns {Picture}
 */
export function resize(picture, width, height, interpolation) {
  const filter = FILTERS[interpolation];
  if (!filter) throw new HostError(`unknown interpolation ${interpolation}`);
  const { channels } = picture;
  let { pixels } = picture;
  if (width !== picture.width) {
    const size = { outer: picture.height, from: picture.width, to: width, inner: channels };
    pixels = resizeAxis(pixels, size, filter);
  }
  if (height !== picture.height) {
    const size = { outer: 1, from: picture.height, to: height, inner: width * channels };
    pixels = resizeAxis(pixels, size, filter);
  }
  return { width, height, channels, pixels };
}

/**
 * Resize the middle axis of [outer, from, inner] to [outer, to, inner].
 * @param {Uint8Array} pixels
 * @param {{ outer: number, from: number, to: number, inner: number }} size
 * @param {typeof FILTERS[string]} filter
 */
function resizeAxis(pixels, { outer, from, to, inner }, filter) {
  const out = new Uint8ClampedArray(outer * to * inner);
  for (let x = 0; x < to; x += 1) {
    const [first, weights] = weightsAt(x, from, to, filter);
    for (let o = 0; o < outer; o += 1) {
      for (let i = 0; i < inner; i += 1) {
        let sum = 2 ** (BITS - 1);
        for (let k = 0; k < weights.length; k += 1) {
          sum += weights[k] * pixels[(o * from + first + k) * inner + i];
        }
        out[(o * to + x) * inner + i] = Math.floor(sum / 2 ** BITS);
      }
    }
  }
  return new Uint8Array(out.buffer);
}

/**
 * Return the first pixel that counts for pixel `x` of the result, and the weights from there on.
 * @param {number} x
 * @param {number} from
 * @param {number} to
 * @param {typeof FILTERS[string]} filter
 * @returns {[number, number[]]}
 */
function weightsAt(x, from, to, { reach, weight }) {
  const scale = from / to;
  const spread = Math.max(scale, 1);
  const center = (x + 0.5) * scale;
  const first = Math.max(0, Math.trunc(center - reach * spread + 0.5));
  const last = Math.min(from, Math.trunc(center + reach * spread + 0.5));
  const raw = [];
  for (let i = first; i < last; i += 1) raw.push(weight((i - center + 0.5) / spread));
  const total = raw.reduce((a, b) => a + b, 0);
  return [first, raw.map((w) => roundAway((w / total) * 2 ** BITS))];
}

/** @param {number} x */
const roundAway = (x) => Math.trunc(x < 0 ? x - 0.5 : x + 0.5);
