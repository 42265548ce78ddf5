// Runs a local model folder in transformers.js and prints what it gives as JSON: node transformers_js.mjs LIBRARY KIND FOLDER IDS DTYPE
const [library, kind, folder, text, dtype] = process.argv.slice(2);
const { env, Tensor, ...classes } = await import(library);
env.allowRemoteModels = false;
if (kind === 'embed') {
  const run = await classes.pipeline('feature-extraction', folder, { dtype });
  const texts = JSON.parse(text);
  const pooled = await run(texts, { pooling: 'mean', normalize: true });
  const { sentence_embedding } = await run.model(run.tokenizer(texts, { padding: true }));
  console.log(JSON.stringify([pooled.tolist(), sentence_embedding.tolist()]));
  process.exit(0);
}
const rows = JSON.parse(text);
const flat = BigInt64Array.from(rows.flat().map(BigInt));
const input_ids = new Tensor('int64', flat, [rows.length, rows[0].length]);
const attention_mask = new Tensor('int64', new BigInt64Array(flat.length).fill(1n), input_ids.dims);
const model = await classes[`AutoModelFor${kind}`].from_pretrained(folder, { dtype });
if (kind === 'SequenceClassification') {
  console.log(JSON.stringify((await model({ input_ids, attention_mask })).logits.to('float32').tolist()));
} else {
  const tokens = await model.generate({ inputs: input_ids, attention_mask, max_new_tokens: 8, do_sample: false });
  console.log(JSON.stringify(tokens.tolist().map((row) => row.map(Number))));
}
