"""A PEFT folder -> Adapter: everything in it is read or refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_adapter, tiny_llama

from wlora_merge.adapters.adapter import load_adapter, load_adapters, split_adapter_spec
from wlora_merge.errors import AdapterError, UnsupportedError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(r: int = 2, key: str = Q) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{key}.lora_A.weight": torch.randn(r, 8), f"{key}.lora_B.weight": torch.randn(6, r)}


def write(folder: Path, found: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors() if found is None else found, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, kind: type[WloraMergeError] = AdapterError, **options: Any) -> str:
    with pytest.raises(kind) as error:
        load_adapter(folder, **options).check_numbers()
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert message.endswith(".")
    return message


# ------------------------------------------------------------------------------------------------- what is read


def test_an_adapter_is_read_with_its_factors_scalings_and_digest(llama_zoo: Callable[..., Any]) -> None:
    _, folders = llama_zoo()
    adapter = load_adapter(folders[2])
    file = load_file(folders[2] / "adapter_model.safetensors")
    assert adapter.name == "a2"
    assert 2 * len(adapter.modules) == len(file)
    assert not adapter.tensors
    for module, factors in adapter.modules.items():
        assert torch.equal(factors.lora_A, file[f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(factors.lora_B, file[f"base_model.model.{module}.lora_B.weight"])
    layer0, layer1 = (f"model.layers.{i}.self_attn" for i in range(2))
    assert adapter.modules[f"{layer0}.q_proj"].scaling == 12 / 2  # by rank_pattern
    assert adapter.modules[f"{layer1}.q_proj"].scaling == 12 / 4
    assert adapter.modules[f"{layer1}.k_proj"].scaling == 3 / 4  # by alpha_pattern


def test_scalings_are_those_of_peft(llama_zoo: Callable[..., Any]) -> None:
    from peft import PeftModel

    _, folders = llama_zoo()
    for folder in folders:
        adapter = load_adapter(folder)
        peft = PeftModel.from_pretrained(tiny_llama(), folder)
        for name, module in peft.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                assert adapter.modules[name].scaling == module.scaling["default"]


def test_rslora_divides_by_the_square_root(tmp_path: Path) -> None:
    (factors,) = load_adapter(write(tmp_path / "a", use_rslora=True)).modules.values()
    assert factors.scaling == 4 / math.sqrt(2)


def test_keys_with_the_adapters_name_inside_are_read_as_older_peft_wrote_them(tmp_path: Path) -> None:
    old = {k.replace(".weight", ".default.weight"): v for k, v in tensors().items()}
    ours, theirs = load_adapter(write(tmp_path / "a", old)), load_adapter(write(tmp_path / "b"))
    assert list(ours.modules) == list(theirs.modules) == ["model.layers.0.self_attn.q_proj"]


def test_keys_without_the_prefix_of_peft_are_read(tmp_path: Path) -> None:
    bare = {k.removeprefix("base_model.model."): v for k, v in tensors().items()}
    assert list(load_adapter(write(tmp_path / "a", bare)).modules) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    "spell",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.removeprefix("base_model.model.model."),  # trained on a model without a head
        lambda key: "_orig_mod." + key,
        lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module."),
    ],
)
def test_an_adapter_folds_the_same_whatever_prefix_its_keys_have(
    llama_zoo: Callable[..., Any], tmp_path: Path, spell: Callable[[str], str]
) -> None:
    base, folders = llama_zoo()
    shutil.copytree(folders[1], tmp_path / "a1")
    found = {spell(key): t for key, t in load_file(folders[1] / "adapter_model.safetensors").items()}
    save_file(found, tmp_path / "a1" / "adapter_model.safetensors")
    export(mix(base, folders[1:2]), "dense", tmp_path / "plain")
    export(mix(base, [tmp_path / "a1"]), "dense", tmp_path / "spelled")
    name = "model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "spelled" / name).read_bytes()
    assert (tmp_path / "plain" / name).read_bytes() != (base / name).read_bytes()


def test_a_saved_head_is_a_whole_tensor(tmp_path: Path) -> None:
    head = {"base_model.model.classifier.weight": torch.ones(3, 8), "base_model.model.classifier.bias": torch.ones(3)}
    adapter = load_adapter(write(tmp_path / "a", tensors() | head, modules_to_save=["classifier"]))
    assert set(adapter.tensors) == {"classifier.weight", "classifier.bias"}


# ----------------------------------------------------------------------------------------------- what is refused


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none", WloraMergeError)


def test_a_folder_without_a_config_or_without_weights_is_refused(tmp_path: Path) -> None:
    assert "has no adapter_config.json" in refused(tmp_path, name="a")
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refused(tmp_path, name="a")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "pickle (adapter_model.bin)" in refused(tmp_path, name="a")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "3", '"LORA"', "[" * 100_000, "\ufffe"])
def test_a_config_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode())
    assert "adapter_config.json" in refused(tmp_path, name="a")


def test_another_kind_of_adapter_written_by_peft_is_refused_by_its_kind(tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    assert "'IA3'" in refused(tmp_path, name="a")


@pytest.mark.parametrize(
    ("feature", "config"),
    [
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
    ],
)
def test_a_feature_that_peft_writes_and_that_is_not_folded_is_refused_by_name(
    tmp_path: Path, feature: str, config: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(r=2, target_modules=["q_proj"], **config))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    peft.save_pretrained(tmp_path)
    assert feature in refused(tmp_path, UnsupportedError, name="a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_number_that_is_not_finite_is_refused_and_its_tensor_named(tmp_path: Path, value: float, part: str) -> None:
    found = tensors()
    found[f"{Q}.{part}.weight"][1, 1] = value
    message = refused(write(tmp_path, found), name="a")
    assert f"{Q}.{part}.weight" in message
    assert "NaN or an infinity" in message


def test_a_nan_in_a_saved_head_is_refused(tmp_path: Path) -> None:
    head = {"base_model.model.classifier.weight": torch.full((3, 8), float("nan"))}
    assert "classifier.weight" in refused(write(tmp_path, tensors() | head), name="a")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_a_tensor_that_holds_no_plain_floating_point_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    found = {k: v.to(dtype) for k, v in tensors().items()}
    assert "expected one of F16, BF16, F32, F64" in refused(write(tmp_path, found), UnsupportedError, name="a")


@pytest.mark.parametrize(
    ("A", "B", "what"),
    [
        ((2, 8), (6, 3), "do not multiply"),
        ((8,), (6, 2), "do not multiply"),
        ((2, 8), (6,), "do not multiply"),
        ((0, 8), (6, 0), "do not multiply"),
        ((2, 0), (6, 2), "do not multiply"),
        ((3, 8), (6, 3), "has rank 3 in the file, and 2 by the config"),
    ],
)
def test_shapes_that_make_no_product_or_another_rank_are_refused(
    tmp_path: Path, A: tuple[int, ...], B: tuple[int, ...], what: str
) -> None:
    found = {f"{Q}.lora_A.weight": torch.ones(A), f"{Q}.lora_B.weight": torch.ones(B)}
    message = refused(write(tmp_path, found), name="a")
    assert what in message
    assert "model.layers.0.self_attn.q_proj" in message


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(tmp_path: Path, part: str) -> None:
    key = f"{Q}.{part}.weight"
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}[part]
    assert f"lacks {other}" in refused(write(tmp_path, {key: tensors()[key]}), name="a")


@pytest.mark.parametrize("extra", ["lora_magnitude_vector", "lora_B.bias", "lora_embedding_A"])
def test_a_part_of_which_the_config_says_nothing_is_refused(tmp_path: Path, extra: str) -> None:
    message = refused(write(tmp_path, tensors() | {f"{Q}.{extra}": torch.ones(6, 2)}), name="a")
    assert "lora_" in message


def test_two_tensors_for_one_thing_are_refused(tmp_path: Path) -> None:
    twice = tensors() | {f"{Q}.lora_A.default.weight": torch.ones(2, 8)}
    assert "names the same thing" in refused(write(tmp_path, twice), name="a")


@pytest.mark.parametrize(
    ("key", "convention"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "kohya"),
        ("unet.down_blocks.0.to_q.lora_A.weight", "Diffusers"),
        ("base_model.model.x.ia3_l", "no part of a LoRA"),
    ],
)
def test_files_of_other_tools_are_refused_by_name(tmp_path: Path, key: str, convention: str) -> None:
    assert convention in refused(write(tmp_path, {key: torch.ones(2, 2)}), UnsupportedError, name="a")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "holds no LoRA tensor" in refused(write(tmp_path, {}), name="a")


def test_an_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "every delta weight is zero" in refused(tmp_path, name="a")


def test_deltas_are_zero_too_where_no_rank_has_both_factors_or_alpha_is_zero(tmp_path: Path) -> None:
    found = {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(6, 2)}
    found[f"{Q}.lora_A.weight"][0], found[f"{Q}.lora_B.weight"][:, 1] = 0, 0
    assert "every delta weight is zero" in refused(write(tmp_path / "a", found))
    assert "every delta weight is zero" in refused(write(tmp_path / "b", lora_alpha=0))
    head = {"base_model.model.classifier.weight": torch.ones(3, 8)}
    assert "every delta weight is zero" in refused(write(tmp_path / "c", found | head))


def test_a_broken_weights_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "not a sound safetensors file" in refused(tmp_path, WloraMergeError, name="a")


def test_a_broken_pattern_is_refused(tmp_path: Path) -> None:
    assert "pattern '('" in refused(write(tmp_path, rank_pattern={"(": 2}), name="a")


# ------------------------------------------------------------------------------------------------------- several


@pytest.mark.parametrize(
    ("spec", "name", "path"),
    [
        ("a=x/y", "a", "x/y"),
        ("x/y", None, "x/y"),
        ("x/y=z", None, "x/y=z"),
        ("a=b=c", "a", "b=c"),
        ("org/n", None, "org/n"),
    ],
)
def test_a_spec_is_a_path_with_or_without_a_name(spec: str, name: str | None, path: str) -> None:
    assert split_adapter_spec(spec) == (name, path)


def test_a_path_that_exists_is_a_path_though_it_holds_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "lr=0.1")
    assert split_adapter_spec("lr=0.1") == (None, "lr=0.1")
    with pytest.raises(AdapterError, match="set it with NAME=PATH"):
        load_adapters(["lr=0.1"])
    assert load_adapters(["a=lr=0.1"])[0].name == "a"


@pytest.mark.filterwarnings("ignore:adapters .* are the same")
def test_adapters_are_named_by_folder_by_spec_or_by_pair(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / name)
    found = load_adapters(iter([tmp_path / "a", f"x={tmp_path / 'b'}", ("y", tmp_path / "c")]))
    assert [a.name for a in found] == ["a", "x", "y"]


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "1" / "a")
    write(tmp_path / "2" / "a")
    with pytest.raises(AdapterError, match="two adapters are called 'a'"):
        load_adapters([tmp_path / "1" / "a", tmp_path / "2" / "a"])


def test_the_base_is_the_residual_of_the_adapter_that_is_named_and_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", init_lora_weights="pissa")
    write(tmp_path / "b", init_lora_weights="olora")
    assert load_adapters([tmp_path / "a"], residual="a")[0].name == "a"
    with pytest.raises(UnsupportedError, match="'olora'"):
        load_adapters([tmp_path / "a", tmp_path / "b"], residual="a")
    with pytest.raises(AdapterError, match="--base-is-residual x: no adapter has that name; there are c"):
        load_adapters([write(tmp_path / "c")], residual="x")
    monkeypatch.chdir(tmp_path / "a")
    assert load_adapters(["."], residual="a")[0].name == "a"


def test_adapters_in_half_precision_keep_their_dtype(tmp_path: Path) -> None:
    make_adapter(tiny_llama(), tmp_path / "a", 1, dtype=torch.bfloat16, r=2, target_modules=["q_proj"])
    assert all(f.lora_A.dtype is torch.bfloat16 for f in load_adapter(tmp_path / "a").modules.values())


def test_an_adapter_that_peft_saved_under_a_name_is_found(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="mytask"
    )
    model.save_pretrained(tmp_path / "run")
    found = load_adapter(tmp_path / "run")
    assert (found.name, found.source.folder) == ("mytask", tmp_path / "run" / "mytask")
    assert load_adapter(tmp_path / "run", "other").name == "other"
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(AdapterError, match=r"2 adapters \(mytask, second\): give .*mytask, or another"):
        load_adapter(tmp_path / "run")
