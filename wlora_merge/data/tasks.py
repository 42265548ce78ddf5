"""The list of tasks, and which of them a name or a model means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import WloraMergeError
from ..text import nearest
from .causal_lm import CAUSAL_LM
from .feature_extraction import FEATURE_EXTRACTION
from .image_classification import IMAGE_CLASSIFICATION
from .question_answering import QUESTION_ANSWERING
from .seq2seq_lm import SEQ2SEQ_LM
from .task import Task
from .text_classification import TEXT_CLASSIFICATION
from .token_classification import TOKEN_CLASSIFICATION

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        CAUSAL_LM,
        SEQ2SEQ_LM,
        TEXT_CLASSIFICATION,
        TOKEN_CLASSIFICATION,
        QUESTION_ANSWERING,
        IMAGE_CLASSIFICATION,
        FEATURE_EXTRACTION,
    )
}
"""{name: task}, in the order of the help."""
FIT_TASKS: Mapping[str, Task] = {name: task for name, task in TASKS.items() if task.forms}
"""Those that read examples, and so can be fitted."""


def get_task(name: str | None) -> Task:
    """The task of that name; None: that of a model's body alone.

    Raises:
        WloraMergeError: there is none; with the nearest name.
    """
    if name is None:
        return next(task for task in TASKS.values() if task.is_body)
    if name not in TASKS:
        raise WloraMergeError(f"no task {name!r}; tasks are {', '.join(TASKS)}{nearest(name, TASKS)}.")
    return TASKS[name]


def task_of(model: Any) -> str | None:
    """The task of which the model's class is, by transformers' own tables; None where they have it for none or for several.

    Args:
        model: a transformers model (`LlamaForCausalLM`, `BertForSequenceClassification`, ...), or any other object.
    """
    if not hasattr(model, "config"):
        return None
    classes = type(model).__mro__  # FSDP and the like make subclasses
    name = next((c.__name__ for c in classes if c.__module__.startswith("transformers.models.")), "")
    found = tasks_of_class(name)
    return found[0] if len(found) == 1 else None


def tasks_of_class(name: str) -> list[str]:
    """The tasks for which transformers builds the class of that name (`LlamaForCausalLM`); none of a class that it does not know."""
    return [task.name for task in TASKS.values() if name in _class_names(task.auto_class())]


def _class_names(auto: Any) -> set[str]:
    """Names of the model classes that an auto class gives."""
    rows = auto._model_mapping._model_mapping.values()
    return {name for row in rows for name in ([row] if isinstance(row, str) else row)}
