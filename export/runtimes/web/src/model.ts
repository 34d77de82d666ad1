// An exported folder in the browser, read over HTTP or from the visitor's disk.

import type { InferenceSession, Tensor } from 'onnxruntime-web';
import { HostError } from '../../common/errors.mjs';
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
import type { Backend } from './backend';

const WEIGHTS = 'weights.bin';

/** Read a folder that a server offers at `url`. */
export function overHttp(url: string): ReadFile {
  return async (name) => {
    const response = await fetch(new URL(name, url));
    if (!response.ok) throw new HostError(`${response.url}: ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
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

/** Return the model of a folder, its graphs opened; `say` is told what is being read. */
export async function openModel(
  read: ReadFile,
  backend: Backend,
  say: (what: string) => void,
): Promise<Model> {
  const manifest = await readManifest(read);
  const checked: ReadFile = async (name) => {
    say(`Reading ${name}`);
    const content = await read(name);
    // browsers hash only on https and on this machine
    if (globalThis.crypto?.subtle) await checkHash(manifest, name, content);
    return content;
  };
  const weights = WEIGHTS in hashes(manifest) ? await checked(WEIGHTS) : undefined;
  const sessions: Record<string, InferenceSession> = {};
  const wanted = ['step', 'prefill', 'chunk', 'image'].filter((name) => name in manifest.graphs);
  if (!wanted.length) throw new HostError(`no graph of ${manifest.adapter} runs on this page`);
  for (const name of wanted) {
    const graph = manifest.graphs[name];
    const content = await checked(graph.file);
    say(`Opening ${name}`);
    sessions[name] = await backend.ort.InferenceSession.create(content, {
      executionProviders: [backend.name],
      externalData: weights ? [{ path: WEIGHTS, data: weights }] : [],
      // a state stays where it was computed
      preferredOutputLocation: Object.fromEntries(
        graph.state.map((t) => [`${t.name}_out`, backend.name === 'webgpu' ? 'gpu-buffer' : 'cpu']),
      ),
    });
  }
  const tokenizer = 'step' in sessions ? await openTokenizer(manifest, checked) : undefined;
  const state = 'step' in sessions ? await initialState(manifest.graphs.step, checked) : {};
  return new Model(manifest, backend, sessions, state, tokenizer);
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
    const tensor = this.state[name];
    return { data: (await tensor.getData()) as Float32Array, dims: tensor.dims };
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
