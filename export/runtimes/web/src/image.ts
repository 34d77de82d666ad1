// The panel of a classifier: drop a picture, choose one, or look through the camera.

import { fromRgba } from '../../common/vision.mjs';
import { element } from './dom';
import type { Model } from './model';

const SHOWN = 5; // classes

/** Fill the panel; return what stops it. */
export function showImage(model: Model): () => void {
  const { channels, labels } = model.manifest.metadata;
  const canvas = element('picture', HTMLCanvasElement);
  const choose = element('choose-picture', HTMLInputElement);
  const camera = element('camera', HTMLButtonElement);
  const video = element('video', HTMLVideoElement);
  const drop = element('image-panel', HTMLElement);
  const list = element('classes', HTMLElement);
  const status = element('image-status', HTMLElement);
  status.textContent = `One of ${labels.length} classes`;
  list.replaceChildren();
  list.removeAttribute('data-best');
  [canvas.width, canvas.height] = [1, 1];

  async function look(source: CanvasImageSource, width: number, height: number): Promise<void> {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext('2d', { willReadFrequently: true })!;
    context.drawImage(source, 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    const started = performance.now();
    const classes = await model.classify(fromRgba(data, width, height, channels));
    status.textContent = `${(performance.now() - started).toFixed(0)} ms`;
    list.dataset.best = classes[0].label;
    list.replaceChildren(...classes.slice(0, SHOWN).map(row));
  }

  async function open(file: File | undefined): Promise<void> {
    if (!file) return;
    stop();
    list.removeAttribute('data-best');
    try {
      const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
      await look(bitmap, bitmap.width, bitmap.height);
    } catch (error) {
      list.replaceChildren();
      const why = error instanceof Error ? error.message : String(error);
      status.textContent = `${file.name} is damaged or no picture: ${why}`;
    }
  }

  function stop(): void {
    (video.srcObject as MediaStream | null)?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    camera.textContent = 'Camera';
  }

  async function watch(): Promise<void> {
    if (video.srcObject) {
      stop();
      return;
    }
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
      await video.play();
    } catch (error) {
      status.textContent = `no camera: ${error instanceof Error ? error.message : error}`;
      stop();
      return;
    }
    camera.textContent = 'Stop';
    while (video.srcObject) {
      await look(video, video.videoWidth, video.videoHeight);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  choose.onchange = () => void open(choose.files?.[0]);
  camera.onclick = () => void watch();
  drop.ondragover = (event) => event.preventDefault();
  drop.ondrop = (event) => {
    event.preventDefault();
    void open(event.dataTransfer?.files[0]);
  };
  return stop;
}

function row({ label, confidence }: { label: string; confidence: number }): HTMLElement {
  const item = document.createElement('li');
  const name = document.createElement('span');
  const share = document.createElement('span');
  name.textContent = label;
  share.textContent = `${(100 * confidence).toFixed(1)} %`;
  item.style.setProperty('--share', `${100 * confidence}%`);
  item.append(name, share);
  return item;
}
