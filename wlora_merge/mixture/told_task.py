"""What a mixture is for, where nobody says it: what the adapters, the base and the head say, if they agree.

It knows PEFT's task types and transformers' classes. It loads nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..adapters.adapter import Adapter
from ..data.tasks import TASKS, tasks_of_class
from ..errors import UnsupportedError
from ..models.base_model import BaseModel


def told_task(
    base: BaseModel, adapters: Sequence[Adapter], config: Mapping[str, Any], of_head: Collection[str] | None = None
) -> str:
    """The task on which the adapters' `task_type`, the architectures and a new head agree; who says nothing is not asked.

    Args:
        base: the opened base model; its `architectures` say nothing of a head that it lacks.
        adapters: N adapters.
        config: the config keys that the mixture changes; its `architectures` go before the base's.
        of_head: the names of the tasks whose model has the new head; None: there is none.

    Raises:
        UnsupportedError: they disagree, or say nothing; with what each says.
    """
    types = sorted({str(a.config["task_type"]) for a in adapters if a.config.get("task_type")})
    named = [str(name) for name in config.get("architectures") or base.config.get("architectures") or []][:1]
    said = {
        f"task_type {kind} of the adapters": {task.name for task in TASKS.values() if task.peft_task_type == kind}
        for kind in types
    }
    if of_head is None or "architectures" in config:
        said |= {f"architecture {name}": set(tasks_of_class(name)) for name in named}
    if of_head is not None:
        said["the head"] = set(of_head)
    told = {who: tasks for who, tasks in said.items() if tasks}
    agreed = set.intersection(*told.values()) if told else set()
    if len(agreed) == 1:
        return agreed.pop()
    what = "; ".join(f"{who} says {' or '.join(sorted(tasks))}" for who, tasks in told.items())
    raise UnsupportedError(
        f"{base.folder}: what the model is for cannot be told ({what or 'neither its architectures nor a task_type says it'}): say "
        "--task TASK."
    )
