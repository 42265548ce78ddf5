"""onnxruntime-genai, by the code of the card: the lines up to its loop, then the loop with a prompt of ours."""

from importlib.metadata import version

from common import answer, request, run

asked = request()
lines = asked["code"][0].splitlines()
names, seconds = run("\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("generator"))]))
og, model, tokenizer = names["og"], names["model"], names["tokenizer"]
texts = []
for prompt in asked["prompts"]:
    parameters, ids = og.GeneratorParams(model), tokenizer.encode(prompt)
    parameters.set_search_options(max_length=len(ids) + asked["new_tokens"], do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    texts.append(tokenizer.decode(generator.get_sequence(0)[len(ids) :]))
answer(version("onnxruntime-genai"), seconds, texts)
