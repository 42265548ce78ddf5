// transformers.js in Node, on local files alone: node node.mjs REQUEST
import { readFileSync } from 'node:fs';
import { answers, line } from './answers.mjs';

const asked = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const place = `${asked.environment}/node_modules/@huggingface/transformers`;
const { version } = JSON.parse(readFileSync(`${place}/package.json`, 'utf8'));
const library = await import(`${place}/dist/transformers.node.mjs`);
library.env.allowRemoteModels = false;
asked.model = asked.folder;
console.log('\n' + JSON.stringify({ version, ...(await answers(library, asked, ...line(asked))) }));
process.exit(0);
