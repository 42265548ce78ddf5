// What transformers.js answers, in Node and in a page alike: the pipeline of the card, asked each prompt or text.
export async function answers({ pipeline }, asked, task, dtype, device) {
  const start = performance.now();
  const run = await pipeline(task, asked.model, { dtype, ...(device ? { device } : {}) });
  const seconds = (performance.now() - start) / 1000;
  const found = [];
  if (asked.kind === 'texts') {
    for (const prompt of asked.prompts) {
      const [made] = await run(prompt, { max_new_tokens: asked.new_tokens, do_sample: false, return_full_text: false });
      found.push(made.generated_text);
    }
  } else if (asked.kind === 'embeddings') {
    for (const text of asked.texts) {
      found.push((await run(text, { pooling: 'mean', normalize: true })).tolist()[0]);
    }
  } else {
    for (const text of asked.texts) {
      found.push(Object.fromEntries((await run(text, { top_k: null })).map(({ label, score }) => [label, score])));
    }
  }
  return { seconds, answers: found };
}

// The task and the dtype of the card's line; an option takes the dtype's place.
export function line(asked) {
  const [, task, dtype] = asked.code[0].match(/pipeline\('([^']+)'.*dtype: '([^']+)'/);
  return [task, asked.options[0] ?? dtype];
}
