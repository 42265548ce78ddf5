"""The list of formats, and which of them a name means."""

from __future__ import annotations

from collections.abc import Mapping

from .dense_format import DenseFormat
from .format import Format
from .lora_format import LoraFormat
from .onnx_format import OnnxFormat

FORMATS: Mapping[str, Format] = {kind.name: kind for kind in (DenseFormat(), LoraFormat(), OnnxFormat())}
"""{name: format}, in the order of the help; `constants.FORMATS` has the names for those who may import nothing heavy."""
