"""How an export is served: the card's code blocks run, its commands make the same bytes again, vLLM's limits are checked."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from support.models import make_adapter, tiny_bert, tiny_llama
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import wlora_merge
from wlora_merge import constants
from wlora_merge.cli.main import main
from wlora_merge.cli.recipe import read_recipe
from wlora_merge.data.tasks import TASKS
from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.model_card import FOLDER
from wlora_merge.exporters.serving import SERVERS, VLLM_RANKS, Exported, check_rank, check_server, vllm_rank
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix


@pytest.fixture
def mixture(llama_zoo: Callable[..., Any], tmp_path: Path) -> Path:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "mixture", weights=[0.5, 0.3, 0.2], task="causal-lm")
    return tmp_path / "mixture"


def blocks(folder: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", ModelCard.load(folder / "README.md").text, re.DOTALL)


def executed(
    folder: Path, base: Path, base_name: str, monkeypatch: pytest.MonkeyPatch, title: str = "transformers"
) -> list[dict[str, Any]]:
    """What every Python block of a program's part of a card defines, run where folder and base stand under the card's names."""
    place = folder.parent / "place"
    (place / FOLDER).parent.mkdir(parents=True)
    (place / FOLDER).symlink_to(folder)
    (place / base_name).symlink_to(base)
    monkeypatch.chdir(place)
    found = []
    text = ModelCard.load(folder / "README.md").text
    part = re.split(r"^(\S[^\n]*):$", text[text.index("## How to serve it") :], flags=re.MULTILINE)
    for block in re.findall(r"```python\n(.*?)\n```", part[part.index(title) + 1], re.DOTALL):
        names: dict[str, Any] = {}
        exec(block, names)
        found.append(names)
    return found


def test_the_python_of_a_dense_card_loads_the_folded_model(
    mixture: Path, llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(mixture, "dense", tmp_path / "out")
    (names,) = executed(tmp_path / "out", llama_zoo()[0], "base", monkeypatch)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert not torch.equal(names["model"].state_dict()["model.layers.0.self_attn.q_proj.weight"], first(tiny_llama()))


def first(model: Any) -> torch.Tensor:
    return model.state_dict()["model.layers.0.self_attn.q_proj.weight"]


def test_both_python_blocks_of_a_lora_card_load_the_same_model(
    mixture: Path, llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(mixture, "lora", tmp_path / "out")
    one, two = (n["model"].eval() for n in executed(tmp_path / "out", llama_zoo()[0], "base", monkeypatch, "PEFT"))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)
        assert not torch.allclose(one(ids).logits, tiny_llama()(ids).logits, atol=1e-3)


def test_the_python_of_an_onnx_card_opens_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    adapters = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query"]) for i in range(2)]
    mix(tmp_path / "base", adapters, tmp_path / "m", task="feature-extraction")
    export(tmp_path / "m", "onnx", tmp_path / "out")
    (names,) = executed(tmp_path / "out", tmp_path / "base", "base", monkeypatch, "ONNX Runtime")
    assert "input_ids" in {i.name for i in names["session"].get_inputs()}
    (js,) = blocks(tmp_path / "out", "js")
    assert "pipeline('feature-extraction'" in js


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_the_python_of_a_card_loads_the_head_and_labels_of_a_training_loop_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bert = tiny_bert()
    bert.save_pretrained(tmp_path / "base")
    adapters = [make_adapter(bert, tmp_path / f"a{i}", i, r=2, target_modules=["query"]) for i in range(2)]
    names = {0: "low", 1: "middle", 2: "high"}
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, id2label=names, label2id={v: k for k, v in names.items()}
    ).eval()
    wlora_merge.attach(model, adapters, head=["classifier"])
    with torch.no_grad():
        model.get_parameter("wlora_weights").normal_()
    wlora_merge.Mixture.from_model(model).save(tmp_path / "m")
    export(tmp_path / "m", kind, tmp_path / "out")
    checked = verify(tmp_path / "out", base=tmp_path / "base", adapters=[f"{a.name}={a}" for a in adapters])
    assert not checked.skipped
    title = "transformers" if kind == "dense" else "PEFT"
    loaded = executed(tmp_path / "out", tmp_path / "base", "base", monkeypatch, title)[0]["model"].eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=2e-6, rtol=0)
    if kind == "dense":
        assert loaded.config.id2label == names
        assert type(loaded).__name__ == "BertForSequenceClassification"


def test_the_commands_of_a_card_make_the_same_bytes_again(
    mixture: Path, llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = llama_zoo()
    export(mixture, "lora", tmp_path / "out", rank=3, dtype="float16")
    commands = next(b for b in blocks(tmp_path / "out", "sh") if "wlora-merge export" in b)
    place = tmp_path / "again"
    place.mkdir()
    for folder in (base, *folders):
        (place / folder.name).symlink_to(folder)
    monkeypatch.chdir(place)
    for line in commands.splitlines():
        done = CliRunner().invoke(main, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output)
    for file in ("adapter_model.safetensors", "adapter_config.json", "wlora_merge.json", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (place / "served" / file).read_bytes(), file


def test_the_command_of_a_fit_has_the_options_that_were_changed_and_parses(tmp_path: Path) -> None:
    import click
    from support.cards import card
    from support.cards import mixture as made

    data = {
        "data": {"name": "shots.jsonl"},
        "fit": {"method": "learned", "max_steps": 7, "learning_rate": 0.1, "folds": 2},
    }
    card(tmp_path, made(data=data, metrics={"held_out": {"from": {"name": "judge.jsonl"}}}))
    line = shlex.split(blocks(tmp_path, "sh")[-1].splitlines()[0])
    assert line[1] == "fit"
    context = main.commands["fit"].make_context("fit", line[2:])
    assert isinstance(context, click.Context)
    assert {k: context.params[k] for k in ("max_steps", "learning_rate", "folds", "data", "eval_data")} == {
        "max_steps": 7, "learning_rate": 0.1, "folds": 2, "data": "shots.jsonl", "eval_data": "judge.jsonl",
    }  # fmt: skip
    assert context.params["adapters"] == ("a=org/a", "b=org/b")


def test_the_config_of_a_lora_on_one_layer_alone_names_that_module_in_full(tmp_path: Path) -> None:
    model, name = tiny_llama(), "model.layers.0.self_attn.q_proj"
    model.save_pretrained(tmp_path / "base")
    adapters = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=[name]) for i in range(2)]
    export(mix(tmp_path / "base", adapters), "lora", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == [name]


# ----------------------------------------------------------------------------------------------------------- vLLM


def test_the_smallest_max_lora_rank_of_vllm() -> None:
    assert [vllm_rank(r) for r in (1, 2, 8, 9, 257, 512, 513)] == [1, 8, 8, 16, 320, 512, None]


def test_a_lora_for_vllm_says_how_to_start_it(mixture: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main,
        ["export", str(mixture), "--format", "lora", "--for", "vllm", "--rank", "9", "--out", str(tmp_path / "out")],
    )
    assert done.exit_code == 0, done.output
    assert "--max-lora-rank 16 --lora-modules" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"server": "vllm", "max_rank": 8}, ["r = 11", "--rank 8", "--max-lora-rank 16"]),
        ({"max_rank": 10}, ["r = 11", "--rank 10"]),
        ({"server": "vllm", "max_rank": 12}, ["--max-lora-rank is one of 1, 8, 16"]),
        ({"server": "triton"}, ["--for is 'triton'", "vllm"]),
    ],
)
def test_a_rank_that_the_server_does_not_take_is_refused_with_what_to_change(
    mixture: Path, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UnsupportedError) as error:
        export(mixture, "lora", tmp_path / "out", **options)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_beyond_the_highest_rank_there_is_no_way_to_start_the_server() -> None:
    with pytest.raises(UnsupportedError, match=f"give --rank {VLLM_RANKS[-1]}") as error:
        check_rank(600, server="vllm", max_rank=None, exact=True)
    assert "start the server" not in str(error.value)


def test_what_vllm_has_no_lora_for_is_refused(tmp_path: Path) -> None:
    """Linear layers and embeddings it takes; GPT-2's class has no LoRA there at all."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    configs: dict[str, Any] = {
        "embedding": {"target_modules": ["embed_tokens"]},
        "norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    }
    for name, config in configs.items():
        adapter = make_adapter(model, tmp_path / name, 0, r=2, **config)
        mix(tmp_path / "base", [adapter], tmp_path / f"{name}-m", task="causal-lm", modules_to_save="mix")
    export(tmp_path / "embedding-m", "lora", tmp_path / "out", server="vllm")
    with pytest.raises(UnsupportedError, match=r"for vllm: '[\w.]+norm' is a whole tensor \[32\]"):
        export(tmp_path / "norm-m", "lora", tmp_path / "no", server="vllm")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    gpt2.save_pretrained(tmp_path / "gpt2")
    adapter = make_adapter(gpt2, tmp_path / "g", 0, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    made = mix(tmp_path / "gpt2", [adapter], task="causal-lm")
    with pytest.raises(UnsupportedError, match="vLLM has no LoRA for GPT2LMHeadModel: export with --format dense"):
        export(made, "lora", tmp_path / "no", server="vllm")
    export(made, "lora", tmp_path / "gpt2-lora")
    assert "vllm serve" not in (tmp_path / "gpt2-lora" / "README.md").read_text()
    export(made, "dense", tmp_path / "gpt2-dense", server="vllm")
    assert f"vllm serve {FOLDER}" in (tmp_path / "gpt2-dense" / "README.md").read_text()
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("server", "exported", "said"),
    [
        ("vllm", Exported("onnx", "causal-lm"), "takes --format dense or --format lora, not --format onnx"),
        ("vllm", Exported("dense", "image-classification"), "not image-classification"),
        ("vllm", Exported("dense", "causal-lm", "NobodyForCausalLM"), "vLLM has no NobodyForCausalLM"),
        ("vllm", Exported("lora", "text-classification", "BertForSequenceClassification"), "no LoRA for Bert"),
        ("vllm", Exported("lora", "causal-lm", "LlamaForCausalLM", rank=600), "at most 512: give --rank 512"),
        ("peft", Exported("dense", "causal-lm"), "takes --format lora, not --format dense"),
        ("transformers", Exported("lora", "causal-lm"), "takes --format dense, not --format lora"),
        ("llama.cpp", Exported("dense", "causal-lm", "NobodyForCausalLM"), "converter has no NobodyForCausalLM"),
        ("ctranslate2", Exported("dense", "causal-lm", "NobodyForCausalLM"), "converter has no NobodyForCausalLM"),
        ("sentence-transformers", Exported("dense", "feature-extraction"), "modules.json"),
        ("onnxruntime-genai", Exported("onnx", "causal-lm"), "takes --format onnx --onnx-runtime genai, not"),
        ("openvino", Exported("genai", "causal-lm"), "takes --format onnx, not --format onnx --onnx-runtime genai"),
        ("lm-eval", Exported("dense", "text-classification"), "not text-classification"),
        ("tgi", Exported("dense", None), "what the model is for cannot be told: say --task TASK"),
    ],
)
def test_what_a_program_does_not_take_is_said_in_one_sentence(server: str, exported: Exported, said: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(said)) as error:
        check_server(server, exported)
    assert str(error.value).startswith(f"--for {server}: ")
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("base_name", "mounts", "model_id"),
    [("here", " -v $PWD/here:/base", "/base"), ("org/base", "", "org/base")],
)
def test_tgi_sees_the_base_of_a_lora(tmp_path: Path, base_name: str, mounts: str, model_id: str) -> None:
    from support.cards import card, mixture

    text = card(tmp_path, mixture(), "lora", base_name).text
    assert f":/mixture{mounts} -e LORA_ADAPTERS=mixture=/mixture" in text
    assert f"--model-id {model_id}\n" in text


def test_a_card_of_no_known_task_names_what_takes_every_task(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["query"])
    made = mix(tmp_path / "base", [adapter])
    made.config = {"architectures": ["BertForPreTraining"]}
    export(made, "dense", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModel.from_pretrained" in text
    assert not any(word in text for word in ("vllm serve", "llama-server", "lm_eval", "ctranslate2", "docker"))


def test_every_program_is_an_option_and_says_which_version_was_asked() -> None:
    assert tuple(SERVERS) == constants.SERVERS
    assert [server.name for server in SERVERS.values() if not server.version] == ["tgi"]
    for server in SERVERS.values():
        assert set(server.takes) <= {"dense", "lora", "onnx", "genai"}
        assert {task for tasks in server.takes.values() for task in tasks} <= set(TASKS)


def test_a_recipe_has_them_too(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "{base: b, adapters: [a], mix: {}, exports: [{format: lora, server: vllm, max_rank: 16}]}"
    )
    assert read_recipe(tmp_path / "r.yaml").exports[0].max_rank == 16


def test_a_dense_folder_keeps_what_a_server_reads(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    import shutil

    base, folders = llama_zoo()
    shutil.copytree(base, tmp_path / "base")
    kept = {
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": json.dumps({"do_sample": True, "eos_token_id": 2}),
        "tokenizer.json": "{}",
        "tokenizer_config.json": json.dumps({"chat_template": "x"}),
        "special_tokens_map.json": "{}",
        "tokenizer.model": "bytes",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }
    for name, text in kept.items():
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(text)
    mix(tmp_path / "base", folders, tmp_path / "m", task="causal-lm")
    export(tmp_path / "m", "dense", tmp_path / "out")
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_text() == text, name
