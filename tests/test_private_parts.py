"""Private parts of libraries that we use: where one moves, its test says so before a user meets it."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

PARTS = {
    # what we use: (module, path of attributes in it)
    "onnx/trace.py: the decomposition pass that is skipped": (
        "torch.onnx._internal.exporter._fx_passes", "decompose_with_registry",
    ),
    "onnx/trace.py: the operators that torch's ONNX library translates": (
        "torch.onnx._internal.exporter._decomp", "get_onnx_implemented_overloads",
    ),
    "onnx/graph.py: a rule of onnxscript": ("onnxscript.rewriter.rules.common._collapse_slices", "rules"),
    "onnx/graph.py: another": ("onnxscript.rewriter.rules.common._no_op", "rules"),
    "data/tasks.py: the classes of an auto class": ("transformers", "AutoModelForCausalLM._model_mapping._model_mapping"),
    "models/module_tree.py: what is renamed on loading": (
        "transformers.conversion_mapping", "get_model_conversion_mapping",
    ),
    "models/module_tree.py: how a key is renamed": ("transformers.core_model_loading", "rename_source_key"),
    "models/module_tree.py: what is fused on loading": ("transformers.core_model_loading", "WeightConverter"),
    "models/module_tree.py: the order of what is fused": ("transformers.core_model_loading", "dot_natural_key"),
    "training/model.py: how a new head is drawn": ("transformers", "PreTrainedModel._init_weights"),
    "training/model.py: what FSDP keeps together": ("transformers", "PreTrainedModel._no_split_modules"),
    "models/module_tree.py: what is counted as a model is built": (
        "torch.nn.modules.module", "register_module_parameter_registration_hook",
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", PARTS)
def test_a_private_part_is_where_we_use_it(use: str) -> None:
    module, path = PARTS[use]
    found: Any = import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{module} has no {path} any more, which {use} needs: see what took its place"
        found = getattr(found, name)


def test_the_functions_that_we_replace_take_what_we_hand_them() -> None:
    passes: Any = import_module("torch.onnx._internal.exporter._fx_passes")
    assert list(inspect.signature(passes.decompose_with_registry).parameters) == ["exported_program", "registry"]
    decompositions: Any = import_module("torch.onnx._internal.exporter._decomp")
    assert list(inspect.signature(decompositions.get_onnx_implemented_overloads).parameters) == ["registry"]
