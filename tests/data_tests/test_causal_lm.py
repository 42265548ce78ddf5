"""The task causal-lm: which tokens carry loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tokenizers import CHAT, MARKED, WORDS, examples, ids, learned, tokenizer

from wlora_merge.data.causal_lm import leading_ids
from wlora_merge.data.examples import Examples
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
