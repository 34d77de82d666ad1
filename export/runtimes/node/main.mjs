// node main.mjs FOLDER "prompt"         writes the continuation
// node main.mjs FOLDER picture.png …    names the class of each picture

import { parseArgs } from 'node:util';
import { HostError, open } from './model.mjs';

const USAGE = `usage: node main.mjs FOLDER [PROMPT | PICTURE ...]
  --max-tokens N    of text (100)
  --temperature X   0 takes the likeliest token (1)
  --top-p X         (1)
  --top-k N         0 keeps all (0)
  --seed N          draws the same tokens again
  --threads N       0 leaves it to onnxruntime (0)`;

/** @type {Record<string, { type: 'string' }>} */
const OPTIONS = Object.fromEntries(
  ['max-tokens', 'temperature', 'top-p', 'top-k', 'seed', 'threads'].map((name) => [
    name,
    { type: 'string' },
  ]),
);

async function main() {
  const { values, positionals } = arguments_();
  const [folder, ...rest] = positionals;
  if (!folder) throw new HostError(USAGE);
  const number = (/** @type {string} */ name, /** @type {number | undefined} */ otherwise) => {
    const value = values[name] === undefined ? otherwise : Number(values[name]);
    if (Number.isNaN(value)) throw new HostError(`--${name} takes a number, got ${values[name]}`);
    return value;
  };
  const model = await open(folder, { threads: number('threads', 0) });
  if ('step' in model.manifest.graphs) {
    const settings = {
      maxTokens: number('max-tokens', 100),
      temperature: number('temperature', 1),
      topP: number('top-p', 1),
      topK: number('top-k', 0),
      seed: number('seed', undefined),
    };
    for await (const piece of model.generate(rest.join(' '), settings)) process.stdout.write(piece);
    process.stdout.write('\n');
    return;
  }
  if (!rest.length) throw new HostError(USAGE);
  for (const path of rest) {
    const [{ label, confidence }] = await model.classify(path);
    console.log(`${path}\t${label}\t${confidence.toFixed(4)}`);
  }
}

function arguments_() {
  try {
    return parseArgs({ options: OPTIONS, allowPositionals: true });
  } catch (error) {
    throw new HostError(`${/** @type {Error} */ (error).message}\n${USAGE}`);
  }
}

main().catch((error) => {
  console.error(error instanceof HostError ? error.message : error);
  process.exitCode = 1;
});
