"""Layer kinds <-> matrices, against transformers' own source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from wlora_merge.adapters.layouts import (
    COMPOSITES,
    CONV1D_MODEL_TYPES,
    CONV1D_NAMES,
    Layout,
    factors_from_file,
    factors_to_file,
    layout_of,
    stored_factors,
)
from wlora_merge.errors import AdapterError, UnsupportedError
from wlora_merge.io.tensors import matrix_shape

CALL = re.compile(r"self\.(\w+)\s*=\s*(?<!\w)Conv1D\(")


def kind(
    base: tuple[int, ...],
    A: tuple[int, ...],
    B: tuple[int, ...],
    module: str = "h.0.attn.c_proj",
    *,
    embedding: bool = False,
    model_type: str = "llama",
    fan_in_fan_out: bool = False,
) -> Layout:
    return layout_of(module, base, A, B, embedding=embedding, model_type=model_type, fan_in_fan_out=fan_in_fan_out)


def test_the_model_types_with_conv1d_and_its_names_are_those_of_transformers_source() -> None:
    models = Path(transformers.__file__).parent / "models"
    found = {file.parent.name: CALL.findall(file.read_text()) for file in models.glob("*/modeling_*.py")}
    names = {name for calls in found.values() for name in calls}
    folders = {folder for folder, calls in found.items() if calls}
    types = {t for t in CONFIG_MAPPING_NAMES if t.replace("-", "_").replace("openai_gpt", "openai") in folders}
    assert len(types) == len(folders)
    assert types == set(CONV1D_MODEL_TYPES), f"transformers {transformers.__version__}"
    assert names == set(CONV1D_NAMES), f"transformers {transformers.__version__}"


def test_the_model_types_made_of_two_models_are_those_of_transformers() -> None:
    assert set(COMPOSITES) == {t for t in CONFIG_MAPPING_NAMES if t.endswith("encoder-decoder")}


@pytest.mark.parametrize("model_type", CONV1D_MODEL_TYPES)
def test_a_square_conv1d_is_told_by_its_name(model_type: str) -> None:
    shapes = ((8, 8), (2, 8), (8, 2))
    assert kind(*shapes, model_type=model_type) is Layout.CONV1D
    assert kind(*shapes, module="decoder.q_proj", model_type=model_type, fan_in_fan_out=True) is Layout.LINEAR
    assert kind(*shapes, model_type="gpt_bigcode") is Layout.LINEAR  # its c_proj is a Linear


def test_a_square_matrix_that_the_config_alone_calls_conv1d_is_refused() -> None:
    """PEFT looks at the layer, and takes fan_in_fan_out of a Linear for false."""
    for model_type in ("llama", "of-another"):
        with pytest.raises(UnsupportedError, match=rf"'h\.0\.attn\.c_proj'.*square.* {model_type} model"):
            kind((8, 8), (2, 8), (8, 2), model_type=model_type, fan_in_fan_out=True)
        assert kind((8, 24), (2, 8), (24, 2), model_type=model_type, fan_in_fan_out=True) is Layout.CONV1D
        assert kind((24, 8), (2, 8), (24, 2), model_type=model_type, fan_in_fan_out=True) is Layout.LINEAR


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("model_type", COMPOSITES)
def test_in_a_model_made_of_two_a_matrix_is_told_by_its_shape_and_a_square_one_refused(
    model_type: str, fan_in_fan_out: bool
) -> None:
    options = {"model_type": model_type, "fan_in_fan_out": fan_in_fan_out}
    assert kind((8, 24), (2, 8), (24, 2), **options) is Layout.CONV1D  # type: ignore[arg-type]
    assert kind((24, 8), (2, 8), (24, 2), module="q_proj", **options) is Layout.LINEAR  # type: ignore[arg-type]
    assert kind((8, 8), (2, 8), (8, 2), module="q_proj", **options) is Layout.LINEAR  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="c_proj"):
        kind((8, 8), (2, 8), (8, 2), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "A", "B", "embedding", "layout"),
    [
        ((6, 8), (2, 8), (6, 2), False, Layout.LINEAR),
        ((96, 8), (2, 96), (8, 2), True, Layout.EMBEDDING),
        ((6, 8, 3, 3), (2, 8, 3, 3), (6, 2, 1, 1), False, Layout.CONV),
        ((6, 8, 3), (2, 8, 3), (6, 2, 1), False, Layout.CONV),
    ],
)
def test_the_kind_of_a_layer_follows_from_its_shapes(
    base: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...], embedding: bool, layout: Layout
) -> None:
    assert kind(base, A, B, "m", embedding=embedding) is layout


@pytest.mark.parametrize(
    ("base", "A", "B", "embedding"),
    [
        ((6, 8), (2, 7), (6, 2), False),
        ((6, 8), (2, 8), (5, 2), False),
        ((8, 6), (2, 8), (6, 2), False),  # transposed, and nobody said Conv1D
        ((8, 96), (2, 96), (8, 2), True),
        ((96, 8), (2, 96), (8, 2), False),
        ((6, 8, 3), (2, 8, 3, 3), (6, 2, 1, 1), False),
        ((6,), (2, 6), (6, 2), False),
        ((), (2, 6), (6, 2), False),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_all_three_shapes(
    base: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...], embedding: bool
) -> None:
    with pytest.raises(AdapterError) as error:
        kind(base, A, B, "some.module", embedding=embedding)
    for part in ("some.module", list(base), list(A), list(B)):
        assert str(part) in str(error.value)


@pytest.mark.parametrize(
    ("layout", "base"),
    [(Layout.LINEAR, (6, 8)), (Layout.CONV1D, (8, 6)), (Layout.EMBEDDING, (8, 6)), (Layout.CONV, (6, 8, 3, 3))],
)
def test_stored_factors_give_the_delta_in_the_base_tensors_own_order(layout: Layout, base: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    columns = 72 if layout is Layout.CONV else 8
    A, B = torch.randn(2, columns), torch.randn(6, 2)
    left, right = stored_factors(layout, A, B)
    expected = (B @ A).T if layout.transposed else (B @ A).reshape(base)
    assert torch.allclose((left @ right).reshape(base), expected.reshape(base), atol=1e-6)
    assert (left.shape[0], right.shape[1]) == matrix_shape(base)


@pytest.mark.parametrize(
    ("layout", "base", "keys"),
    [
        (Layout.LINEAR, (6, 8), {"lora_A.weight", "lora_B.weight"}),
        (Layout.CONV1D, (8, 6), {"lora_A.weight", "lora_B.weight"}),
        (Layout.EMBEDDING, (8, 6), {"lora_embedding_A", "lora_embedding_B"}),
        (Layout.CONV, (6, 8, 3, 3), {"lora_A.weight", "lora_B.weight"}),
    ],
)
def test_factors_go_to_a_file_and_come_back(layout: Layout, base: tuple[int, ...], keys: set[str]) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 72 if layout is Layout.CONV else 8), torch.randn(6, 2)
    stored = factors_to_file(layout, A, B, base)
    assert set(stored) == keys
    back = [factors_from_file(layout, stored[key]) for key in sorted(keys)]
    assert torch.equal(back[0], A)
    assert torch.equal(back[1], B)
    if layout is Layout.CONV:
        assert [tuple(t.shape) for t in stored.values()] == [(2, 8, 3, 3), (6, 2, 1, 1)]
