"""OpenVINO, by the code of the card."""

from importlib.metadata import version

from common import answer, by_session, request, run

asked = request()
names, seconds = run(asked["code"][0])
model = names["model"]
inputs = {name for port in model.inputs for name in port.get_names()}


def run_graph(given):
    result = model({k: v for k, v in given.items() if k in inputs})
    return {name: result[port] for port in model.outputs for name in port.get_names()}


answer(version("openvino"), seconds, by_session(asked, run_graph))
