// A picture of the state: orange is positive, blue negative, each layer on its own scale.

export interface View {
  data: Float32Array;
  dims: readonly number[];
}

/** How many layers a state tensor [layers, batch, …] has to choose from. */
export const layersOf = ({ dims }: View): number => dims[0];

/**
 * Draw one layer: the matrix of each head [heads, K, V] side by side, or a vector as one square.
 */
export function drawState(canvas: HTMLCanvasElement, { data, dims }: View, layer: number): void {
  const size = dims.slice(1).reduce((a, b) => a * b, 1);
  const values = data.subarray(layer * size, (layer + 1) * size);
  const side = Math.ceil(Math.sqrt(size));
  const [heads, rows, columns] =
    dims.length === 5 ? [dims[2], dims[3], dims[4]] : [1, Math.ceil(size / side), side];
  const across = Math.ceil(Math.sqrt(heads * 2));
  const down = Math.ceil(heads / across);
  const gap = heads > 1 ? 1 : 0;
  canvas.width = across * (columns + gap) - gap;
  canvas.height = down * (rows + gap) - gap;
  const context = canvas.getContext('2d')!;
  const image = context.createImageData(canvas.width, canvas.height);
  const largest = values.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9);
  values.forEach((value, i) => {
    const head = Math.floor(i / (rows * columns));
    const row = Math.floor(i / columns) % rows;
    const y = Math.floor(head / across) * (rows + gap) + row;
    const x = (head % across) * (columns + gap) + (i % columns);
    // the root shows what is small beside what is large
    const strength = Math.sqrt(Math.abs(value) / largest);
    const [r, g, b] = value < 0 ? [64, 140, 255] : [255, 138, 48];
    image.data.set([r, g, b, Math.round(255 * strength)], 4 * (y * canvas.width + x));
  });
  context.putImageData(image, 0, 0);
}
