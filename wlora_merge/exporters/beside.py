"""What lies beside adapters and is not the base's: a tokenizer, its chat template and end token, a generation config, a pooling.

An export carries the base's own files, or with `--tokenizer-from` an adapter's tokenizer; of the rest it says that it was left out.
It knows names of files and their keys. It knows no weights.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.tokenizers import tokenizer_files, warn_of_end
from ..errors import AdapterError, WloraMergeError
from ..io.untrusted import find_file, read_bytes, read_json
from ..mixture.inputs import Inputs
from ..models.files import CHAT_TEMPLATES, GENERATION, MODULES, carried_files
from ..text import short

CONFIG = "config.json"
TOKENS = {
    "eos_token": "end token",
    "bos_token": "start token",
    "pad_token": "padding token",
    "unk_token": "unknown token",
}
"""Keys of a tokenizer's config that change what a model is given or where it stops."""
OTHERS = (
    GENERATION, "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
"""Files beside the tokenizer's that change what is computed of a text or an image, and where a text ends."""
VERSIONS = ("transformers_version", "__version__")


def take_tokenizer(inputs: Inputs, name: str | None) -> None:
    """Let the base carry the tokenizer of adapter `name` in place of its own; None changes nothing.

    Raises:
        AdapterError: no adapter has that name, or its tokenizer has tokens that the model has no embedding for.
        UnsupportedError: it has no tokenizer.
    """
    if name is None:
        return
    adapter = next((a for a in inputs.adapters if a.name == name), None)
    if adapter is None:
        raise AdapterError(f"--tokenizer-from {name}: expected one of {', '.join(a.name for a in inputs.adapters)}.")
    inputs.base.tokenizer = tokenizer_files(adapter, _vocabulary_rows(inputs), "--tokenizer-from")
    warn_of_end(inputs.base)


def left_out(inputs: Inputs) -> str:
    """What lies beside the adapters, differs from what the export has, and is left out, in sentences; empty where nothing is."""
    carried = {str(name): path for name, path in inputs.base.carried_files().items()}
    own = _tokenizer_facts(carried)
    others = {a.name: _differing(_tokenizer_facts(_files_of(a)), own) for a in inputs.adapters}
    whose = f"that of adapter {resized!r}" if (resized := inputs.mixture.resize_vocab) else "the base's"
    lines = [_tokenizers_line({name: facts for name, facts in others.items() if facts}, own, whose)]
    for adapter in inputs.adapters:
        lines += [_others_line(adapter, carried), _end_line(adapter, inputs.base.config)]
    return " ".join(filter(None, lines))


def _vocabulary_rows(inputs: Inputs) -> int | None:
    """Rows of the model's embedding as its config says; None where it does not say."""
    config = {**inputs.base.config, **inputs.mixture.config}
    tables = [config, *(value for value in config.values() if isinstance(value, dict))]
    return next((table["vocab_size"] for table in tables if isinstance(table.get("vocab_size"), int)), None)


def _files_of(adapter: Adapter) -> dict[str, Path]:
    """Name -> path of what lies beside an adapter, and could be carried."""
    try:
        return {str(name): adapter.source.folder / name for name in carried_files(adapter.source.folder)}
    except WloraMergeError:
        return {}  # it is not carried, so that its faults are nobody's


def _tokenizer_facts(files: Mapping[str, Path]) -> dict[str, str]:
    """What tells two tokenizers apart: chat template, special tokens, and its vocabulary where it is here."""
    config = _json_of(files.get("tokenizer_config.json"))
    special = _json_of(files.get("special_tokens_map.json"))
    facts = {what: _content_of(config.get(key, special.get(key))) for key, what in TOKENS.items()}
    template = config.get("chat_template") or _json_of(files.get("chat_template.json")).get("chat_template")
    if "chat_template.jinja" in files:
        template = read_bytes(files["chat_template.jinja"], AdapterError).decode("utf-8", errors="replace")
    facts["chat template"] = json.dumps(template) if template else ""
    tokenizer = _json_of(files.get("tokenizer.json"))
    vocabulary = tokenizer.get("model", {}).get("vocab") if isinstance(tokenizer.get("model"), dict) else None
    if isinstance(vocabulary, dict):  # in which a special token may stand twice
        rows = [row for row in tokenizer.get("added_tokens") or [] if isinstance(row, dict)]
        vocabulary = vocabulary | {str(row.get("content")): row.get("id") for row in rows}
    facts["vocabulary"] = json.dumps(vocabulary, sort_keys=True) if vocabulary else ""
    return {what: value for what, value in facts.items() if value}


def _content_of(token: Any) -> str:
    """A token as a tokenizer's config has it: text, or a table with its content."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _json_of(file: Path | None) -> dict[str, Any]:
    """A JSON file's table; empty where there is none, or it cannot be read as one."""
    try:
        return read_json(file, AdapterError) if file is not None else {}
    except WloraMergeError:
        return {}


def _differing(facts: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    return {what: value for what, value in facts.items() if value != own.get(what)}


def _tokenizers_line(others: Mapping[str, Mapping[str, str]], own: Mapping[str, str], whose: str) -> str:
    """Which adapters have another tokenizer than the export."""
    if not others:
        return ""
    first, *rest = others.values()
    instead = f"The export has {whose}" if own else "The export has none, as the base has none"
    if all(facts == first for facts in rest):
        names, what = ", ".join(map(repr, others)), _said(first, own)
        return (
            f"Beside adapter {names} lies another tokenizer than {whose}: {what}. {instead}: "
            f"--tokenizer-from {next(iter(others))} carries it."
        )
    what = "; ".join(f"of {name!r} {_said(facts, own)}" for name, facts in others.items())
    return (
        f"Beside the adapters lie other tokenizers than {whose}, which do not agree: {what}. {instead}: "
        "--tokenizer-from NAME carries one of them."
    )


def _said(facts: Mapping[str, str], own: Mapping[str, str]) -> str:
    """The differences in words; of tokens the values."""
    tokens = set(TOKENS.values())
    return ", ".join(
        f"{what} {value!r} (the base's: {own.get(what)!r})" if what in tokens else f"its {what}"
        for what, value in sorted(facts.items())
    )


def _others_line(adapter: Adapter, carried: Mapping[str, Path]) -> str:
    """Which other files beside an adapter are left out, and what brings them in."""
    found = _files_of(adapter)
    if (modules := find_file(adapter.source.folder, MODULES, AdapterError)) is not None:
        found[MODULES] = modules
    told = [*OTHERS, MODULES, *(name for name in found if "/" in name and not name.startswith(CHAT_TEMPLATES))]
    left = [name for name in told if name in found and not _have_same_content(found[name], carried.get(name))]
    if not left:
        return ""
    return (
        f"Left out of adapter {adapter.name!r}: {', '.join(left)}; to carry {'it' if len(left) == 1 else 'them'}, copy "
        f"{'it' if len(left) == 1 else 'them'} from {adapter.source.name} into the base's folder and export again."
    )


def _end_line(adapter: Adapter, base: Mapping[str, Any]) -> str:
    """That a config beside an adapter ends a text with another token, where no generation config says so."""
    told, own = (
        _json_of(find_file(adapter.source.folder, CONFIG, AdapterError)).get("eos_token_id"),
        base.get("eos_token_id"),
    )
    if told is None or told == own or GENERATION in _files_of(adapter):
        return ""
    return (
        f"Beside adapter {adapter.name!r} lies a {CONFIG} of eos_token_id {short(told)} (the base's: {short(own)}): "
        f"to end texts so, set it in the base's {GENERATION} and export again."
    )


def _have_same_content(one: Path | None, other: Path | None) -> bool:
    """Whether two files say the same; of JSON, but for the version that wrote them."""
    if one is None or other is None:
        return False
    if one.suffix != ".json":
        return filecmp.cmp(one, other, shallow=False)
    bytes_of = [read_bytes(file, AdapterError) for file in (one, other)]
    tables = [{k: v for k, v in _json_of(file).items() if k not in VERSIONS} for file in (one, other)]
    return bytes_of[0] == bytes_of[1] or (bool(tables[0]) and tables[0] == tables[1])
