"""recipes/servers: which programs it asks, which code of a card it runs, and how answers are compared."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.cards import card, mixture
from support.paths import ROOT

from wlora_merge.exporters.serving import SERVERS

HERE = ROOT / "recipes" / "servers"


@pytest.fixture(scope="module")
def servers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("servers_main", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["servers_main"] = module
    sys.path[:0] = [str(HERE), str(HERE / "ask")]
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[:2]
    return module


def test_every_program_of_the_table_is_asked_but_the_one_in_a_container(servers: ModuleType) -> None:
    titles = {ask.title.removesuffix(" in Chromium") for ask in servers._asks()}
    assert titles == {server.title for server in SERVERS.values() if server.version}


def test_every_program_has_its_packages_and_its_script(servers: ModuleType) -> None:
    for ask in servers._asks():
        kind = "json" if ask.program == servers.NODE else "txt"
        wanted = (HERE / "requirements" / f"{ask.program}.{kind}").read_text()
        assert "==" in wanted or ask.program == servers.NODE
        assert (HERE / "ask" / (ask.script or servers.SCRIPTS[ask.program])).is_file()


def test_the_versions_of_the_table_are_those_of_the_environments() -> None:
    files = [*(HERE / "requirements").iterdir(), ROOT / "constraints.txt"]
    pinned = "\n".join(file.read_text() for file in files)
    for server in SERVERS.values():
        for version in server.version.split(" and "):
            assert version in pinned, (server.name, version)


def test_the_code_of_a_program_is_its_part_of_the_card(servers: ModuleType, tmp_path: Path) -> None:
    card(tmp_path, mixture(), base_name="smollm2")
    (vllm,) = servers.snippets(tmp_path, "vLLM", "/here/smollm2")
    assert vllm == f"vllm serve {tmp_path}"
    convert, load = servers.snippets(tmp_path, "CTranslate2", "/here/smollm2")
    assert convert.startswith("ct2-transformers-converter")
    assert load == 'import ctranslate2\nmodel = ctranslate2.Generator("model-ct2")'
    (command,) = servers.snippets(tmp_path, "lm-evaluation-harness", "/here/smollm2")
    assert f"pretrained={tmp_path}" in command
    with pytest.raises(SystemExit, match="no part for PEFT"):
        servers.snippets(tmp_path, "PEFT", "/here/smollm2")


@pytest.mark.parametrize(
    ("got", "wanted", "most", "off", "agrees"),
    [
        (["a ", "b"], ["a", "c"], 0, "1 of 2 texts", False),
        (["a", "b"], ["a", "c"], 1, "1 of 2 texts", True),
        ([{"x": 0.25, "y": 0.75}], [{"y": 0.5, "x": 0.5}], 0.3, "2.5e-01", True),
        ([[1.0, 2.0]], [[1.0, 2.5]], 0.1, "5.0e-01", False),
    ],
)
def test_answers_are_compared(
    servers: ModuleType, got: list[object], wanted: list[object], most: float, off: str, agrees: bool
) -> None:
    assert servers.compared(got, wanted, most) == (off, agrees)
