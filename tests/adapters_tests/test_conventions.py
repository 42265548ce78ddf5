"""Adapters as other trainers write them, against their own formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import GATED, LM, TEXT, Case
from support.experts import CASES, EXPERTS, LOCAL
from support.models import make_adapter, peft_changes

from wlora_merge.adapters.adapter import load_adapter
from wlora_merge.adapters.conventions import other_names
from wlora_merge.errors import AdapterError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix

H, INNER, E, R = 16, 24, 4, 2
GPT_OSS = Case(LM, "GptOssConfig", TEXT | GATED | LOCAL | {"num_hidden_layers": 1}, ("q_proj", "o_proj"))
QWEN = CASES["qwen2_moe"]
AT = "model.layers.0.mlp.experts"


def write(folder: Path, factors: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], **config: Any) -> Path:
    """An adapter with random factors of these shapes: target module -> (lora_A, lora_B)."""
    torch.manual_seed(3)
    pairs = [
        (f"base_model.model.{k}.lora_{x}.weight", s)
        for k, both in factors.items()
        for x, s in zip("AB", both, strict=True)
    ]
    folder.mkdir()
    save_file({key: torch.randn(shape) * 0.3 for key, shape in pairs}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def factors_of(folder: Path, module: str) -> list[np.ndarray]:
    """lora_A and 3 · lora_B of a module, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    lora_A, lora_B = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double().numpy() for x in "AB")
    return [lora_A, 3 * lora_B]


def changes(case: Case, base: Path, adapters: list[Path], out: Path, weights: list[float]) -> dict[str, np.ndarray]:
    """What a fold adds to each tensor of the model, as transformers loads it."""
    export(mix(base, adapters, weights=weights), "dense", out)
    before, after = (case.load(folder, torch.float32).double().state_dict() for folder in (base, out))
    return {k: (after[k] - before[k]).numpy() for k in before if not torch.equal(before[k], after[k])}


def saved(case: Case, folder: Path) -> Path:
    case.make().save_pretrained(folder)
    return folder


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-6)


UNSLOTH = {
    **{f"{AT}.gate_up_projs.{e}": ((R, H), (2 * INNER, R)) for e in range(E)},
    **{f"{AT}.down_projs.{e}": ((R, INNER), (H, R)) for e in range(E)},
    "model.layers.0.mlp.router.linear": ((R, H), (E, R)),
}


@pytest.mark.filterwarnings("ignore")
def test_a_linear_for_each_expert_folds_into_gpt_oss_as_unsloth_splits_it(tmp_path: Path) -> None:
    base, folder = saved(GPT_OSS, tmp_path / "base"), write(tmp_path / "unsloth", UNSLOTH)
    got = changes(GPT_OSS, base, [folder], tmp_path / "out", [1.0])
    assert set(got) == {f"{AT}.gate_up_proj", f"{AT}.down_proj", "model.layers.0.mlp.router.weight"}
    for e in range(E):
        for name in ("gate_up_proj", "down_proj"):  # a linear's weight is the transpose of the expert's matrix
            lora_A, lora_B = factors_of(folder, f"{AT}.{name}s.{e}")
            close(got[f"{AT}.{name}"][e], (lora_B @ lora_A).T)
    lora_A, lora_B = factors_of(folder, "model.layers.0.mlp.router.linear")
    close(got["model.layers.0.mlp.router.weight"], lora_B @ lora_A)
    assert verify(tmp_path / "out")


def tinker(shared: bool) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Factors of all experts; those on the side of the hidden size are one for all where `shared`."""
    one = 1 if shared else E
    return {
        f"{AT}.w1": ((one, R, H), (E, INNER, R)),
        f"{AT}.w3": ((one, R, H), (E, INNER, R)),
        f"{AT}.w2": ((E, R, INNER), (one, H, R)),
        "model.unembed_tokens": ((R, H), (40, R)),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe", "mixtral"])
def test_tinkers_experts_fold_as_its_own_merge_computes_them(name: str, shared: bool, tmp_path: Path) -> None:
    case = {"gpt_oss": GPT_OSS, "qwen2_moe": QWEN, "mixtral": CASES["mixtral"]}[name]
    model = case.make().float()
    model.save_pretrained(tmp_path / "base")
    inner = model.model.layers[0].mlp.experts.down_proj.shape[1 if name == "gpt_oss" else 2]
    shapes = {
        k: tuple(tuple(inner if n == INNER else n for n in s) for s in both) for k, both in tinker(shared).items()
    }
    if name == "gpt_oss":
        shapes["model.layers.0.attn.q_proj"] = ((R, H), (16, R))
    folder = write(tmp_path / "tinker", shapes)  # type: ignore[arg-type]
    got = changes(case, tmp_path / "base", [folder], tmp_path / "out", [0.5])
    delta = {}
    for matrix in ("w1", "w2", "w3"):
        lora_A, lora_B = factors_of(folder, f"{AT}.{matrix}")
        delta[matrix] = (
            0.5 * np.broadcast_to(lora_B, (E, *lora_B.shape[1:])) @ np.broadcast_to(lora_A, (E, *lora_A.shape[1:]))
        )
    if name == "gpt_oss":  # gate and up alternate, and each matrix is [in, out]
        gate_up = np.stack([delta["w1"], delta["w3"]], axis=2).reshape(E, 2 * inner, H).transpose(0, 2, 1)
        delta["w2"] = delta["w2"].transpose(0, 2, 1)
        lora_A, lora_B = factors_of(folder, "model.layers.0.attn.q_proj")
        close(got.pop("model.layers.0.self_attn.q_proj.weight"), 0.5 * lora_B @ lora_A)
    else:
        gate_up = np.concatenate([delta["w1"], delta["w3"]], axis=1)
    close(got.pop(f"{AT}.gate_up_proj"), gate_up)
    close(got.pop(f"{AT}.down_proj"), delta["w2"])
    lora_A, lora_B = factors_of(folder, "model.unembed_tokens")
    close(got.pop("lm_head.weight"), 0.5 * lora_B @ lora_A)
    assert not got


@pytest.mark.filterwarnings("ignore")
def test_other_trainers_adapters_mix_with_pefts_own(tmp_path: Path) -> None:
    model = GPT_OSS.make()
    model.save_pretrained(tmp_path / "base")
    peft = make_adapter(model, tmp_path / "peft", 1, r=3, target_modules=["q_proj"], target_parameters=EXPERTS)
    own = peft_changes(model, peft)[f"{AT}.gate_up_proj"].double().numpy()
    adapters = [write(tmp_path / "unsloth", UNSLOTH), write(tmp_path / "tinker", tinker(True)), peft]
    got = changes(GPT_OSS, tmp_path / "base", adapters, tmp_path / "out", [0.5, 0.25, 0.125])[f"{AT}.gate_up_proj"]
    (a1, b1), (a3, b3) = (factors_of(adapters[1], f"{AT}.{m}") for m in ("w1", "w3"))
    for e in range(E):
        lora_A, lora_B = factors_of(adapters[0], f"{AT}.gate_up_projs.{e}")
        expected = 0.5 * (lora_B @ lora_A).T + 0.125 * own[e]
        expected[:, 0::2] += 0.25 * (b1[e] @ a1[0]).T
        expected[:, 1::2] += 0.25 * (b3[e] @ a3[0]).T
        close(got[e], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("factors", "kind", "what"),
    [
        ({f"{AT}.w1": ((3, R, H), (E, INNER, R))}, AdapterError, "of different numbers of experts"),
        ({f"{AT}.w1": ((1, R, H), (1, INNER, R))}, AdapterError, "of different numbers of experts"),
        ({f"{AT}.w3": ((1, R, 0), (E, 0, R))}, UnsupportedError, "Tinker's convention, and its factors are empty"),
        ({f"{AT}.gate_up_projs.0": ((R, H), (INNER, R))}, AdapterError, r"'.*gate_up_projs\.0'.*do not fit an expert"),
        ({f"{AT}.down_projs.9": ((R, INNER), (H, R))}, AdapterError, r"down_projs\.9' is not in the base model"),
        ({f"{AT}.w1": ((1, R, H), (E + 1, INNER, R))}, AdapterError, r"experts\.4\.gate_proj' is not in the base model"),
        (
            {f"{AT}.w1": ((1, R, H), (E, INNER, R)), f"{AT}.0.gate_proj": ((R, H), (INNER, R))},
            AdapterError,
            r"holds the factors of '.*experts\.0\.gate_proj', which the file has already",
        ),
        (
            {f"{AT}.w1": ((1, R, H), (E, INNER, R)), f"{AT}.gate_up_projs.0": ((R, H), (2 * INNER, R))},
            AdapterError,
            "two of its target modules are",
        ),
    ],
)  # fmt: skip
def test_other_trainers_factors_that_do_not_fit_are_one_sentence(
    factors: Any, kind: Any, what: str, tmp_path: Path
) -> None:
    base, folder = saved(GPT_OSS, tmp_path / "base"), write(tmp_path / "other", factors)
    with pytest.raises(kind, match=what):
        mix(base, [folder], weights=[1.0])


@pytest.mark.filterwarnings("ignore")
def test_an_experts_linear_of_a_class_that_does_not_say_how_it_lies_is_refused(tmp_path: Path) -> None:
    base = saved(CASES["llama4"], tmp_path / "base")
    at, half = (
        "model.layers.1.feed_forward.experts.0",
        CASES["llama4"].make().model.layers[1].feed_forward.experts.expert_dim,
    )
    folder = write(tmp_path / "other", {f"{at}.gate_proj": ((R, H), (half, R))})
    with pytest.raises(UnsupportedError, match=r"experts\.0\.gate_proj'.*Llama4TextExperts.*does not say how"):
        mix(base, [folder], weights=[1.0])


def test_an_adapter_of_mlx_lm_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "num_layers": 1}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(8, 2)}, folder / "adapters.safetensors")
    with pytest.raises(UnsupportedError, match="mlx-lm convention: convert it to PEFT's"):
        load_adapter(folder)


def test_names_that_peft_gives_too_have_no_other() -> None:
    for name in ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.router", "attn.q_proj"):
        assert not list(other_names(name))
