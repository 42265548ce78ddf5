"""sentence-transformers, by the code of the card."""

from importlib.metadata import version

from common import answer, request, run

asked = request()
names, seconds = run(asked["code"][0])
answer(version("sentence-transformers"), seconds, names["model"].encode(asked["texts"]).tolist())
