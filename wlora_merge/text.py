"""Text for people: values made short, credentials taken out, suggestions, sizes. It knows nothing of what the text is about."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection
from typing import Any

_USER = re.compile(r"://[^/@\s]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def short(value: Any) -> str:
    """What a message shows of a value: parts of it, as the aliases of a YAML of ten lines can mean 10^9 of them."""
    parts = reprlib.Repr()
    parts.maxlevel, parts.maxstring, parts.maxother = 2, 80, 80
    return parts.repr(value)


def redacted(text: str) -> str:
    """The text without credentials: hub tokens, and what stands before the `@` of a URL.

    >>> redacted("https://user:secret@huggingface.co/org/name with hf_abcdefghijklmnop")
    'https://***@huggingface.co/org/name with hf_***'
    """
    return _TOKEN.sub("hf_***", _USER.sub("://***@", text))


def nearest(word: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def human_bytes(count: float) -> str:
    """A number of bytes as a person reads it: `900 bytes`, `1.5 GB` (10^9 bytes)."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.95 or unit == "TB":
            break
    return f"{count:.1f} {unit}"


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
