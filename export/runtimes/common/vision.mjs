// Classifying a picture: pixels as in evaluation during training, then the graph "image".

import { resize } from './resize.mjs';

/**
 * Return a picture of the graph's channels from one of red, green, blue and opacity: transparent
 * pixels lie on white, grey is Rec. 601's.
 * @param {Uint8Array | Uint8ClampedArray} rgba
 * @param {number} width
 * @param {number} height
 * @param {number} channels 1 or 3
 * @returns {import('./resize.mjs').Picture}
 */
export function fromRgba(rgba, width, height, channels) {
  const pixels = new Uint8Array(width * height * channels);
  for (let i = 0; i < width * height; i += 1) {
    const opacity = rgba[4 * i + 3];
    const onWhite = (/** @type {number} */ c) =>
      Math.round((rgba[4 * i + c] * opacity + 255 * (255 - opacity)) / 255);
    const [r, g, b] = [onWhite(0), onWhite(1), onWhite(2)];
    if (channels === 1) pixels[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else pixels.set([r, g, b], 3 * i);
  }
  return { width, height, channels, pixels };
}

/**
 * Return the input of the graph "image": [1, channels, height, width], normalised.
 * @param {import('./resize.mjs').Picture} picture
 * @param {Record<string, any>} metadata of the manifest
 * @returns {import('./manifest.mjs').Values}
 */
export function preprocess(picture, { image_size: [height, width], interpolation, mean, std }) {
  const { channels, pixels } = resize(picture, width, height, interpolation);
  const area = height * width;
  const data = new Float32Array(channels * area);
  for (let c = 0; c < channels; c += 1) {
    const [m, s] = [Math.fround(mean[c]), Math.fround(std[c])];
    for (let i = 0; i < area; i += 1) {
      const value = Math.fround(pixels[i * channels + c] / 255);
      data[c * area + i] = Math.fround(value - m) / s;
    }
  }
  return { type: 'float32', data, dims: [1, channels, height, width] };
}

/**
 * Return the classes and their probabilities, likeliest first.
 * @param {Float32Array} logits
 * @param {string[]} labels
 * @returns {{ label: string, confidence: number }[]}
 */
export function ranked(logits, labels) {
  const top = Math.max(...logits);
  const chances = Array.from(logits, (logit) => Math.exp(logit - top));
  const total = chances.reduce((a, b) => a + b, 0);
  return labels
    .map((label, i) => ({ label, confidence: chances[i] / total }))
    .sort((a, b) => b.confidence - a.confidence);
}
