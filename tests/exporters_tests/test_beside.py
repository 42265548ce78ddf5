"""What lies beside adapters: carried where it is asked for, else named; transformers' own tokenizers are the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from support.models import make_adapter, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers

from wlora_merge.errors import AdapterError, UnsupportedError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix

TEMPLATE = "{% for m in messages %}w7 {{ m['content'] }} w8 {% endfor %}"
TURN = [{"role": "user", "content": "w9"}]


def save_tokenizer(folder: Path, size: int = 96, template: str | None = None, end: str = "<eos>") -> None:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *[f"w{i}" for i in range(3, size)]])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=end, unk_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """A function: (does what to the adapters' folders) -> a mixture of two adapters on a base with a tokenizer."""

    def make(*change: Callable[[Path], object]) -> Path:
        model = tiny_llama(num_hidden_layers=1, eos_token_id=1)
        model.save_pretrained(tmp_path / "base")
        save_tokenizer(tmp_path / "base")
        folders = [
            make_adapter(model, tmp_path / name, i, r=2, target_modules=["q_proj"]) for i, name in enumerate("ab")
        ]
        for folder, do in zip(folders, change, strict=False):
            do(folder)
        mix(tmp_path / "base", folders, tmp_path / "mixture", task="causal-lm")
        return tmp_path / "mixture"

    return make


def chatty(folder: Path) -> None:
    save_tokenizer(folder, template=TEMPLATE, end="w8")


def said_of(mixture: Path, out: Path, caplog: pytest.LogCaptureFixture, **options: str) -> str:
    """What an export logs, which its card says too."""
    caplog.clear()
    with caplog.at_level("INFO"):
        export(mixture, options.pop("format", "dense"), out, **options)
    text = " ".join(caplog.messages)
    if "adapter" in text:
        assert text in (out / "README.md").read_text()
    return text


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_a_tokenizer_on_which_adapters_agree_is_named_and_carried_on_request(
    made: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    mixture = made(chatty, chatty)
    said = said_of(mixture, tmp_path / "out", caplog, format=kind)
    assert "Beside adapter 'a', 'b' lies another tokenizer than the base's: its chat template, end token 'w8'" in said
    assert said.endswith("--tokenizer-from a carries it.")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    with pytest.warns(UserWarning, match=r"ends a text with 'w8' \(8\), the base's config says \[1"):
        export(mixture, kind, tmp_path / "theirs", tokenizer_from="a")
    got, own = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("theirs", "a"))
    assert got.eos_token == own.eos_token == "w8"
    assert got.apply_chat_template(TURN) == own.apply_chat_template(TURN)
    assert "--tokenizer-from a" in (tmp_path / "theirs" / "README.md").read_text()
    assert "Beside adapter" not in (tmp_path / "theirs" / "README.md").read_text()


def test_adapters_that_disagree_are_named_with_what_each_has(
    made: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = said_of(made(chatty, lambda f: save_tokenizer(f, template="w5")), tmp_path / "out", caplog)
    assert (
        "do not agree: of 'a' its chat template, end token 'w8' (the base's: '<eos>'); of 'b' its chat template."
        in said
    )
    assert said.endswith("--tokenizer-from NAME carries one of them.")


def test_of_equal_tokenizers_and_of_none_nothing_is_said(
    made: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def written_by_another_version(folder: Path) -> None:
        save_tokenizer(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left", "extra": 1}))

    assert said_of(made(written_by_another_version), tmp_path / "out", caplog) == ""


def test_a_generation_config_and_a_pooling_are_named(
    made: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def pooled(folder: Path) -> None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
        row = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        (folder / "modules.json").write_text(json.dumps([row]))
        transformers.GenerationConfig(eos_token_id=[1, 8]).save_pretrained(folder)

    said = said_of(made(pooled), tmp_path / "out", caplog)
    assert said == (
        "Left out of adapter 'a': generation_config.json, modules.json, 1_Pooling/config.json; to carry them, copy them from a into "
        "the base's folder and export again."
    )


def test_another_pooling_than_the_bases_is_named_and_the_same_is_not(
    made: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def pooled(mode: str, version: str, weights: bytes = b"w") -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            for name in ("1_Pooling", "2_Dense"):
                (folder / name).mkdir(parents=True)
            (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
            (folder / "2_Dense" / "model.safetensors").write_bytes(weights)
            rows = [
                {"path": path, "type": f"sentence_transformers.models.{path[2:]}"} for path in ("1_Pooling", "2_Dense")
            ]
            (folder / "modules.json").write_text(json.dumps(rows))
            (folder / "config_sentence_transformers.json").write_text(
                json.dumps({"__version__": version, "prompts": {}})
            )

        return change

    pooled("mean", "5.0")(tmp_path / "base")
    mixture = made(pooled("cls", "5.1"), pooled("mean", "5.2", b"v"))
    assert said_of(mixture, tmp_path / "out", caplog) == (
        "Left out of adapter 'a': 1_Pooling/config.json; to carry it, copy it from a into the base's folder and export again. "
        "Left out of adapter 'b': 2_Dense/model.safetensors; to carry it, copy it from b into the base's folder and export again."
    )


def test_a_config_that_ends_texts_otherwise_is_named(
    made: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def config(end: object) -> Callable[[Path], int]:
        return lambda folder: (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))

    assert said_of(made(config([1, 8]), config(1)), tmp_path / "out", caplog) == (
        "Beside adapter 'a' lies a config.json of eos_token_id [1, 8] (the base's: 1): to end texts so, set it in the base's "
        "generation_config.json and export again."
    )


def test_a_tokenizer_that_is_not_there_or_has_too_many_tokens_is_refused(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    mixture = made(lambda folder: save_tokenizer(folder, size=120))
    errors: list[tuple[str, type[WloraMergeError], str]] = [
        ("c", AdapterError, "--tokenizer-from c: expected one of a, b"),
        ("b", UnsupportedError, r"--tokenizer-from b: .*b has no tokenizer \(tokenizer_config.json\)"),
        ("a", AdapterError, "its tokenizer has a token 119, and its embeddings have 96 rows"),
    ]
    for name, error, said in errors:
        with pytest.raises(error, match=said):
            export(mixture, "dense", tmp_path / "out", tokenizer_from=name)
        assert not (tmp_path / "out").exists()
