"""transformers and PEFT, by the code of the card."""

from importlib.metadata import version

from common import answer, by_transformers, request, run

asked = request()
names, seconds = run(asked["code"][0])
version_of = version("peft" if "peft" in asked["code"][0] else "transformers")
answer(version_of, seconds, by_transformers(asked, names["model"].float().eval()))
