"""The list of tasks, and what holds for each of them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from support.tokenizers import WORDS, examples, tokenizer

from wlora_merge.data.task import refuse_unknown_tokens
from wlora_merge.data.tasks import TASKS, get_task, task_of
from wlora_merge.errors import BaseModelError, DataError, UnsupportedError, WloraMergeError


def test_importing_the_room_is_cheap() -> None:
    code = (
        "import sys, wlora_merge.data.tasks, wlora_merge.data.examples; "
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    root = ROOT
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"


def test_tasks_are_found_by_name_and_a_misspelling_gets_the_nearest() -> None:
    assert [get_task(name).name for name in TASKS] == list(TASKS)
    assert get_task("causal-lm").auto_class().__name__ == "AutoModelForCausalLM"
    with pytest.raises(WloraMergeError, match="did you mean 'text-classification'"):
        get_task("text-clasification")
    assert get_task(None).is_body


def spelled(file: Path) -> list[str]:
    """The tasks that a file names in its code; what its docstrings name is an example for a reader."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)}  # type: ignore[attr-defined]
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docstrings]
    named = [str(text) for text in texts if isinstance(text, str)]
    return [task for task in TASKS if any(re.search(rf"(?<![\w-]){task}(?![\w-])", text) for text in named)]


def test_a_task_is_named_in_its_own_file_alone() -> None:
    found = {str(file.relative_to(ROOT)): spelled(file) for file in (ROOT / "wlora_merge").rglob("*.py")}
    own = {f"wlora_merge/data/{task.replace('-', '_')}.py": [task] for task in TASKS}
    assert {file: tasks for file, tasks in found.items() if tasks} == own


def test_what_a_task_reads_is_named_by_its_columns() -> None:
    for task in TASKS.values():
        columns = {name for form in task.forms for name in form.columns}
        assert columns == set(task.conventions)
        assert columns >= {*task.more_text, *task.spread_columns}
        assert all(name in names for name, names in task.conventions.items())


def test_every_class_that_peft_has_for_a_task_exists() -> None:
    import peft

    for task in TASKS.values():
        assert (task.peft_task_type is None) == (task.peft_auto_class_name is None)
        if task.peft_auto_class_name is not None:
            assert task.peft_task_type in peft.TaskType.__members__
            assert getattr(peft, task.peft_auto_class_name)._target_class.__name__ == task.auto_class_name


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


def test_a_token_beyond_the_embeddings_is_named_before_the_model_runs(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    size = WORDS.index("sat")
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=size, decoder_start_token_id=0, **small))
    columns = {"causal-lm": ("prompt", "completion", llama), "seq2seq-lm": ("source", "target", t5)}
    for name, (first, second, model) in columns.items():
        task = get_task(name)
        for row in ({first: "sat", second: "a"}, {first: "a", second: "sat"}):
            data = examples(tmp_path, name, {first: "a", second: "cat"}, row)
            rows = task.encode(data, tokenizer())
            with pytest.raises(
                DataError, match=rf"example 2 of .*: the token 'sat' \({size}\) is not among the base's {size} emb"
            ):
                refuse_unknown_tokens(task, data, rows, tokenizer(), model)
            batch = task.collator(tokenizer())([rows[1]])
            with pytest.raises(IndexError):  # what torch says
                model(**batch)
        data = examples(tmp_path, name, {first: "a", second: "cat"})
        refuse_unknown_tokens(task, data, task.encode(data, tokenizer()), tokenizer(), model)


def test_padding_takes_a_token_that_the_base_has_an_embedding_for(tmp_path: Path) -> None:
    tokenizer(pad_token="the").save_pretrained(tmp_path)
    config, task = tmp_path / "config.json", get_task("causal-lm")
    for table, padded in (
        ({"vocab_size": len(WORDS)}, "the"),
        ({"vocab_size": len(WORDS) - 1}, "[eos]"),
        ({"text_config": {"vocab_size": 3}}, "[unk]"),
    ):
        config.write_text(json.dumps(table))
        assert task.load_processor(tmp_path).pad_token == padded
    config.write_text(json.dumps({"vocab_size": 1}))
    with pytest.raises(
        BaseModelError, match=r"the token 'the' \(\d+\) is not among the base's 1 embeddings, and no other"
    ):
        task.load_processor(tmp_path)
