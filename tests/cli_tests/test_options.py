"""Help by topic, for every option of every command."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support.commands import run
from support.paths import ROOT

from wlora_merge.cli.main import main
from wlora_merge.cli.options import OPTIONS
from wlora_merge.data.tasks import FIT_TASKS


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = "import sys; from wlora_merge.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'peft', 'numpy', 'jinja2', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout


@pytest.mark.parametrize("command", ["fit", "mix", "export", "verify", "run", "inspect"])
def test_every_option_of_every_command_has_help(command: str) -> None:
    for parameter in main.commands[command].params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), parameter.name
        assert parameter.name in {name for names in OPTIONS.values() for name in names}, parameter.name
    assert main.commands[command].help
    assert run(command, "--help").exit_code == 0


def test_help_describes_arguments_and_columns_under_fitting_headings() -> None:
    def sections(command: str) -> dict[str, str]:
        parts = re.split(r"^(\w[\w ]+):\n", run(command, "--help").output, flags=re.M)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    for command, metavar in {
        "export": "MIXTURE_DIR",
        "verify": "EXPORT_DIR",
        "run": "RECIPE",
        "inspect": "PATH...",
    }.items():
        assert re.search(rf"^  {re.escape(metavar)}\S*\s+\w+", sections(command)["Inputs"], flags=re.M)
    assert "--quantize" in sections("export")["Format"]
    assert "--quantize" in sections("fit")["How it is trained"]
    assert "--weights" in sections("mix")["How they are mixed"]
    readme = (ROOT / "README.md").read_text()
    for task in FIT_TASKS:
        text = ", or ".join(map(str, FIT_TASKS[task].forms))
        assert re.search(rf"^ +{task} +{re.escape(text)}$", run("fit", "--help").output, flags=re.M)
        assert f"| `{task}` | {text} |" in readme
    assert "..." not in run("--help").output.partition("Options:")[2]
