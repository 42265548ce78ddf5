"""What is held out: stratified as scikit-learn does, equal shots together."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np

from wlora_merge.data.examples import Examples
from wlora_merge.training.cross_validation import enough, fold_indices


def test_folds_are_stratified_and_hold_each_example_out_once() -> None:
    from sklearn.model_selection import StratifiedKFold

    keys = ["a"] * 6 + ["b"] * 4 + ["c"] * 2
    classes, own = [(key,) for key in keys], range(12)
    folds = fold_indices(classes, own, 2, seed=0)
    assert sorted(i for fold in folds for i in fold) == list(range(12))
    ours = [sorted(keys[i] for i in fold) for fold in folds]
    theirs = [sorted(np.array(keys)[held].tolist()) for _, held in StratifiedKFold(2).split(keys, keys)]
    assert ours == theirs
    assert fold_indices(classes, own, 2, seed=0) == folds != fold_indices(classes, own, 2, seed=1)
    assert fold_indices([("a",), ("b",)], range(2), 3, seed=0) == []
    assert all(0 not in fold for fold in fold_indices([("only",), *[("a",)] * 3], range(4), 3, seed=0))


def test_examples_of_several_classes_are_spread_by_their_rarest_one() -> None:
    classes = [("all", "x"), ("all", "x"), ("all", "y"), ("all", "y", "x"), ("all",), ("all",), (), (), ("all", "once")]
    for seed in range(5):
        folds = fold_indices(classes, range(9), 2, seed=seed)
        for name, each in {"x": {1, 2}, "y": {1}, "all": {3}, "once": {0}}.items():
            assert {sum(name in classes[i] for i in fold) for fold in folds} <= each, name
        assert [sum(not classes[i] for i in fold) for fold in folds] == [1, 1]
    assert enough(classes[:4], range(4), head=True)  # 4, 3 and 2 of three classes
    assert not enough([("a", "b"), ("c",), ("a",)], range(3), head=True)


def test_equal_examples_are_held_out_together() -> None:
    folds = fold_indices([("a",)] * 8, [0, 1, 0, 0, 1, 5, 6, 6], 2, seed=0)
    assert sorted(i for fold in folds for i in fold) == list(range(8))
    for equal in ({0, 2, 3}, {1, 4}, {6, 7}):
        assert any(equal <= set(fold) for fold in folds)
    assert fold_indices([("a",)] * 4, [0, 0, 0, 0], 3, seed=0) == []
    two = [("a",), ("a",), ("b",), ("b",)]
    assert not enough(two, [0, 0, 2, 2], head=True)
    assert enough(two, [0, 1, 2, 3], head=True)
    one_each = [("a",), ("b",), ("c",), ("d",)]
    assert [enough(one_each, range(4), head=head) for head in (True, False)] == [False, True]
    assert not enough([("a",)] * 3, [0, 1, 2], head=False)  # too few of anything


def test_of_three_examples_or_of_three_different_ones_none_is_held_out() -> None:
    assert [len(fold_indices([("",)] * n, range(n), 3, seed=0)) for n in (2, 3, 4)] == [0, 0, 3]
    assert fold_indices([("",)] * 6, [0, 1, 2, 0, 1, 2], 3, seed=0) == []


def test_what_a_language_model_is_to_write_is_a_class_where_the_rows_repeat_it() -> None:
    def classes(task: str, **columns: list[Any]) -> list[tuple[str, ...]]:
        rows = datasets.Dataset.from_dict(columns)
        return Examples(rows, task, {name: name for name in columns}, "shots.jsonl", "").classes(None)

    yes_or_no, inputs = [" yes", " no", " yes", " yes"], ["a", "b", "c", "d"]
    assert classes("causal-lm", prompt=inputs, completion=yes_or_no) == [(" yes",), (" no",), (" yes",), (" yes",)]
    assert classes("seq2seq-lm", source=inputs[:3], target=["x", "y", "x"]) == [("",)] * 3  # three rows, two targets
    assert classes("seq2seq-lm", source=["a", "b"] * 2, target=["x", "y"] * 2) == [("",)] * 4  # two rows, each twice
    assert classes("causal-lm", text=["x", "x"]) == [("",)] * 2
    chats = [
        [{"role": "user", "content": i}, {"role": "assistant", "content": o}]
        for i, o in zip(inputs, yes_or_no, strict=True)
    ]
    found = classes("causal-lm", messages=[json.dumps(chat) for chat in chats])  # as they are read
    assert found == [(text,) for text in yes_or_no]
    found *= 3
    assert all(len({found[i] for i in fold}) > 1 for fold in fold_indices(found, range(12), 3, seed=0))
