"""ONNX Runtime, by the code of the card."""

from importlib.metadata import version

from common import answer, by_session, request, run

asked = request()
names, seconds = run(asked["code"][0])
session = names["session"]
outputs, inputs = [o.name for o in session.get_outputs()], {i.name for i in session.get_inputs()}


def run_graph(given):
    return dict(zip(outputs, session.run(None, {k: v for k, v in given.items() if k in inputs}), strict=True))


answer(version("onnxruntime"), seconds, by_session(asked, run_graph))
