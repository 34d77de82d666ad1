// The panel of a language model: prompt, continuation, speed, state.

import { streamTokens } from '../../common/text.mjs';
import { StreamDecoder } from '../../common/tokenizer.mjs';
import { drawState, layersOf } from './heatmap';
import { element } from './dom';
import type { Model, Stream } from './model';

const REDRAW = 100; // ms between pictures of the state

/** Fill the panel; return what stops it. */
export function showText(model: Model): () => void {
  const tokenizer = model.tokenizer!;
  const states = model.manifest.graphs.step.state.map((t) => t.name);
  const run = element('run', HTMLButtonElement);
  const output = element('output', HTMLElement);
  const speed = element('speed', HTMLElement);
  const which = element('state-name', HTMLSelectElement);
  const layer = element('state-layer', HTMLSelectElement);
  const canvas = element('state', HTMLCanvasElement);
  which.replaceChildren(...states.map((name) => new Option(name)));
  layer.replaceChildren();
  output.replaceChildren();
  speed.textContent = '';
  which.value = states.find((name) => name === 'wkv') ?? states[0];
  let stream: Stream | undefined;
  let running = false;

  async function draw(): Promise<void> {
    if (!stream) return;
    const view = await stream.peek(which.value);
    if (layer.options.length !== layersOf(view)) {
      const names = Array.from({ length: layersOf(view) }, (_, i) => `layer ${i}`);
      layer.replaceChildren(...names.map((name, i) => new Option(name, String(i))));
      layer.value = String(layersOf(view) - 1);
    }
    drawState(canvas, view, Number(layer.value));
  }

  async function write(): Promise<void> {
    const prompt = element('prompt', HTMLTextAreaElement).value;
    const number = (id: string) => Number(element(id, HTMLInputElement).value);
    const decoder = new StreamDecoder(tokenizer);
    const ids: number[] = [];
    const asked = document.createElement('span');
    asked.className = 'asked';
    asked.textContent = prompt;
    const written = document.createTextNode('');
    output.replaceChildren(asked, written);
    output.removeAttribute('data-tokens');
    stream?.close();
    stream = model.stream();
    speed.textContent = 'reading the prompt';
    await breathe();
    const settings = {
      maxTokens: number('max-tokens'),
      temperature: number('temperature'),
      topP: number('top-p'),
    };
    let started = 0;
    let drawn = 0;
    for await (const id of streamTokens(stream, tokenizer, prompt, settings)) {
      started ||= performance.now();
      ids.push(id);
      written.data += decoder.push(id);
      if (performance.now() - drawn > REDRAW) {
        speed.textContent = report(ids.length, started);
        await draw();
        await breathe();
        drawn = performance.now();
      }
      if (!running) break;
    }
    written.data += decoder.flush();
    speed.textContent = report(ids.length, started);
    output.dataset.tokens = JSON.stringify(ids);
    await draw();
  }

  which.onchange = layer.onchange = () => void (running || draw());
  run.onclick = async () => {
    if (running) {
      running = false;
      return;
    }
    running = true;
    run.textContent = 'Stop';
    try {
      await write();
    } catch (error) {
      speed.textContent = error instanceof Error ? error.message : String(error);
    } finally {
      running = false;
      run.textContent = 'Write';
    }
  };
  return () => {
    running = false;
  };
}

function report(count: number, started: number): string {
  // the first token came with the prompt
  const seconds = (performance.now() - started) / 1000;
  const rate = count > 1 ? `${((count - 1) / seconds).toFixed(1)} tokens/s` : '';
  return [`${count} tokens`, rate].filter(Boolean).join(' · ');
}

/** Let the browser paint and take clicks. */
const breathe = () => new Promise<void>((resolve) => setTimeout(resolve));
