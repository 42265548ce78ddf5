"""A regression in any unit: the same data times a number, plus a number, give the same predictions in that unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error
from support.models import make_adapter, tiny_bert, tiny_llama
from support.shots import WORDS, save_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig, RobertaModel

from wlora_merge.errors import WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training.fit import fit

TEXTS = [f"{WORDS[4 + i]} {WORDS[5 + i % 3]}" for i in range(12)]
SMALL: dict[str, Any] = {"max_steps": 6, "folds": 2, "new_adapter": 0}


def tiny_roberta() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return RobertaModel(RobertaConfig(**sizes, vocab_size=64, max_position_embeddings=40, pad_token_id=0)).eval()


def zoo(folder: Path, model: Any, targets: list[str]) -> tuple[Path, list[Path]]:
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    made = [make_adapter(model, folder / f"a{i}", i, r=2, scale=0.4, target_modules=targets) for i in range(2)]
    return folder / "base", made


def fitted(
    folder: Path, base: Path, adapters: list[Path], unit: float, zero: float, **options: Any
) -> tuple[Mixture, np.ndarray[Any, Any]]:
    """A mixture, and what transformers predicts with its dense export for the shots."""
    folder.mkdir()
    numbers = [unit * (i % 5 + i / 7 + 0.25) + zero for i in range(12)]
    rows = "".join(f"{text},{number!r}\n" for text, number in zip(TEXTS, numbers, strict=True))
    (folder / "r.csv").write_text("text,label\n" + rows)
    mixture = fit(base, adapters, folder / "r.csv", "text-classification", folder / "m", **(SMALL | options))
    export(folder / "m", "dense", folder / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "dense").eval()
    with torch.no_grad():
        given = AutoTokenizer.from_pretrained(folder / "dense")(TEXTS, padding=True, return_tensors="pt")
        return mixture, model(**given).logits[:, 0].double().numpy()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_bert, {"pooling": "cls"}),
        (tiny_bert, {"pooling": "cls", "new_adapter": 2}),
        (tiny_roberta, {"pooling": "model"}),
        (tiny_roberta, {"pooling": "cls"}),
    ],
    ids=["solved", "solved beside a new adapter", "trained", "solved before an activation"],
)
def test_the_same_numbers_in_another_unit_are_predicted_alike(
    tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    base, adapters = zoo(tmp_path, make(), ["query", "value"])
    plain, expected = fitted(tmp_path / "plain", base, adapters, 1.0, 0.0, **options)
    other, predicted = fitted(tmp_path / "other", base, adapters, 1000.0, 5000.0, **options)
    assert np.allclose((predicted - 5000) / 1000, expected, atol=2e-3)
    assert expected.std() > 0.01
    assert plain.metrics["kept"] == other.metrics["kept"]
    assert torch.allclose(plain.mixture_weights, other.mixture_weights, atol=1e-3)
    for name, row in plain.metrics["candidates"].items():
        assert other.metrics["candidates"][name]["mse"] == pytest.approx(1e6 * row["mse"], rel=1e-2)


def test_the_mean_squared_error_is_that_of_the_export_in_the_labels_unit(tmp_path: Path) -> None:
    base, adapters = zoo(tmp_path, tiny_bert(), ["query", "value"])
    rows = [f"{text},{400 * (i % 5) + 50.5}" for i, text in enumerate(TEXTS)]
    (tmp_path / "held.csv").write_text("text,label\n" + "\n".join(f"{WORDS[20]} {row}" for row in rows) + "\n")
    options = {
        "eval_data": tmp_path / "held.csv",
        "method": "fixed",
        "weights": [0.5, 0.5],
        "pooling": "cls",
        "folds": 0,
    }
    mixture, _ = fitted(tmp_path / "fit", base, adapters, 400.0, 30.0, **options)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fit" / "dense").eval()
    texts = [f"{WORDS[20]} {text}" for text in TEXTS]
    with torch.no_grad():
        given = AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
        predicted = model(**given).logits[:, 0]
    theirs = mean_squared_error([400 * (i % 5) + 50.5 for i in range(12)], predicted)
    assert mixture.metrics["candidates"][mixture.metrics["kept"]]["mse"] == pytest.approx(theirs, rel=1e-3)


def test_without_a_bias_the_unit_does_not_matter_and_a_far_zero_is_told(tmp_path: Path) -> None:
    base, adapters = zoo(tmp_path, tiny_llama(), ["q_proj", "v_proj"])
    with pytest.warns(WloraMergeWarning, match=r"has no bias.*subtract"):
        _, expected = fitted(tmp_path / "plain", base, adapters, 1.0, 0.0)
    with pytest.warns(WloraMergeWarning, match=r"has no bias.*subtract"):
        _, predicted = fitted(tmp_path / "other", base, adapters, 1000.0, 0.0)
    assert np.allclose(predicted / 1000, expected, atol=2e-3)
