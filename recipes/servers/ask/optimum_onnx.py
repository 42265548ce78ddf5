"""Optimum's ONNX Runtime classes, by the code of the card."""

from importlib.metadata import version

from common import answer, by_transformers, request, run

asked = request()
names, seconds = run(asked["code"][0])
answer(version("optimum-onnx"), seconds, by_transformers(asked, names["model"]))
