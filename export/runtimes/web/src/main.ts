// The page: opens an exported folder and shows the panel that fits it. Parameters of its address:
// model (a folder's URL, else ./model/), backend (webgpu, wasm), threads.

import type { ReadFile } from '../../common/manifest.mjs';
import { openBackend } from './backend';
import { element } from './dom';
import { showImage } from './image';
import { fromDisk, openModel, overHttp } from './model';
import './style.css';
import { showText } from './text';

const parameters = new URLSearchParams(location.search);
const status = element('status', HTMLElement);
const choose = element('choose-folder', HTMLInputElement);

async function open(read: ReadFile, name: string): Promise<void> {
  document.body.dataset.phase = 'opening';
  try {
    const backend = await openBackend(
      parameters.get('backend'),
      Number(parameters.get('threads') ?? 0),
    );
    const model = await openModel(read, backend, (what) => (status.textContent = what));
    const { architecture, quantization } = model.manifest.metadata;
    const facts = [name, architecture, quantization, backend.label];
    status.textContent = facts.filter((fact) => typeof fact === 'string' && fact).join(' · ');
    const isText = 'step' in model.sessions;
    (isText ? showText : showImage)(model);
    document.body.dataset.phase = isText ? 'text' : 'image';
  } catch (error) {
    status.textContent = error instanceof Error ? error.message : String(error);
    document.body.dataset.phase = 'failed';
  }
}

choose.onchange = () => {
  const files = [...(choose.files ?? [])];
  const name = files[0]?.webkitRelativePath.split('/')[0] ?? '';
  if (files.length) void open(fromDisk(files), name);
};

const folder = new URL(`${parameters.get('model') ?? './model'}/`.replace(/\/+$/, '/'), location.href);
const beside = await fetch(new URL('manifest.json', folder), { method: 'HEAD' }).catch(() => null);
if (beside?.ok || parameters.has('model')) {
  const name = folder.pathname.split('/').filter(Boolean).at(-1) ?? '';
  await open(overHttp(folder.href), decodeURIComponent(name));
} else {
  status.textContent = 'Open a folder that rwkv export wrote. It stays on this machine.';
  document.body.dataset.phase = 'empty';
}
