// transformers.js in a page of headless Chromium, WebAssembly, files of this machine alone: node chromium.mjs REQUEST
import { createReadStream, existsSync, readFileSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { dirname, extname, join } from 'node:path';
import { line } from './answers.mjs';

const asked = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const modules = `${asked.environment}/node_modules`;
const { chromium } = createRequire(`${modules}/`)('playwright-core');
const { version } = JSON.parse(readFileSync(`${modules}/@huggingface/transformers/package.json`, 'utf8'));
const roots = { models: dirname(asked.folder), modules, ask: import.meta.dirname };
const kinds = { '.mjs': 'text/javascript', '.js': 'text/javascript', '.wasm': 'application/wasm', '.json': 'application/json' };
const server = createServer((request, response) => {
  const [, root, ...rest] = decodeURIComponent(request.url.split('?')[0]).split('/');
  const file = roots[root] && join(roots[root], ...rest);
  if (request.url === '/') return response.setHeader('content-type', 'text/html').end('<!doctype html>');
  if (!file || !existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
  response.writeHead(200, { 'content-type': kinds[extname(file)] ?? 'application/octet-stream', 'content-length': statSync(file).size });
  createReadStream(file).pipe(response);
}).listen(0, '127.0.0.1');
await new Promise((done) => server.once('listening', done));
const quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: quiet });
const page = await browser.newPage();
page.on('console', (message) => console.error(message.text()));
await page.goto(`http://127.0.0.1:${server.address().port}/`);
asked.model = asked.folder.split('/').at(-1);
const found = await page.evaluate(async ([asked, task, dtype]) => {
  const library = await import('/modules/@huggingface/transformers/dist/transformers.min.js');
  Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: '/models/', useBrowserCache: false });
  library.env.backends.onnx.wasm.wasmPaths = '/modules/onnxruntime-web/dist/';
  const { answers } = await import('/ask/answers.mjs');
  return await answers(library, asked, task, dtype, 'wasm');
}, [asked, ...line(asked)]);
await browser.close();
server.close();
console.log('\n' + JSON.stringify({ version: `${version}, Chromium ${browser.version()}`, ...found }));
process.exit(0);
