"""An export's weights against the mixture."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.exports import change_tensors
from support.exports import made as made

from wlora_merge.errors import VerifyError
from wlora_merge.exporters.verify import verify


def test_an_untouched_tensor_that_was_changed_is_found_though_the_probe_does_not_meet_it(made: Any) -> None:
    folder, inputs = made()
    used = {i for ids in json.loads((folder / "wlora_merge.json").read_text())["probe"]["input_ids"] for i in ids}
    row = next(i for i in range(96) if i not in used)

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][row, 0] += 1

    change_tensors(folder, change)
    with pytest.raises(VerifyError, match=r"embed_tokens\.weight' is not the base's"):
        verify(folder, **inputs)


def test_a_tensor_of_another_shape_or_one_too_many_is_found_by_its_name(made: Any) -> None:
    folder, inputs = made()
    change_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:16].clone()}))
    with pytest.raises(VerifyError, match=r"mismatched keys.*model\.norm\.weight"):
        verify(folder, **inputs)
