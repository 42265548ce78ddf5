"""The JSON schemas of the files that others may read, from the records that read them.

python -m wlora_merge.cli.file_schemas writes them into `schemas`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..constants import MANIFEST_FILE, MIXTURE_FILE
from ..exporters.manifest import Manifest
from ..io.records import Record
from ..mixture.record import MixtureRecord


def file_schemas() -> dict[str, dict[str, Any]]:
    """Name of the schema's file -> the schema of `mixture.json` and of `wlora_merge.json`."""
    records: dict[str, type[Record]] = {MIXTURE_FILE: MixtureRecord, MANIFEST_FILE: Manifest}
    return {
        f"{Path(file).stem}.schema.json": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **record.model_json_schema(),
            "title": file,
        }
        for file, record in records.items()
    }


if __name__ == "__main__":
    for name, schema in file_schemas().items():
        text = json.dumps(schema, indent=2) + "\n"
        Path(__file__).with_name("schemas").joinpath(name).write_text(text, encoding="utf-8")
