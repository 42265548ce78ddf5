"""Which column is what."""

from __future__ import annotations

import pytest

from wlora_merge.data.columns import choose_columns
from wlora_merge.data.tasks import get_task
from wlora_merge.errors import DataError


@pytest.mark.parametrize(
    ("task", "found", "chosen"),
    [
        ("causal-lm", ["input", "target"], {"prompt": "input", "completion": "target"}),
        ("causal-lm", ["Messages", "id"], {"messages": "Messages"}),
        ("causal-lm", ["prompt", "system", "messages", "tools"],
         {"messages": "messages", "system": "system", "tools": "tools"}),
        ("causal-lm", ["instruction", "input", "output"],
         {"instruction": "instruction", "input": "input", "completion": "output"}),
        ("causal-lm", ["instruction", "output"], {"prompt": "instruction", "completion": "output"}),
        ("seq2seq-lm", ["instruction", "input", "output"],
         {"instruction": "instruction", "input": "input", "target": "output"}),
        ("text-classification", ["sentence1", "sentence2", "label"],
         {"text": "sentence1", "label": "label", "text_pair": "sentence2"}),
        ("seq2seq-lm", ["article", "highlights", "id"], {"source": "article", "target": "highlights"}),
        ("question-answering", ["id", "title", "context", "question", "answers"],
         {"question": "question", "context": "context", "answers": "answers"}),
        ("image-classification", ["img", "label"], {"image": "img", "label": "label"}),
    ],
)  # fmt: skip
def test_conventional_names_are_found(task: str, found: list[str], chosen: dict[str, str]) -> None:
    assert choose_columns(get_task(task), found) == chosen


@pytest.mark.parametrize(
    ("task", "found", "given", "words"),
    [
        ("text-classification", ["text", "sentence", "label"], {}, ["'text', 'sentence'", "--column text="]),
        ("text-classification", ["utterance", "label"], {}, ["'utterance', 'label'", "--column text=NAME"]),
        ("text-classification", ["text", "label"], {"text": "txt"}, ["'txt'", "did you mean 'text'"]),
        ("text-classification", ["text", "label"], {"lable": "label"}, ["did you mean 'label'"]),
        ("text-classification", ["text", "label"], {"text": "label", "label": "label"}, ["cannot be both"]),
        ("causal-lm", ["text", "prompt", "completion"], {}, ["text or as prompt + completion"]),
        (
            "causal-lm",
            ["prompt", "instruction", "input", "output"],
            {},
            ["prompt + completion or as instruction + input"],
        ),
        ("causal-lm", ["prompt", "chosen", "rejected"], {}, ["no column for 'completion'", "--column completion=NAME"]),
        ("causal-lm", ["prompt", "label"], {}, ["no column for 'completion'"]),
        ("causal-lm", ["role", "content"], {}, ["'role' may be a part of the examples"]),
        ("causal-lm", ["messages", "documents"], {}, ["'documents' may be a part of the examples"]),
        ("causal-lm", ["a", "b"], {"text": "a", "prompt": "b"}, ["text together with prompt"]),
        ("token-classification", ["tokens", "pos_tags", "ner_tags"], {}, ["--column tags="]),
        ("text-classification", ["question", "passage", "label"], {}, ["'passage'", "--column text_pair=passage"]),
        (
            "text-classification",
            ["label", "title", "content"],
            {"label": "label"},
            ["'title'", "--column text=content"],
        ),
        (
            "causal-lm",
            ["instruction", "context", "response"],
            {},
            ["'context'", "--column prompt=instruction", "--column instruction=instruction --column input=context"],
        ),
        ("seq2seq-lm", ["question", "context", "answer"], {}, ["'context'", "--column source=question"]),
        ("causal-lm", ["document", "summary", "id"], {}, ["'summary'", "--column text=document"]),
        ("text-classification", ["question", "sentence", "label"], {}, ["which leaves the other out"]),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(
    task: str, found: list[str], given: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        choose_columns(get_task(task), found, given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_given_column_wins_over_every_guess() -> None:
    found = ["text", "sentence", "label", "target"]
    given = {"text": "sentence", "label": "target"}
    assert choose_columns(get_task("text-classification"), found, given) == given
    assert choose_columns(get_task("causal-lm"), ["text", "input", "output"], {"text": "text"}) == {"text": "text"}
    text = {"text": "content", "label": "label"}
    assert choose_columns(get_task("text-classification"), ["label", "title", "content"], {"text": "content"}) == text
    both = {"instruction": "question", "input": "context", "completion": "answer"}
    assert (
        choose_columns(get_task("causal-lm"), ["question", "context", "answer"], dict(list(both.items())[:2])) == both
    )
