// node drive.mjs JSON: opens the page in Debian's Chromium, uses it as a visitor does, and prints
// what it shows. { url, chromium, webgpu, screenshot, prompt, maxTokens, pictures }

import { chromium } from 'playwright-core';

const given = JSON.parse(process.argv[2]);
const quiet = [
  '--no-sandbox', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync',
];
const software = [
  '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan',
  '--use-vulkan=swiftshader',
];
const browser = await chromium.launch({
  executablePath: given.chromium,
  args: [...quiet, ...(given.webgpu ? software : ['--disable-gpu'])],
});
const found = { errors: [] };
try {
  const page = await browser.newPage({ viewport: { width: 1180, height: 760 } });
  page.setDefaultTimeout(150_000);
  page.on('pageerror', (error) => found.errors.push(error.message));
  await page.goto(given.url);
  if (given.folder) await page.setInputFiles('#choose-folder', given.folder);
  await page.waitForSelector('body:is([data-phase=text], [data-phase=image], [data-phase=failed])');
  found.isolated = await page.evaluate('crossOriginIsolated');
  if (given.prompt !== undefined) {
    await page.fill('#prompt', given.prompt);
    await page.fill('#temperature', '0');
    await page.fill('#max-tokens', String(given.maxTokens));
    await page.click('#run');
    await page.waitForFunction(
      "document.querySelector('#run').textContent === 'Write'", undefined, { polling: 100 },
    );
    const output = page.locator('#output');
    found.tokens = JSON.parse((await output.getAttribute('data-tokens')) ?? 'null');
    found.text = await output.evaluate((e) => e.lastChild.data);
    found.speed = await page.textContent('#speed');
    found.state = await page.evaluate(() => {
      const canvas = document.querySelector('#state');
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      const drawn = data.filter((value, i) => i % 4 === 3 && value > 0).length;
      return { width: canvas.width, height: canvas.height, drawn };
    });
  }
  found.classes = [];
  for (const picture of given.pictures ?? []) {
    await page.setInputFiles('#choose-picture', picture);
    await page.waitForSelector('#classes[data-best]');
    found.classes.push(await page.locator('#classes li').first().locator('span').allTextContents());
  }
  found.phase = await page.getAttribute('body', 'data-phase');
  found.status = await page.textContent('#status');
  if (given.screenshot) await page.screenshot({ path: given.screenshot });
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));
