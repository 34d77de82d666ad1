// Numbers of 16 bits (IEEE 754 binary16: a sign, 5 bits of exponent, 10 of fraction) as JavaScript
// without Float16Array has them: their bits.

const NORMAL = 2 ** -14; // the smallest with all 10 bits of fraction
const HALF_WAY = 65520; // from the largest, 65504, to what would be the next
const float = new Float32Array(1);
const word = new Uint32Array(float.buffer);

/**
 * Return the bits of the half that is nearest to an fp32 number, of two equally near the even one.
 * @param {number} value
 */
export function toHalf(value) {
  float[0] = value;
  const sign = (word[0] >>> 16) & 0x8000;
  const size = Math.abs(float[0]);
  if (Number.isNaN(size)) return sign | 0x7e00;
  if (size >= HALF_WAY) return sign | 0x7c00;
  if (size < NORMAL) {
    // fp32 between 1/2 and 1 has the spacing of these halves, 2 ** -24, and rounds as they do
    float[0] = size + 0.5;
    return sign | (word[0] - 0x3f000000);
  }
  const bits = (word[0] & 0x7fffffff) - (112 << 23); // exponents count from -15, not from -127
  return sign | ((bits + 0xfff + ((bits >>> 13) & 1)) >>> 13);
}

/**
 * Return the number that the bits of a half stand for.
 * @param {number} bits
 */
export function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

/**
 * Return the numbers of a tensor of halves: a Float16Array, or its bits in a Uint16Array.
 * @param {{ buffer: ArrayBufferLike, byteOffset: number, length: number }} data
 */
export function fromHalves({ buffer, byteOffset, length }) {
  return Float32Array.from(new Uint16Array(buffer, byteOffset, length), fromHalf);
}
