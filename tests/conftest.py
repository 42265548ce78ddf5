"""Tiny models from configs, PEFT adapters on them, and the real ones where they are to be had."""

from __future__ import annotations

import functools
import gc
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.paths import SHARED

if TYPE_CHECKING:  # pytest-xdist reads this file before it starts its workers, which import torch beside each other
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


SLOW = (
    "cli_tests/test_costs.py", "documents/test_schemas.py",
    "documents/test_quickstart.py", "documents/test_recipes.py", "documents/test_readme_blocks.py", "documents/test_bench_fit.py",
    "documents/test_help_examples.py", "documents/test_zoo.py",
    "exporters_tests/test_onnx_refold.py", "exporters_tests/test_report_pages.py", "features/test_architectures.py", "onnx_tests/",
    "test_distributed.py", "training_tests/", "trust/",
)  # fmt: skip
"""Files that trace graphs, start processes or train many times; `make test-fast` leaves them out."""


GRAPHS = (
    "onnx_tests/", "exporters_tests/", "documents/", "features/", "mixture_tests/test_told_task.py", "training_tests/test_fit.py",
)  # fmt: skip
TRACED = "test_trace_cache.py"
"""Tests that export to ONNX, and those of them that begin without a kept graph."""


def pytest_configure() -> None:
    """Imports make half a million objects that stay: the collector walks them neither while tests are collected nor later."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a fixture of a wider scope than a test does must not reach the user's own cache either."""
    os.environ["WLORA_MERGE_CACHE"] = str(_common_cache(tmp_path_factory))


def _common_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all processes of this run of the suite, so that models of one structure are traced once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common-cache"


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    """What costs much and no test looks at, once or never.

    PEFT writes a card with each adapter, and compiles its template each time. Transformers spells each config that it reads for a
    log that nobody sees. Layers draw numbers on the meta device, which keeps none. No test cuts the power, so that a file that lies
    in the system's cache is as good as one on the disk; processes that are killed keep their own fsync.
    """
    import jinja2
    import torch
    import transformers

    def only_with_numbers(reset: Callable[[torch.nn.Module], None]) -> Callable[[torch.nn.Module], None]:
        return lambda layer: None if layer.weight.is_meta else reset(layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.lru_cache(jinja2.Environment.compile))
        patch.setattr(os, "fsync", lambda file: None)
        for config in (transformers.PreTrainedConfig, transformers.GenerationConfig):
            patch.setattr(config, "__repr__", object.__repr__)
        for kind in (torch.nn.Linear, torch.nn.Embedding):
            patch.setattr(kind, "reset_parameters", only_with_numbers(kind.reset_parameters))
        yield


@pytest.fixture(scope="session")
def _signatures_read_once() -> Iterator[None]:
    """At each trace, onnxscript reads the signatures of its functions off their source texts: a tenth of a small trace."""
    try:
        values: Any = importlib.import_module("onnxscript.values")
    except ImportError:  # of the extra `onnx`, without which nothing is traced
        yield
        return
    read_once = property(functools.cache(values.TracedOnnxFunction.function_ir.fget))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values.TracedOnnxFunction, "function_ir", read_once)
        yield


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a test leaves in the cache is forgotten after it, but for graphs of those tests of ONNX that are not about tracing."""
    path = request.path.relative_to(Path(__file__).parent).as_posix()
    if path.startswith(GRAPHS):
        request.getfixturevalue("_signatures_read_once")
    shares = path.startswith(GRAPHS) and not path.endswith(TRACED)
    folder = _common_cache(tmp_path_factory) if shares else tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("WLORA_MERGE_CACHE", str(folder))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "zoo").is_dir():
        pytest.skip(f"{SHARED} with the real data and adapters is not here")
    return SHARED


@pytest.fixture(scope="session")
def real_models() -> Path:
    folder = Path(os.environ.get("WLORA_MERGE_REAL_MODELS", Path.home() / ".cache" / "wlora_merge" / "real-models"))
    for name in ("minilm", "smollm2"):
        if not (folder / name / "model.safetensors").is_file():
            pytest.skip(f"{folder / name} is not here: make real-models fetches it")
    return folder


@pytest.fixture(scope="session")
def llama_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Path]]]:
    """A function: dtype -> (a tiny Llama's folder, three adapters that differ in rank, alpha, rsLoRA, patterns, targets)."""
    import torch
    from support.models import MIXED, make_adapter, tiny_llama

    made: dict[torch.dtype, tuple[Path, list[Path]]] = {}

    def make(dtype: torch.dtype = torch.float32) -> tuple[Path, list[Path]]:
        if dtype not in made:
            root = tmp_path_factory.mktemp("llama")
            model = tiny_llama(dtype)
            model.save_pretrained(root / "base")
            folders = [
                make_adapter(model.float(), root / f"a{i}", i, dtype=dtype if i else torch.float32, **config)
                for i, config in enumerate(MIXED)
            ]
            made[dtype] = (root / "base", folders)
        return made[dtype]

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """One ONNX export of each tiny model for the whole session, an `onnx_models.Exported`."""
    from support.onnx_models import Exported, export_once

    done: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in done:
            done[name] = export_once(name, tmp_path_factory.mktemp(name))
        return done[name]

    return get
