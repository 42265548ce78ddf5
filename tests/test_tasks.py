"""How examples become model inputs, and how predictions become numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wlora_merge.constants import MULTI, REGRESSION, SINGLE
from wlora_merge.constants import TASKS as TASK_NAMES
from wlora_merge.data.causal_lm import leading_ids
from wlora_merge.data.examples import Examples, read_examples
from wlora_merge.data.labels import LabelSet, label_set
from wlora_merge.data.metrics import best_span, token_sums
from wlora_merge.data.tasks import get_task, task_of
from wlora_merge.errors import BaseModelError, DataError, UnsupportedError, WloraMergeError, WloraMergeWarning

WORDS = [
    "[pad]",
    "[unk]",
    "[bos]",
    "[eos]",
    *["a", "b", "c", "d", "e", "f", "g", "user", ":", "assistant", ".", "cat", "sat", "the"],
]
CHAT = "{% for m in messages %}{{ m['role'] + ' : ' }}{{ m['content'] }}{{ ' . ' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant : {% endif %}"
MARKED = CHAT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}").replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'assistant' %}"
).replace("{% endfor %}", "{% else %}{{ m['role'] + ' : ' + m['content'] + ' . ' }}{% endif %}{% endfor %}")  # fmt: skip


def tokenizer(bos: bool = False, eos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """Whitespace words; with or without a BOS before and an EOS after each text."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("[bos] " if bos else "") + "$A" + (" [eos]" if eos else "")
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B" + (" [eos]" if eos else ""), special_tokens=[("[bos]", 2), ("[eos]", 3)]
    )
    special = {"pad_token": "[pad]", "unk_token": "[unk]", "bos_token": "[bos]", "eos_token": "[eos]"} | options
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def examples(tmp_path: Path, task: str, *rows: dict[str, Any]) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path, task=task)


def learned(item: dict[str, Any]) -> list[int]:
    return [label for label in item["labels"] if label != -100]


def test_importing_the_room_is_cheap() -> None:
    code = (
        "import sys, wlora_merge.data.tasks, wlora_merge.data.examples; "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"


def test_tasks_are_found_by_name_and_a_misspelling_gets_the_nearest() -> None:
    assert [get_task(name).name for name in TASK_NAMES] == list(TASK_NAMES)
    assert get_task("causal-lm").auto_class().__name__ == "AutoModelForCausalLM"
    with pytest.raises(WloraMergeError, match="did you mean 'text-classification'"):
        get_task("text-clasification")


# labels


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b"], LabelSet(("a", "b"))),
        (["10", "9"], LabelSet(("9", "10"))),
        (["01", "1"], LabelSet(("01", "1"))),
        (["-1", "1"], LabelSet(("-1", "1"))),
        (["0.5", "2"], LabelSet((), REGRESSION)),
        ([".5", "1.2E-05", "+3.", "2"], LabelSet((), REGRESSION)),
        ([1.0, 2.5], LabelSet((), REGRESSION)),
        ([["b"], [], ["a", "b"]], LabelSet(("a", "b"), MULTI)),
    ],
)
def test_labels_tell_the_problem(values: list[Any], expected: LabelSet) -> None:
    assert label_set(values) == expected


def test_labels_that_could_be_two_things_are_refused_until_the_problem_type_is_given() -> None:
    with pytest.raises(DataError, match="say --problem-type"):
        label_set([1.0, 2.0])
    assert label_set([1.0, 2.0], SINGLE) == LabelSet(("1", "2"))
    assert label_set([1.0, 2.0], REGRESSION).size == 1
    for values, words in (
        ([["0", "1", "1"]], "0/1 vectors"),
        ([["a", "b", "b"]], "repeats"),
        (["a", "a"], "two classes"),
        (["b", "a", "a "], "'a ' and 'a'|'a' and 'a '"),
        (["nan", "1.5"], "the label 1.5 is a number with a point, 'nan' is none"),
        ([["0", "1"], ["1", "0"]], "0/1 vectors"),
    ):
        with pytest.raises(DataError, match=words):
            label_set(values)
    with pytest.raises(DataError, match="not a number"):
        label_set(["a", "b"], REGRESSION)
    with pytest.raises(DataError, match="no problem type"):
        label_set(["a", "b"], "binary")


# text classification


def test_texts_become_inputs_and_class_numbers(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer(bos=True)
    data = examples(tmp_path, task.name, {"text": "a b", "label": "y"}, {"text": "a b c", "label": "x"})
    labels = task.labels(data)
    batch = task.collator(tok)(list(task.encode(data, tok, labels=labels)))
    assert batch["input_ids"].tolist() == [ids("[bos] a b [pad]"), ids("[bos] a b c")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert task.config_changes(labels, tok) == {
        "id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}, "problem_type": SINGLE, "pad_token_id": 0,
    }  # fmt: skip


def test_regression_and_multi_label_targets_are_floats(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer()
    data = examples(tmp_path, task.name, {"text": "a", "label": 1.5}, {"text": "b", "label": 2})
    batch = task.collator(tok)(list(task.encode(data, tok, labels=task.labels(data))))
    assert torch.equal(batch["labels"], torch.tensor([1.5, 2.0]))
    assert task.config_changes(task.labels(data))["id2label"] == {0: "LABEL_0"}
    data = examples(tmp_path, task.name, {"text": "a", "label": ["x"]}, {"text": "b", "label": ["y", "x"]})
    batch = task.collator(tok)(list(task.encode(data, tok, labels=task.labels(data))))
    assert torch.equal(batch["labels"], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_an_unknown_label_in_other_data_is_refused_and_a_cut_is_counted(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer()
    data = examples(tmp_path, task.name, {"text": "a b c", "label": "z"}, {"text": "a", "label": "x"})
    with pytest.warns(WloraMergeWarning, match="1 of 2 examples"):
        encoded = task.encode(data, tok, max_length=2, labels=task.labels(data))
    assert encoded[0]["input_ids"] == ids("a b")
    with pytest.raises(DataError, match=r"example 1 of .* 'z', which is not one of 'x', 'y'"):
        task.encode(data, tok, labels=LabelSet(("x", "y")))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("text-classification", {"text": "a", "label": "x"}, "two classes or more; the only label is x"),
        ("token-classification", {"tokens": ["a", "b"], "tags": ["O", "O"]}, "two tags; the only one is O"),
    ],
)
def test_a_single_class_is_refused_with_the_name_of_the_file(
    tmp_path: Path, task: str, row: dict[str, Any], message: str
) -> None:
    data = examples(tmp_path, task, row, row)
    with pytest.raises(DataError, match=rf"{re.escape(data.source)}: .* {message}"):
        get_task(task).labels(data)


def test_text_pairs_are_encoded_together(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer(eos=True)
    data = examples(tmp_path, task.name, {"premise": "a", "hypothesis": "b", "label": 0})
    encoded = task.encode(data, tok, labels=LabelSet(("0", "1")))
    assert encoded[0]["input_ids"] == ids("a [eos] b [eos]")


# causal language models


def test_the_loss_is_on_the_completion_alone(tmp_path: Path) -> None:
    tok = tokenizer(bos=True, eos=True)
    data = examples(tmp_path, "causal-lm", {"prompt": "a b", "completion": " c d"}, {"prompt": "a", "completion": "e"})
    task = get_task("causal-lm")
    batch = task.collator(tok)(list(task.encode(data, tok)))
    assert leading_ids(tok) == ids("[bos]")
    assert batch["input_ids"].tolist() == [ids("[bos] a b c d"), ids("[bos] a e [pad] [pad]")]
    assert batch["labels"].tolist() == [[-100] * 3 + ids("c d"), [-100] * 2 + ids("e") + [-100] * 2]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_a_long_prompt_loses_its_start_but_neither_bos_nor_completion(tmp_path: Path) -> None:
    tok, task = tokenizer(bos=True), get_task("causal-lm")
    data = examples(tmp_path, task.name, {"prompt": "a b c d", "completion": "e f"}, {"prompt": "a", "completion": "e"})
    with pytest.warns(WloraMergeWarning, match="1 of 2 examples"):
        encoded = task.encode(data, tok, max_length=5)
    assert encoded[0]["input_ids"] == ids("[bos] c d e f")
    assert learned(encoded[0]) == ids("e f")
    with pytest.raises(DataError, match=r"example 1 of .*: its completion of 2 tokens leaves no room"):
        task.encode(data, tok, max_length=2)


@pytest.mark.parametrize(("bos", "limit"), [(True, 3), (False, 2)])
def test_a_completion_leaves_room_for_the_bos_and_a_token_of_its_prompt(tmp_path: Path, bos: bool, limit: int) -> None:
    tok, task = tokenizer(bos=bos), get_task("causal-lm")
    data = examples(tmp_path, task.name, {"prompt": "a b c d", "completion": "e f"})
    with pytest.raises(DataError, match="leaves no room"):
        task.encode(data, tok, max_length=limit)
    with pytest.warns(WloraMergeWarning, match=f"shortened to {limit + 1}"):
        encoded = task.encode(data, tok, max_length=limit + 1)
    assert encoded[0]["input_ids"] == ids(f"{'[bos] ' if bos else ''}d e f")
    assert learned(encoded[0]) == ids("e f")


def test_a_merge_across_the_boundary_does_not_move_it(tmp_path: Path) -> None:
    tok = tokenizer()
    data = examples(tmp_path, "causal-lm", {"prompt": "a c", "completion": "at"})  # "cat" is one word
    encoded = get_task("causal-lm").encode(data, tok)
    assert encoded[0]["input_ids"] == [*ids("a c"), WORDS.index("[unk]")]
    assert learned(encoded[0]) == [WORDS.index("[unk]")]


def test_all_of_a_plain_text_is_learned_and_cut_from_the_right(tmp_path: Path) -> None:
    tok, task = tokenizer(bos=True), get_task("causal-lm")
    data = examples(tmp_path, task.name, {"text": "a b c"})
    assert task.encode(data, tok)[0]["labels"] == ids("[bos] a b c")
    with pytest.warns(WloraMergeWarning):
        assert task.encode(data, tok, max_length=3)[0]["labels"] == ids("[bos] a b")
    with pytest.raises(DataError, match="no token to learn"):
        task.encode(examples(tmp_path, task.name, {"text": "a"}), tokenizer())


def conversation(tmp_path: Path, *contents: str) -> Examples:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return examples(tmp_path, "causal-lm", {"messages": turns})


def test_without_marks_in_the_template_only_the_last_turn_is_learned(tmp_path: Path) -> None:
    tok = tokenizer(bos=True, chat_template=CHAT)
    encoded = get_task("causal-lm").encode(conversation(tmp_path, "a", "b", "c", "d e"), tok)
    assert encoded[0]["input_ids"] == ids("user : a . assistant : b . user : c . assistant : d e .")
    assert learned(encoded[0]) == ids("d e .")
    with pytest.raises(DataError, match="end with a turn of the assistant"):
        get_task("causal-lm").encode(conversation(tmp_path, "a", "b", "c"), tok)


def test_with_marks_in_the_template_every_turn_of_the_assistant_is_learned(tmp_path: Path) -> None:
    tok, task = tokenizer(chat_template=MARKED), get_task("causal-lm")
    data = conversation(tmp_path, "a", "b", "c", "d e")
    encoded = task.encode(data, tok)
    assert encoded[0]["input_ids"] == ids("user : a . assistant : b . user : c . assistant : d e .")
    assert learned(encoded[0]) == ids("b d e")
    with pytest.warns(WloraMergeWarning, match="shortened to 7"):
        assert task.encode(data, tok, max_length=7)[0]["input_ids"] == ids("c . assistant : d e .")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("marked", [True, False])
def test_a_conversation_that_is_cut_keeps_the_bos_of_its_template(tmp_path: Path, marked: bool, bos: bool) -> None:
    tok = tokenizer(bos=bos, chat_template="[bos] " + (MARKED if marked else CHAT))
    with pytest.warns(WloraMergeWarning, match="shortened to 8"):
        encoded = get_task("causal-lm").encode(conversation(tmp_path, "a", "b", "c", "d e"), tok, max_length=8)
    assert encoded[0]["input_ids"] == ids("[bos] c . assistant : d e .")


def test_messages_need_a_template_that_only_appends(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no chat template"):
        get_task("causal-lm").encode(conversation(tmp_path, "a", "b"), tokenizer())
    rewriting = "{{ messages | length }} " + CHAT
    with pytest.raises(UnsupportedError, match="its start plus an answer"):
        get_task("causal-lm").encode(conversation(tmp_path, "a", "b"), tokenizer(chat_template=rewriting))


def test_token_sums_equal_the_loss_and_accuracy_counted_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator)
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, -100]])
    labels[0, 1] = logits[0, 1].argmax()
    labels[0, 2] = logits[0, 2].argmin()
    sums = token_sums(logits, labels)
    loss = torch.nn.functional.cross_entropy(logits[0, 1:3], labels[0, 1:3], reduction="sum")
    torch.testing.assert_close(sums, torch.tensor([[loss.item(), 1.0, 2.0], [0.0, 0.0, 0.0]]))


def test_the_trainer_takes_the_data_and_the_metric_of_a_causal_lm(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    pad_token_id=0)
    )  # fmt: skip
    task, tok = get_task("causal-lm"), tokenizer()
    rows = [
        {"prompt": "a b", "completion": "c"},
        {"prompt": "a", "completion": "d e f"},
        {"prompt": "b", "completion": "c"},
    ]
    encoded = task.encode(examples(tmp_path, task.name, *rows), tok)
    metric = task.metric()
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=task.collator(tok), eval_dataset=encoded, compute_metrics=metric.compute,
        preprocess_logits_for_metrics=metric.preprocess,
    )  # fmt: skip
    result = trainer.evaluate()
    losses, right, exact = [], [], []
    for item in encoded:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item["input_ids"]])).logits[0]
        pairs = [(logits[i - 1], label) for i, label in enumerate(item["labels"]) if label != -100]
        losses += [torch.nn.functional.cross_entropy(row, torch.tensor(label)).item() for row, label in pairs]
        right += [row.argmax().item() == label for row, label in pairs]
        exact.append(all(right[-len(pairs) :]))
    assert len(losses) == 5
    assert metric.name == "accuracy"
    np.testing.assert_allclose(result["eval_loss"], np.mean(losses), rtol=1e-5)  # per token, whatever the batches
    np.testing.assert_allclose([result["eval_accuracy"], result["eval_exact"]], [np.mean(right), np.mean(exact)])
    assert trainer.predict(encoded).predictions.shape == (3, 3)  # not [3, T, V]


# the other tasks


def test_seq2seq_targets_are_labels_and_are_never_cut(tmp_path: Path) -> None:
    task, tok = get_task("seq2seq-lm"), tokenizer(eos=True)
    data = examples(tmp_path, task.name, {"source": "a b c", "target": "d"}, {"source": "a", "target": "d e"})
    batch = task.collator(tok)(list(task.encode(data, tok)))
    assert batch["labels"].tolist() == [[*ids("d [eos]"), -100], ids("d e [eos]")]
    with pytest.raises(DataError, match=r"example 2 of .*: its target has 3 tokens"), pytest.warns(WloraMergeWarning):
        task.encode(data, tok, max_length=2)
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), len(WORDS)) * 50.0
    metric = task.metric()
    rows = metric.preprocess((logits, None), batch["labels"])  # type: ignore[misc]
    result = metric.compute(SimpleNamespace(predictions=rows.numpy(), label_ids=batch["labels"].numpy()))  # type: ignore[arg-type]
    assert (result["accuracy"], result["exact"]) == (1.0, 1.0)


def test_a_tag_lies_on_the_first_token_of_its_word(tmp_path: Path) -> None:
    inner = Tokenizer(
        models.WordPiece({"[unk]": 0, "[pad]": 1, "[cls]": 2, "ca": 3, "##t": 4, "a": 5}, unk_token="[unk]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="[cls] $A", special_tokens=[("[cls]", 2)])
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[pad]", unk_token="[unk]")
    task = get_task("token-classification")
    data = examples(tmp_path, task.name, {"tokens": ["cat", "a"], "tags": ["B", "O"]}, {"tokens": ["a"], "tags": ["O"]})
    labels = task.labels(data)
    batch = task.collator(tok)(list(task.encode(data, tok, labels=labels)))
    assert batch["input_ids"].tolist() == [[2, 3, 4, 5], [2, 5, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 0, -100, 1], [-100, 1, -100, -100]]
    assert task.config_changes(labels) == {"id2label": {0: "B", 1: "O"}, "label2id": {"B": 0, "O": 1}}
    with pytest.warns(WloraMergeWarning, match="1 of 2"):
        task.encode(data, tok, labels=labels, max_length=3)


def test_the_f1_of_tags_does_not_count_the_outside() -> None:
    metric = get_task("token-classification").metric(LabelSet(("B", "I", "O")))
    predicted, wanted = np.array([[0, 2, 2, 1, 0]]), np.array([[0, 2, 1, 2, -100]])
    result = metric.compute(SimpleNamespace(predictions=predicted, label_ids=wanted))  # type: ignore[arg-type]
    assert result == {"f1": 0.5, "accuracy": 0.5}


def test_an_answer_becomes_its_tokens(tmp_path: Path) -> None:
    task, tok = get_task("question-answering"), tokenizer(bos=True)
    answer = {"text": ["cat sat"], "answer_start": [4]}
    rows = [{"question": "a", "context": "the cat sat .", "answers": answer}]
    rows.append({"question": "a", "context": "the cat .", "answers": {"text": [], "answer_start": []}})
    encoded = task.encode(examples(tmp_path, task.name, *rows), tok)
    assert encoded[0]["input_ids"] == ids("[bos] a the cat sat .")
    assert [(item["start_positions"], item["end_positions"]) for item in encoded] == [(3, 4), (0, 0)]
    with pytest.warns(WloraMergeWarning, match="1 of 2 examples"):
        assert len(task.encode(examples(tmp_path, task.name, *rows), tok, max_length=4)) == 1
    with pytest.raises(DataError, match="no answer"):
        task.encode(examples(tmp_path, task.name, rows[0]), tok, max_length=4)
    with pytest.raises(DataError, match="no room for a context"):
        task.encode(examples(tmp_path, task.name, rows[0]), tok, max_length=2)


def test_answers_lie_in_the_context_whatever_stands_beside_them_in_a_batch(tmp_path: Path) -> None:
    task, tok = get_task("question-answering"), tokenizer(bos=True)
    answer = {"text": ["cat"], "answer_start": [4]}
    rows = [{"question": "a", "context": text, "answers": answer} for text in ("the cat .", "the cat sat . . .")]
    encoded = task.encode(examples(tmp_path, task.name, *rows), tok)
    assert [item["context"] for item in encoded] == [[2, 4], [2, 7]]
    batch = task.collator(tok)(encoded)
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 8, generator=generator), torch.rand(2, 8, generator=generator)
    logits[0][:, 1] = logits[1][:, 7] = 50.0  # the question, and what is padding in one of them
    logits[0][0, 2] = logits[1][0, 4] = logits[0][1, 3] = 20.0  # the best span of either context; the second ends at 7
    spans = [
        task.metric().preprocess(task.allowed(tuple(part[i : i + 1] for part in logits), [encoded[i]])) for i in (0, 1)
    ]
    together = task.metric().preprocess(task.allowed(logits, encoded))
    assert torch.equal(torch.cat(spans), together)
    assert together.tolist() == [[2, 4], [3, 7]]


def test_a_span_has_at_most_thirty_tokens() -> None:
    start, end = torch.zeros(1, 50), torch.zeros(1, 50)
    start[0, 2], end[0, 31], end[0, 32] = 9, 5, 9
    assert best_span((start, end)).tolist() == [[2, 31]]


def test_a_span_never_ends_before_it_starts() -> None:
    start, end = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[4.0, 3.0, 0.0]])
    assert best_span((start, end)).tolist() == [[2, 2]]
    metric = get_task("question-answering").metric()
    labels = (np.array([1, 0]), np.array([2, 0]))
    result = metric.compute(SimpleNamespace(predictions=np.array([[2, 3], [0, 0]]), label_ids=labels))  # type: ignore[arg-type]
    assert result == {"f1": 0.75, "exact": 0.5}


@pytest.mark.parametrize(
    ("labels", "logits", "wanted", "expected"),
    [
        (LabelSet(("a", "b")), [[1, 0], [1, 0], [0, 1]], [0, 1, 1], {"accuracy": 2 / 3}),
        (LabelSet(("a", "b"), MULTI), [[0.3, -0.2], [0.1, 1]], [[1, 0], [0, 1]], {"f1": 0.8, "accuracy": 0.5}),
        (LabelSet((), REGRESSION), [[1], [2], [3]], [2, 4, 6], {"mse": 14 / 3, "pearson": 1.0}),
        (LabelSet((), REGRESSION), [[1], [2], [3]], [6, 4, 2], {"mse": 10.0, "pearson": -1.0}),
        (LabelSet((), REGRESSION), [[1], [1]], [2, 4], {"mse": 5.0, "pearson": 0.0}),
    ],
)
def test_classification_metrics(labels: LabelSet, logits: Any, wanted: Any, expected: dict[str, float]) -> None:
    metric = get_task("text-classification").metric(labels)
    predicted = SimpleNamespace(predictions=np.array(logits, np.float32), label_ids=np.array(wanted))
    assert metric.compute(predicted) == pytest.approx(expected)  # type: ignore[arg-type]
    assert metric.higher_is_better == (labels.problem_type != REGRESSION)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_take_the_channels_of_their_processor(tmp_path: Path, channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    half = [0.5] * channels
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=half, image_std=half).save_pretrained(
        tmp_path / "base"
    )
    for name, value in (("dark", 0), ("light", 255)):
        (tmp_path / "set" / name).mkdir(parents=True)
        image.new("RGBA" if value else "L", (4, 4), (value,) * 4 if value else value).save(
            tmp_path / "set" / name / "1.png"
        )
    task = get_task("image-classification")
    data = read_examples(tmp_path / "set", task=task.name)
    processor = task.load_processor(tmp_path / "base")
    encoded = task.encode(data, processor, labels=task.labels(data))
    batch = task.collator(processor)([encoded[0], encoded[-1]])
    assert batch["pixel_values"].shape == (2, channels, 8, 8)
    assert batch["pixel_values"].amin((1, 2, 3)).tolist() == [-1.0, 1.0]
    assert batch["labels"].tolist() == [0, 1]
    assert task.config_changes(task.labels(data))["problem_type"] == SINGLE
    assert "pad_token_id" not in task.config_changes(task.labels(data), processor)


def test_feature_extraction_is_not_fitted(tmp_path: Path) -> None:
    task = get_task("feature-extraction")
    assert task.labels(None) is None  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="mix or export"):
        task.encode(None, None)  # type: ignore[arg-type]


# processors


def test_a_tokenizer_without_padding_pads_with_its_eos(tmp_path: Path) -> None:
    tokenizer(pad_token=None).save_pretrained(tmp_path)
    loaded = get_task("causal-lm").load_processor(tmp_path)
    assert (loaded.pad_token, loaded.padding_side) == ("[eos]", "right")
    tokenizer(pad_token=None, eos_token=None, unk_token=None).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="no pad, EOS or unknown"):
        get_task("causal-lm").load_processor(tmp_path)


def test_a_folder_without_its_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for name, what in (("text-classification", "tokenizer"), ("image-classification", "image processor")):
        with pytest.raises(BaseModelError, match=f"has no {what} that loads") as caught:
            get_task(name).load_processor(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(BaseModelError, match="does not exist"):
        get_task("causal-lm").load_processor(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LlamaForCausalLM", "causal-lm"), ("GPT2LMHeadModel", "causal-lm"), ("T5ForConditionalGeneration", "seq2seq-lm"),
        ("BertForSequenceClassification", "text-classification"), ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"), ("ViTForImageClassification", "image-classification"),
        ("BertModel", "feature-extraction"), ("BertForMaskedLM", None),
    ],
)  # fmt: skip
def test_the_task_is_told_by_the_class_of_the_model(name: str, task: str | None) -> None:
    import transformers

    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    assert task_of(model) == task
    assert task_of(type("Wrapped", (cls,), {})(model.config) if name == "GPT2LMHeadModel" else model) == task
    assert task_of(torch.nn.Linear(2, 2)) is None
