// The page: opens an exported folder and shows the panel that fits it. Which folder: the parameter
// `model` of its address, else what models.json beside the page names for WebGPU and WebAssembly,
// else the one that the visitor chooses. Parameters `backend` (webgpu, wasm) and `threads`.

import type { ReadFile } from '../../common/manifest.mjs';
import { readTokens } from '../../common/text.mjs';
import { openBackend, places, type Place } from './backend';
import { element } from './dom';
import { showImage } from './image';
import { fromDisk, openModel, overHttp, Refused, type Model } from './model';
import './style.css';
import { showText } from './text';

interface Folder {
  name: string;
  read: ReadFile;
}

const parameters = new URLSearchParams(location.search);
const status = element('status', HTMLElement);
const choose = element('choose-folder', HTMLInputElement);
let leave = () => {};

async function open(folderFor: (place: Place) => Folder): Promise<void> {
  leave();
  document.body.dataset.phase = 'opening';
  try {
    const { model, facts } = await openAnywhere(folderFor);
    say([...new Set(facts)].filter((fact) => typeof fact === 'string' && fact).join(' · '));
    const isText = 'step' in model.sessions;
    leave = isText ? showText(model) : showImage(model);
    Object.assign(globalThis, { rwkv: { model, readTokens } }); // for the console
    document.body.dataset.phase = isText ? 'text' : 'image';
  } catch (error) {
    say(error instanceof Error ? error.message : String(error));
    document.body.dataset.phase = 'failed';
  }
}

/** Open a folder on WebGPU if all of its graphs run there, else on WebAssembly. */
async function openAnywhere(
  folderFor: (place: Place) => Folder,
): Promise<{ model: Model; facts: unknown[] }> {
  const wanted = parameters.get('backend');
  const possible = (await places()).filter((place) => !wanted || place === wanted);
  let refused = new Refused(`this browser does not offer ${wanted}; leave out ?backend=`);
  for (const place of possible) {
    const { name, read } = folderFor(place);
    try {
      const backend = await openBackend(place, Number(parameters.get('threads') ?? 0));
      const model = await openModel(read, backend, say);
      const { architecture, quantization } = model.manifest.metadata;
      // MatMulNBits has no fast form there
      const slow = place === 'wasm' && /^int[48](-16)?$/.test(quantization ?? '');
      const note = slow && 'slow: these weights are for WebGPU, int8-dynamic is for WebAssembly';
      return { model, facts: [name, architecture, quantization, backend.label, note] };
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      refused = error;
    }
  }
  throw refused;
}

function say(what: string): void {
  status.textContent = what;
}

/** Return a folder that a server has. */
function served(path: string): Folder {
  const url = new URL(`${path.replace(/\/+$/, '')}/`, document.baseURI);
  const name = decodeURIComponent(url.pathname.split('/').filter(Boolean).at(-1) ?? '');
  return { name, read: overHttp(url.href, say) };
}

choose.onchange = () => {
  const files = [...(choose.files ?? [])];
  const name = files[0]?.webkitRelativePath.split('/')[0] ?? '';
  choose.value = '';
  if (files.length) void open(() => ({ name, read: fromDisk(files) }));
};

const asked = parameters.get('model');
const beside = asked ? null : await fetch('models.json').catch(() => null);
if (asked) {
  await open(() => served(asked));
} else if (beside?.ok) {
  const models: Record<Place, string> = await beside.json();
  await open((place) => served(models[place]));
} else {
  say('No model yet');
  document.body.dataset.phase = 'empty';
}
