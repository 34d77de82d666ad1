// An exported folder in the browser, read over HTTP or from the visitor's disk.

import type { InferenceSession, Tensor } from 'onnxruntime-web';
import { HostError } from '../../common/errors.mjs';
import { fromHalves } from '../../common/halves.mjs';
import {
  checkHash,
  hashes,
  initialState,
  readManifest,
  type Manifest,
  type ReadFile,
  type Values,
} from '../../common/manifest.mjs';
import type { Picture } from '../../common/resize.mjs';
import { openTokenizer, type Tokenizer } from '../../common/tokenizer.mjs';
import { preprocess, ranked } from '../../common/vision.mjs';
import type { Backend, Place } from './backend';

const WEIGHTS = 'weights.bin';

/** Read a folder that a server offers at `url`; `say` is told how far a large file is. */
export function overHttp(url: string, say: (what: string) => void): ReadFile {
  return async (name) => {
    const response = await fetch(new URL(name, url));
    if (!response.ok || !response.body) {
      throw new HostError(`${response.url}: the server answers ${response.status}`);
    }
    const total = Number(response.headers.get('Content-Length')) / 1e6;
    const parts: Uint8Array<ArrayBuffer>[] = [];
    let megabytes = 0;
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      megabytes += value.byteLength / 1e6;
      if (total > 1) say(`Reading ${name}, ${megabytes.toFixed(0)} of ${total.toFixed(0)} MB`);
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  };
}

/** Read the files of a folder that the visitor chose. */
export function fromDisk(files: Iterable<File>): ReadFile {
  const byName = new Map([...files].map((file) => [file.name, file]));
  return async (name) => {
    const file = byName.get(name);
    if (!file) throw new HostError(`the folder lacks ${name}`);
    return new Uint8Array(await file.arrayBuffer());
  };
}

/** A graph that a backend does not run. */
export class Refused extends HostError {}

/** Return the model of a folder, its graphs opened; `say` is told what is being read. */
export async function openModel(
  read: ReadFile,
  backend: Backend,
  say: (what: string) => void,
): Promise<Model> {
  const whole = await readManifest(read);
  const names = graphsFor(whole, backend.name);
  const graphs = Object.fromEntries(names.map((name) => [name, whole.graphs[name]]));
  const manifest = { ...whole, graphs };
  const states = Object.values(graphs).flatMap((graph) => graph.state);
  if (!backend.halves && states.some((state) => state.dtype === 'float16')) {
    throw new Refused(`states of fp16 need shader-f16, which ${backend.label} lacks here`);
  }
  const checked: ReadFile = async (name) => {
    say(`Reading ${name}`);
    const content = await read(name);
    // browsers hash only on https and on this machine
    if (globalThis.crypto?.subtle) await checkHash(manifest, name, content);
    return content;
  };
  const weights = WEIGHTS in hashes(manifest) ? await checked(WEIGHTS) : undefined;
  const sessions: Record<string, InferenceSession> = {};
  for (const [name, graph] of Object.entries(graphs)) {
    const content = await checked(graph.file);
    say(`Opening ${name}`);
    try {
      sessions[name] = await backend.ort.InferenceSession.create(content, {
        ...backend.options,
        externalData: weights ? [{ path: WEIGHTS, data: weights }] : [],
        // a state stays where it was computed
        preferredOutputLocation: Object.fromEntries(
          graph.state.map((t) => [`${t.name}_out`, backend.name === 'webgpu' ? 'gpu-buffer' : 'cpu']),
        ),
      });
    } catch (error) {
      await Promise.all(Object.values(sessions).map((session) => session.release()));
      throw new Refused(`${graph.file} does not open on ${backend.label}: ${error}`);
    }
  }
  const tokenizer = 'step' in sessions ? await openTokenizer(manifest, checked) : undefined;
  const state = 'step' in sessions ? await initialState(manifest.graphs.step, checked) : {};
  return new Model(manifest, backend, sessions, state, tokenizer);
}

/** WebGPU takes only fixed sizes whole, so prompts are read there in chunks. */
function graphsFor({ graphs, adapter }: Manifest, place: Place): string[] {
  if ('image' in graphs) return ['image'];
  if (!('step' in graphs)) throw new HostError(`no graph of ${adapter} runs on this page`);
  const order = place === 'webgpu' ? ['chunk'] : ['prefill', 'chunk'];
  const prompts = order.find((name) => name in graphs);
  return prompts ? ['step', prompts] : ['step'];
}

export class Model {
  constructor(
    readonly manifest: Manifest,
    readonly backend: Backend,
    readonly sessions: Record<string, InferenceSession>,
    private readonly initial: Record<string, Values>,
    readonly tokenizer: Tokenizer | undefined,
  ) {}

  /** Return a reader at the start of a document. */
  stream(): Stream {
    return new Stream(this, this.initial);
  }

  /** Return the classes of a picture and their probabilities, likeliest first. */
  async classify(picture: Picture): Promise<{ label: string; confidence: number }[]> {
    const { metadata } = this.manifest;
    const image = this.tensor(preprocess(picture, metadata));
    const { logits } = await this.sessions.image.run({ image });
    return ranked((await logits.getData()) as Float32Array, metadata.labels);
  }

  tensor({ type, data, dims }: Values): Tensor {
    return new this.backend.ort.Tensor(type, data, dims);
  }
}

/** A sequence being read: what a graph makes of the state is what the next call gets. */
export class Stream {
  readonly manifest: Manifest;
  private state: Record<string, Tensor>;

  constructor(
    private readonly model: Model,
    initial: Record<string, Values>,
  ) {
    this.manifest = model.manifest;
    this.state = Object.fromEntries(
      Object.entries(initial).map(([name, { type, data, dims }]) => [
        name,
        model.tensor({ type, data: data.slice(), dims }),
      ]),
    );
  }

  async run(graph: string, inputs: Record<string, Values>): Promise<Float32Array> {
    const fed = Object.entries(inputs).map(([name, values]) => [name, this.model.tensor(values)]);
    const results = await this.model.sessions[graph].run({
      ...Object.fromEntries(fed),
      ...this.state,
    });
    const before = this.state;
    this.state = Object.fromEntries(Object.keys(before).map((n) => [n, results[`${n}_out`]]));
    this.dispose(before);
    return (await results.logits.getData()) as Float32Array;
  }

  /** Return the values of a state tensor and its shape. */
  async peek(name: string): Promise<{ data: Float32Array; dims: readonly number[] }> {
    const { type, dims } = this.state[name];
    const data = (await this.state[name].getData()) as Float32Array;
    return { data: type === 'float16' ? fromHalves(data) : data, dims };
  }

  close(): void {
    this.dispose(this.state);
  }

  private dispose(state: Record<string, Tensor>): void {
    for (const tensor of Object.values(state)) {
      if (tensor.location === 'gpu-buffer') tensor.dispose();
    }
  }
}
