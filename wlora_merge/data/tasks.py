"""The tasks: for each, its model class, its labels, how an example becomes model inputs, and how it is judged.

A `Task` is what a fit asks about the task and nothing else. This room knows tokenizers, image processors and collators
of transformers. It knows neither adapters nor mixtures, and it runs no model.
"""

from __future__ import annotations

from typing import Any

from ..constants import TASKS
from ..errors import WloraMergeError
from ..text import nearest
from .causal_lm import CausalLM
from .image_classification import ImageClassification
from .question_answering import QuestionAnswering
from .seq2seq_lm import Seq2SeqLM
from .task import Task
from .text_classification import TextClassification
from .token_classification import TokenClassification

_TASKS = (
    CausalLM("causal-lm", "AutoModelForCausalLM"),
    Seq2SeqLM("seq2seq-lm", "AutoModelForSeq2SeqLM"),
    TextClassification("text-classification", "AutoModelForSequenceClassification"),
    TokenClassification("token-classification", "AutoModelForTokenClassification"),
    QuestionAnswering("question-answering", "AutoModelForQuestionAnswering"),
    ImageClassification("image-classification", "AutoModelForImageClassification"),
    Task("feature-extraction", "AutoModel"),
)


def get_task(name: str) -> Task:
    """The task of that name.

    Args:
        name: one of `constants.TASKS`.

    Raises:
        WloraMergeError: there is none; with the nearest name.
    """
    for task in _TASKS:
        if task.name == name:
            return task
    raise WloraMergeError(f"no task {name!r}; tasks are {', '.join(TASKS)}{nearest(name, TASKS)}.")


def task_of(model: Any) -> str | None:
    """The task of which the model's class is, by transformers' own tables; None where they have it for none or for several.

    Args:
        model: a transformers model (`LlamaForCausalLM`, `BertForSequenceClassification`, ...), or any other object.
    """
    if not hasattr(model, "config"):
        return None
    classes = type(model).__mro__  # FSDP and the like make subclasses
    name = next((c.__name__ for c in classes if c.__module__.startswith("transformers.models.")), "")
    found = [task.name for task in _TASKS if name in _class_names(task.auto_class())]
    return found[0] if len(found) == 1 else None


def _class_names(auto: Any) -> set[str]:
    """Names of the model classes that an auto class gives."""
    rows = auto._model_mapping._model_mapping.values()
    return {name for row in rows for name in ([row] if isinstance(row, str) else row)}
