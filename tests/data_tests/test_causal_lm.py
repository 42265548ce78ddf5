"""The task causal-lm: which tokens carry loss."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tokenizers import CHAT, MARKED, WORDS, examples, ids, learned, tokenizer

from wlora_merge.data.examples import Examples, read_examples
from wlora_merge.data.task import leading_ids
from wlora_merge.data.tasks import get_task
from wlora_merge.errors import DataError, UnsupportedError, WloraMergeWarning


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


TOOLS = "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }} {% endif %}" + CHAT


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_a_system_column_is_a_system_turn(tmp_path: Path, template: str) -> None:
    tok, task = tokenizer(chat_template=template), get_task("causal-lm")
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    rows = [{"messages": messages, "system": "a"}, {"messages": messages, "system": ""}, {"messages": messages}]
    with_turns = [{"messages": [{"role": "system", "content": "a"}, *messages]}, *({"messages": messages},) * 2]
    with warnings.catch_warnings(record=True) as told:
        found = task.encode(examples(tmp_path, task.name, *rows), tok)
    assert list(found) == list(task.encode(examples(tmp_path, task.name, *with_turns), tok))
    assert [str(w.message)[-50:] for w in told] == []
    with pytest.raises(DataError, match="line 1: has a system prompt in a column of its own and in its messages"):
        examples(tmp_path, task.name, {**with_turns[0], "system": "a"})


def test_tools_go_to_the_chat_template_as_transformers_hands_them_over(tmp_path: Path) -> None:
    import datasets

    tok, task = tokenizer(chat_template=TOOLS), get_task("causal-lm")
    kinds = [{"a": {"type": "string"}}, {"b": {"type": "number", "default": 1}}]
    tools = [[{"type": "function", "function": {"name": "cat", "parameters": {"properties": kind}}}] for kind in kinds]
    call = {"type": "function", "function": {"name": "cat", "arguments": {"a": "b"}}}
    turns = [
        {"role": "user", "content": "b"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "cat", "content": ""}, {"role": "assistant", "content": "c"},
    ]  # fmt: skip
    plain = [{**turn, "content": turn["content"] or ""} for turn in turns]
    wanted = [tok.apply_chat_template(plain, tools=given, tokenize=True)["input_ids"] for given in tools]
    listed = [{"messages": turns, "tools": given} for given in tools]
    written = [{"messages": turns, "tools": json.dumps(given)} for given in tools]
    sources = [examples(tmp_path, task.name, *rows) for rows in (listed, written)]
    sources.append(read_examples(datasets.Dataset.from_list(listed), task=task.name))  # Arrow gives both all keys
    for data in sources:
        assert [item["input_ids"] for item in task.encode(data, tok)] == wanted
        assert json.loads(data[1]["tools"]) == tools[1]
    deaf = tokenizer(chat_template=CHAT)
    with pytest.warns(WloraMergeWarning, match="the chat template does not read tools, so column 'tools' is left out"):
        task.encode(sources[0], deaf)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tools": "no JSON"}, "column 'tools' holds text that is not JSON"),
        ({"tools": {"name": "a"}}, "column 'tools' must be a list of objects"),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "a message with 'weight', which is not read",
        ),
        ({"messages": [{"from": "bot", "value": "a"}]}, "has the role 'bot'; roles are system, user, .* human, gpt"),
        ({"messages": [{"from": "gpt", "value": ""}]}, "is empty"),
    ],
)
def test_conversations_that_are_not_read_whole_are_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=f"line 1: .*{words}"):
        examples(tmp_path, "causal-lm", {"messages": messages, **row})


def test_sharegpt_is_read_as_the_same_conversation(tmp_path: Path) -> None:
    tok, task = tokenizer(chat_template=CHAT), get_task("causal-lm")
    turns = [("system", "a"), ("human", "b"), ("gpt", "c"), ("observation", "d"), ("gpt", "e")]
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    data = examples(
        tmp_path, task.name, {"id": 1, "conversations": [{"from": who, "value": text} for who, text in turns]}
    )
    wanted = tok.apply_chat_template(
        [{"role": roles.get(who, who), "content": text} for who, text in turns], tokenize=True
    )
    assert task.encode(data, tok)[0]["input_ids"] == wanted["input_ids"]


def test_alpaca_is_an_instruction_and_where_there_is_one_its_input(tmp_path: Path) -> None:
    tok, task = tokenizer(bos=True), get_task("causal-lm")
    rows = [{"instruction": "a b", "input": text, "output": " d"} for text in ("c", "", None)]
    encoded = task.encode(examples(tmp_path, task.name, *rows), tok)
    assert [item["input_ids"] for item in encoded] == [ids("[bos] a b c d"), *[ids("[bos] a b d")] * 2]
    assert all(learned(item) == ids("d") for item in encoded)
    other = get_task("seq2seq-lm")
    assert other.encode(examples(tmp_path, other.name, rows[0]), tok)[0]["input_ids"] == ids("[bos] a b c")


def test_a_text_that_a_template_rendered_gets_no_second_bos(tmp_path: Path) -> None:
    tok = tokenizer(bos=True, chat_template="[bos] " + CHAT)
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    rendered = tok.apply_chat_template(messages, tokenize=False)
    wanted = tok.apply_chat_template(messages, tokenize=True)["input_ids"]
    prompt = tok.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    task, rows = get_task("causal-lm"), [{"text": rendered}, {"text": "a b"}]
    encoded = task.encode(examples(tmp_path, task.name, *rows), tok)
    assert [item["input_ids"] for item in encoded] == [wanted, ids("[bos] a b")]
    both = {"prompt": prompt, "completion": rendered[len(prompt) :]}
    (item,) = task.encode(examples(tmp_path, task.name, both), tok)
    assert (item["input_ids"], learned(item)) == (wanted, ids("c ."))
    with pytest.warns(WloraMergeWarning, match="shortened to 6"):
        (item,) = task.encode(examples(tmp_path, task.name, both), tok, max_length=6)
    assert item["input_ids"] == [wanted[0], *wanted[-5:]]
    classes = get_task("text-classification")
    data = examples(tmp_path, classes.name, {"text": rendered, "label": "x"}, {"text": "a", "label": "y"})
    labels = classes.labels(data)
    rows = classes.encode(data, tok, labels=labels)
    assert [row["input_ids"] for row in rows] == [wanted, ids("[bos] a")]
    assert [len(row["attention_mask"]) for row in rows] == [len(wanted), 2]
    with pytest.warns(WloraMergeWarning, match="1 of 2 examples"):
        assert classes.encode(data, tok, labels=labels, max_length=3)[0]["input_ids"] == wanted[:3]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if messages[0]['content'] == 'c' %}{{ raise_exception('no c') }}{% endif %}" + CHAT, "no c"),
        (
            "{% if messages[0]['content'] == 'c' %}{{ messages[0]['content'] + 1 }}{% endif %}" + MARKED,
            "can only concatenate",
        ),
        ("{% if messages[0]['content'] == 'c' %}{{ 1 // 0 }}{% endif %}" + CHAT, "integer division or modulo by zero"),
    ],
)
def test_what_a_chat_template_raises_is_told_with_the_example(tmp_path: Path, template: str, words: str) -> None:
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "b"}] for text in "ac"]
    data = examples(tmp_path, "causal-lm", *({"messages": row} for row in rows))
    with pytest.raises(DataError, match=f"example 2 of .*rows.jsonl: the chat template says: {words}"):
        get_task("causal-lm").encode(data, tokenizer(chat_template=template))


def test_a_chat_template_that_cannot_be_read_or_chosen_is_one_sentence(tmp_path: Path) -> None:
    data = conversation(tmp_path, "a", "b")
    with pytest.raises(DataError, match=r"example 1 of .*: the chat template says: unexpected '}'"):
        get_task("causal-lm").encode(data, tokenizer(chat_template="{% for m in messages %}{{ m }"))
    several = tokenizer(chat_template={"one": CHAT, "tool_use": TOOLS})
    with pytest.raises(
        UnsupportedError, match=r"example 1 of .*: the chat template cannot be chosen: This model has multiple"
    ):
        get_task("causal-lm").encode(data, several)


def test_messages_need_a_template_that_only_appends(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no chat template"):
        get_task("causal-lm").encode(conversation(tmp_path, "a", "b"), tokenizer())
    rewriting = "{{ messages | length }} " + CHAT
    with pytest.raises(UnsupportedError, match="its start plus an answer"):
        get_task("causal-lm").encode(conversation(tmp_path, "a", "b"), tokenizer(chat_template=rewriting))


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
