"""A table from elsewhere -> a typed record, checked once; what is wrong with it becomes one sentence.

It knows pydantic, and no file's meaning. Import it where a record is read or written: pydantic takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    WrapValidator,
)
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from ..errors import WloraMergeError
from ..text import short

EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
"""What a type of pydantic's errors expects, in words."""
NAMES = {dict: "a table", list: "a list", type(None): "null"}


class Record(BaseModel):
    """What crosses a border: of strict types, with finite numbers, frozen; a key that it does not know is passed over."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, extra="ignore")


R = TypeVar("R", bound=Record)


def read_record(kind: type[R], table: Mapping[str, Any], file: Path, error: type[WloraMergeError], advice: str) -> R:
    """The record that a table is.

    Args:
        kind: of record.
        table: the contents of `file`.
        file: where the table stands, for the message.
        error: its kind.
        advice: what to do where it is none, as `make the mixture again`.

    Raises:
        error: one sentence on the first thing that is wrong: file, key, got, expected, advice.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as failure:
        raise error(f"{file}: {_sentence(failure)}: {advice}.") from failure


def _sentence(failure: ValidationError) -> str:
    first = failure.errors(include_url=False)[0]
    kind, key, value = first["type"], _key(first["loc"]), first["input"]
    if kind == "missing":
        return f"lacks {key}"
    if kind == "value_error":
        return f"{key} {first['ctx']['error']}".lstrip()
    got = NAMES.get(type(value)) or short(value)
    return f"{key} is {got}, expected {EXPECTED.get(kind) or first['msg'].removeprefix('Input should be ')}"


def _key(path: Iterable[str | int]) -> str:
    """Where a value stands: `adapters[1].name`, `groups['model.layers.3'][0]`."""
    text = ""
    for part in path:
        plain = isinstance(part, str) and part.isidentifier() and len(part) < 80
        text += (f".{part}" if text else str(part)) if plain else f"[{short(part)}]"
    return text


# ------------------------------------------------------------------------------------------------ kinds of values


class _OneOf:
    """Checks a text against a list, and puts the list into the JSON schema."""

    def __init__(self, values: tuple[str, ...]) -> None:
        self.values = values

    def check(self, value: str) -> str:
        """The value itself.

        Raises:
            ValueError: it is not in the list.
        """
        if value not in self.values:
            raise ValueError(f"is {short(value)}, expected one of {', '.join(self.values)}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.values)}


def one_of(values: Iterable[str]) -> Any:
    """A text among some, for `Annotated[str, ...]`."""
    return _OneOf(tuple(values))


def checked_by(check: Callable[[Any], object]) -> Any:
    """What a function does not refuse, for `Annotated`; it raises ValueError with what goes on the sentence behind the key."""

    def run(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(run)


def _as_written(value: Any, check: Callable[[Any], object]) -> Any:
    check(value)
    return value


AS_WRITTEN, UNCHANGED = WrapValidator(_as_written), PlainSerializer(lambda value: value)
"""For `Annotated[table, AS_WRITTEN, UNCHANGED]`: read and written with the keys that this version does not know, in their order."""
