// node drive.mjs JSON: opens the page in Debian's Chromium, uses it as a visitor does, and prints
// what it shows, as JSON. Given: url, chromium; folder to choose; prompt and maxTokens to write
// after; ids whose logits to return; pictures to classify; camera to look through; webgpu in
// software; without, a global that the page shall lack; screenshot to write, midway too where a text
// is written.

import { chromium } from 'playwright-core';

const LIMIT = 240_000; // ms, for all of it
const given = JSON.parse(process.argv[2]);
const quiet = [
  '--no-sandbox', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync',
  '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream',
];
const software = [
  '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan',
  '--use-vulkan=swiftshader',
];

/** Type a prompt and let the model write. */
async function write(page) {
  await page.fill('#prompt', given.prompt);
  await page.fill('#temperature', '0');
  await page.fill('#max-tokens', String(given.maxTokens));
  await page.click('#run');
  if (given.screenshot) {
    await page.waitForFunction("document.querySelector('#speed').textContent.includes('/s')");
    await page.screenshot({ path: given.screenshot.replace('.png', '-midway.png') });
  }
  await page.waitForFunction(
    "document.querySelector('#run').textContent === 'Write'", undefined, { polling: 100 },
  );
  const output = page.locator('#output');
  return {
    tokens: JSON.parse((await output.getAttribute('data-tokens')) ?? 'null'),
    text: await output.evaluate((e) => e.lastChild.data),
    speed: await page.textContent('#speed'),
    state: await page.evaluate(() => {
      const canvas = document.querySelector('#state');
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      const drawn = data.filter((value, i) => i % 4 === 3 && value > 0).length;
      const blue = data.filter((value, i) => i % 4 === 2 && value > data[i - 2]).length;
      return { width: canvas.width, height: canvas.height, drawn, blue };
    }),
  };
}

/** Return the logits after all ids read at once, then after the same ids one by one. */
async function logits(page) {
  return page.evaluate(async (ids) => {
    const { model, readTokens } = globalThis.rwkv;
    const found = [];
    for (const pieces of [[ids], ids.map((id) => [id])]) {
      const stream = model.stream();
      let last;
      for (const piece of pieces) last = await readTokens(stream, piece);
      found.push([...last]);
      stream.close();
    }
    return found;
  }, given.ids);
}

/** Return the likeliest class that the page shows, and its share. */
async function best(page) {
  await page.waitForSelector('#classes[data-best]');
  return page.locator('#classes li').first().locator('span').allTextContents();
}

const browser = await chromium.launch({
  executablePath: given.chromium,
  args: [...quiet, ...(given.webgpu ? software : ['--disable-gpu'])],
});
const stuck = setTimeout(() => {
  console.error(`still not done after ${LIMIT / 1000} s`);
  browser.close().finally(() => process.exit(1));
}, LIMIT);
const found = { errors: [] };
try {
  const colorScheme = given.dark ? 'dark' : 'light';
  const viewport = given.viewport ?? { width: 1180, height: 760 };
  const page = await browser.newPage({ viewport, colorScheme });
  page.setDefaultTimeout(150_000);
  if (given.without) await page.addInitScript(`delete globalThis.${given.without}`);
  page.on('pageerror', (error) => found.errors.push(error.message));
  if (given.log) page.on('console', (message) => console.error(message.text()));
  // Chromium was seen to open and then to ask for nothing
  await page.goto(given.url, { timeout: 60_000 }).catch(() => page.goto(given.url));
  await page.waitForSelector('body:not([data-phase=opening])');
  if (given.folder) {
    await page.setInputFiles('#choose-folder', given.folder);
    await page.waitForSelector('body:is([data-phase=text], [data-phase=image], [data-phase=failed])');
  }
  found.isolated = await page.evaluate('crossOriginIsolated');
  found.phase = await page.getAttribute('body', 'data-phase');
  const isText = found.phase === 'text';
  if (isText && given.prompt !== undefined) Object.assign(found, await write(page));
  if (isText && given.ids) found.logits = await logits(page);
  found.classes = [];
  for (const picture of given.pictures ?? []) {
    await page.setInputFiles('#choose-picture', picture);
    found.classes.push(await best(page));
  }
  if (given.camera) {
    await page.click('#camera');
    found.classes.push(await best(page));
    found.watching = await page.textContent('#camera');
    await page.click('#camera');
  }
  found.status = await page.textContent('#status');
  found.note = await page.textContent('#image-status');
  if (given.screenshot) await page.screenshot({ path: given.screenshot });
} finally {
  clearTimeout(stuck);
  await browser.close();
}
console.log(JSON.stringify(found));
