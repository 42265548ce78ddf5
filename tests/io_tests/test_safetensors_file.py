"""The safetensors header: exact bytes, hostile bytes, and the library's own reader and writer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wlora_merge.errors import UnsupportedError, WloraMergeError
from wlora_merge.io import safetensors_file as checkpoint
from wlora_merge.io.safetensors_file import (
    BITS,
    TORCH_NAMES,
    build_header,
    byte_length,
    read_header,
    read_rows,
    read_tensor,
    safetensors_dtype,
    torch_dtype,
)


def write(file: Path, table: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def row(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_build_header_gives_these_bytes() -> None:
    header = build_header({"b": ("F16", (2, 3)), "a": ("BF16", ())}, {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"BF16","shape":[],"data_offsets":[12,14]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert header == len(padded).to_bytes(8, "little") + padded
    assert len(header) % 8 == 0


def test_an_empty_header_has_no_metadata() -> None:
    assert build_header({}, {}) == b"\x08\0\0\0\0\0\0\0{}      "


def test_the_library_reads_what_build_header_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"é.z": torch.randn(3, 5), "a": torch.randn(4).half(), "n": torch.tensor(7), "empty": torch.zeros(0, 3)}
    header = build_header({k: (safetensors_dtype(t.dtype), tuple(t.shape)) for k, t in tensors.items()}, {"k": "v"})
    (tmp_path / "f").write_bytes(header + b"".join(t.numpy().tobytes() for t in tensors.values()))
    found = load_file(tmp_path / "f")
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
    with safe_open(tmp_path / "f", "pt") as f:
        assert f.metadata() == {"k": "v"}


def test_what_the_library_writes_is_read_entry_by_entry(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"t.{name}": torch.randn(3, 4).to(getattr(torch, name))
        for key, name in TORCH_NAMES.items()
        if key not in ("BOOL", "U8", "U16", "U32", "U64", "C64")
    } | {"bool": torch.tensor([True, False]), "empty": torch.zeros(2, 0)}
    save_file(tensors, tmp_path / "f", {"format": "pt"})
    header = read_header(tmp_path / "f")
    assert header.metadata == {"format": "pt"}
    assert (tmp_path / "f").read_bytes().startswith(header.raw)
    assert set(header.entries) == set(tensors)
    for name, tensor in tensors.items():
        found = read_tensor(header.entries[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found.float(), tensor.float())
        assert found.shape == tensor.shape


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "BF16", "I64", "U8"]), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
        max_size=5,
    )
)
def test_any_header_comes_back_from_us_and_from_the_library(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    header = build_header(tensors, {})
    (tmp_path / "f").write_bytes(header + bytes(sum(byte_length(*t) for t in tensors.values())))
    ours = read_header(tmp_path / "f")
    assert {name: (e.dtype, e.shape) for name, e in ours.entries.items()} == tensors
    assert ours.raw == header
    with safe_open(tmp_path / "f", "pt") as f:
        theirs = {k: (f.get_slice(k).get_dtype(), tuple(f.get_slice(k).get_shape())) for k in f.keys()}  # noqa: SIM118
    assert theirs == tensors


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE: dict[str, tuple[Any, bytes, int | None]] = {
    "a header longer than the file": ({"a": row()}, b"\0" * 4, 1 << 20),
    "a header longer than any": ({"a": row()}, b"\0" * 4, 2**63),
    "a header of no length": (b"", b"", 0),
    "overlapping tensors": ({"a": row(), "b": row(offsets=(2, 6))}, b"\0" * 6, None),
    "the same bytes twice": ({"a": row(), "b": row()}, b"\0" * 4, None),
    "a gap between tensors": ({"a": row(), "b": row(offsets=(8, 12))}, b"\0" * 12, None),
    "a gap at the start": ({"a": row(offsets=(4, 8))}, b"\0" * 8, None),
    "bytes behind the last tensor": ({"a": row()}, b"\0" * 5, None),
    "an offset out of range": ({"a": row(shape=(100,), offsets=(0, 400))}, b"\0" * 4, None),
    "offsets in the wrong order": ({"a": row(offsets=(4, 0))}, b"\0" * 4, None),
    "a negative offset": ({"a": row(offsets=(-4, 0))}, b"\0" * 4, None),
    "three offsets": ({"a": row(offsets=(0, 2, 4))}, b"\0" * 4, None),
    "an offset that is no number": ({"a": row(offsets=("0", "4"))}, b"\0" * 4, None),
    "an offset that is a fraction": ({"a": row(offsets=(0, 4.0))}, b"\0" * 4, None),
    "an offset that is true": ({"a": row(shape=(), dtype="U8", offsets=(False, True))}, b"\0", None),
    "a shape of another size": ({"a": row(shape=(2,))}, b"\0" * 4, None),
    "a negative shape": ({"a": row(shape=(-1, -1))}, b"\0" * 4, None),
    "a shape that is a word": ({"a": row(shape="ab")}, b"\0" * 4, None),
    "a shape beyond any memory": ({"a": row(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b"", None),
    "a shape of many dimensions": ({"a": row(shape=[1] * 65)}, b"\0" * 4, None),
    "an unknown dtype": ({"a": row(dtype="F7")}, b"\0" * 4, None),
    "a dtype that is a list": ({"a": row(dtype=["F32"])}, b"\0" * 4, None),
    "half a byte": ({"a": row(dtype="F4", offsets=(0, 1))}, b"\0", None),
    "an entry that is a list": ({"a": [1]}, b"", None),
    "an entry that is null": ({"a": None}, b"", None),
    "an entry without a dtype": ({"a": {"shape": [], "data_offsets": [0, 4]}}, b"\0" * 4, None),
    "a table that is a list": ([1, 2], b"", None),
    "no JSON": (b"{nope}", b"", None),
    "no text": (b"\xff\xfe\xfd\xfc", b"", None),
    "deep nesting": (NESTED, b"", None),
    "a number of many digits": (b'{"a":' + b"9" * 5000 + b"}", b"", None),
    "a tensor twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4, None),
    "a dtype twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4, None),
    "half of a surrogate pair in a name": ({"\ud800": row()}, b"\0" * 4, None),
    "metadata that is a list": ({"__metadata__": ["pt"]}, b"", None),
    "a number that is none": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', b"\0" * 4, None),
    "an entry with more in it": ({"a": row() | {"x": 1}}, b"\0" * 4, None),
    "another encoding": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.encode("utf-16"), b"\0" * 4, None),
    "a blank before the table": (b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4, None),
    "metadata of numbers": ({"__metadata__": {"format": 1}}, b"", None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused_with_the_file_named(tmp_path: Path, case: str) -> None:
    file = write(tmp_path / "m.safetensors", *HOSTILE[case])
    with pytest.raises(WloraMergeError) as error:
        read_header(file)
    message = str(error.value)
    assert message.startswith(f"{file}: not a sound safetensors file: ")
    assert "\n" not in message
    message.encode()


@pytest.mark.parametrize("cut", [0, 4, 8, 9, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    save_file({"a": torch.zeros(8), "b": torch.zeros(8)}, tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:cut])
    with pytest.raises(WloraMergeError, match="not a sound safetensors file"):
        read_header(tmp_path / "f")


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 10)
    write(tmp_path / "f", {str(i): row(shape=(0,), offsets=(0, 0)) for i in range(11)})
    with pytest.raises(WloraMergeError, match="not a table of tensors"):
        read_header(tmp_path / "f")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        with pytest.raises(WloraMergeError, match="cannot be read"):
            read_header(file)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "f")
    entry = read_header(tmp_path / "f").entries["a"]
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-4])
    with pytest.raises(WloraMergeError, match="changed meanwhile"):
        read_tensor(entry)
    (tmp_path / "f").unlink()
    with pytest.raises(WloraMergeError, match="cannot be read"):
        read_tensor(entry)


def test_rows_are_read_at_an_offset(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6, dtype=torch.int64)}, tmp_path / "f")
    entry, buffer = read_header(tmp_path / "f").entries["a"], bytearray(16)
    with open(tmp_path / "f", "rb") as f:
        read_rows(f.fileno(), entry, memoryview(buffer), offset=16)
    assert torch.frombuffer(buffer, dtype=torch.int64).tolist() == [2, 3]


def test_every_torch_dtype_has_one_name_and_the_size_of_its_elements() -> None:
    for name in TORCH_NAMES:
        dtype = torch_dtype(name)
        assert safetensors_dtype(dtype) == name
        assert dtype.itemsize * 8 == BITS[name]


def test_a_dtype_that_torch_lacks_is_refused_with_file_and_tensor(tmp_path: Path) -> None:
    file = write(tmp_path / "f", {"w": row(dtype="F4", shape=(2,), offsets=(0, 1))}, b"\0")
    with pytest.raises(UnsupportedError, match=f"{file}: tensor 'w' has dtype F4"):
        read_tensor(read_header(file).entries["w"])
    with pytest.raises(UnsupportedError, match="F4"):
        torch_dtype("F4")
