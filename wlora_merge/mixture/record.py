"""The record of a mixture: what `mixture.json` holds, and `wlora_merge.json` of a mixture that was exported.

Its fields stand in the order of the file. It knows names and numbers. It knows neither tensors nor folders.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Required, TypedDict

from ..adapters.keys import check_adapter_name
from ..constants import GRANULARITIES, MAJORITY_SIGNS, NORMALIZE, PRUNING
from ..data.tasks import TASKS
from ..errors import AdapterError
from ..io.records import AS_WRITTEN, UNCHANGED, Record, checked_by, one_of
from ..models.pooling import LAYER_POOLINGS
from ..text import short

FORMAT_VERSION: Literal[1] = 1
RARE = ("combination", "resize_vocab", "pooling", "head")
"""Keys that a file has where they say something."""


def _check_source(source: str) -> None:
    if not source or "\0" in source:
        raise ValueError("is not the name of a folder or a hub id")


def _check_name(name: str) -> None:
    try:
        check_adapter_name(name)
    except AdapterError as error:
        raise ValueError(f"is {short(name)}, which no adapter may be called") from error


SourceText = Annotated[str, checked_by(_check_source)]
Digests = dict[str, str]
"""File name -> sha256."""


class BaseRecord(Record):
    """The base model, as a file names it.

    Attributes:
        source: its folder, relative to the file's own where it can be, or its hub id.
        revision: the commit on the hub; null for a folder.
        sha256: of each weight file, by its name.
    """

    source: SourceText
    revision: str | None = None
    sha256: Digests


class AdapterRecord(Record):
    """An adapter, as a file names it.

    Attributes:
        name: what the mixture calls it.
        source: its folder or hub id, as the base's.
        revision: the commit on the hub; null for a folder.
        sha256: of its config and its weights, by file name.
    """

    name: Annotated[str, checked_by(_check_name)]
    source: SourceText
    revision: str | None = None
    sha256: Digests


class Prefixes(Record):
    """The leading parts in which the file's and the model's names of all modules differ.

    Attributes:
        in_file: the part that the names in the base's files begin with.
        in_model: the part that the names in the model's tree begin with.
    """

    in_file: str
    in_model: str


# ------------------------------------------------------------------------------------------------ the record of a fit


class DataRef(TypedDict, total=False):
    """A file of data: its own name and digest, how many rows, and which columns were used.

    Attributes:
        name: its own name, a hub id, or how Python's data is called.
        sha256: of its bytes.
        examples: how many there are.
        columns: column of the task -> column of the file.
        unused_columns: columns that were left out.
        split: which split was read.
    """

    name: Required[str]
    sha256: str
    examples: int
    columns: dict[str, str]
    unused_columns: list[str]
    split: str


HeldOut = TypedDict(
    "HeldOut",
    {
        "examples": Annotated[int, Field(description="how many judged.")],
        "of": Annotated[int, Field(description="how many shots there are.")],
        "folds": Annotated[int, Field(description="in how many parts they were held out; 0 for none.")],
        "from": Annotated[DataRef, Field(description="the evaluation data, where they judged.")],
    },
    total=False,
)
"""Which examples the candidates were judged on."""
Scores = dict[str, float]
"""Loss, metric and its standard error."""


class Chosen(TypedDict, total=False):
    """How what was kept was learned.

    Attributes:
        granularity: as `--granularity`.
        normalize: as `--normalize`.
        pull: as `--pull`.
        new_adapter: rank of the new adapter; 0 for none.
        interpolation: as `--interpolation`.
        new_adapter_interpolation: as `--new-adapter-interpolation`.
        steps: optimizer steps.
        pooling: what a new head sees of a text.
        l2: how strongly a solved head is held.
    """

    granularity: str
    normalize: str
    pull: float
    new_adapter: int
    interpolation: float
    new_adapter_interpolation: float
    steps: int
    pooling: str
    l2: float


class Pruned(TypedDict, total=False):
    """What pruning set to zero, and what it cost.

    Attributes:
        below: as `--prune-below`.
        weights_set_to_zero: how many.
        left: adapters that left the mixture.
        loss_added: how much the loss rose.
        on: the examples that loss is of, in words.
    """

    below: float
    weights_set_to_zero: int
    left: list[str]
    loss_added: float
    on: str


class Screening(TypedDict):
    """Which of many adapters a fit has mixed.

    Attributes:
        kept: names of those.
        scores: of every adapter, how far its modules agree that it lowers the loss of the shots.
    """

    kept: list[str]
    scores: dict[str, float]


def _check_point(point: list[float]) -> None:
    if len(point) != 2:
        raise ValueError("is not a pair of a step and a loss")


class FitMetrics(TypedDict, total=False):
    """The record of a fit: the scores of all candidates, what was kept, and in words what they were measured on.

    Attributes:
        metric: its name.
        higher_is_better: of the metric.
        candidates: candidate -> its loss, its metric, and the metric's standard error.
        kept: the candidate that was kept.
        compared_with: the candidate that the others are compared with.
        better: simpler candidates that did better than it.
        as_good: simpler candidates that did as well.
        note: what was measured, and on what, in words.
        settings: learned setting -> its scores on the folds.
        chosen: how what was kept was learned.
        history: [step, loss] of the last training, by its title.
        pruned: what pruning did.
        screening: which of many adapters were kept.
        held_out: the examples that judged.
    """

    metric: str
    higher_is_better: bool
    candidates: dict[str, Scores]
    kept: str
    compared_with: str
    better: list[str]
    as_good: list[str]
    note: str
    settings: dict[str, Scores]
    chosen: Chosen
    history: dict[str, list[Annotated[list[float], checked_by(_check_point)]]]
    pruned: Pruned
    screening: Screening
    held_out: HeldOut


class NewAdapter(TypedDict):
    """The adapter that a fit trained beside those given.

    Attributes:
        name: what the mixture calls it.
        r: its rank.
    """

    name: str
    r: int


def _check_option(value: Any) -> None:
    numbers = value if isinstance(value, list) else []
    if isinstance(value, dict) or not all(type(number) in (int, float) and abs(number) < 1e300 for number in numbers):
        raise ValueError("is neither a plain value nor a list of numbers")


class MadeFrom(TypedDict, total=False):
    """How a mixture was made: the method, and of a fit its data and its options.

    Attributes:
        method: the method of the fit, `given`, `uniform`, or `training loop`.
        data: the shots of a fit.
        fit: every option of the fit.
        columns: what `--column` said.
        residual: the adapter whose residual the base is.
        adapters: name -> source of all adapters that a fit was given, where it did not keep all of them.
        new_adapter: the adapter that it trained beside them.
    """

    method: str
    data: DataRef
    fit: dict[str, Annotated[Any, checked_by(_check_option)]]
    columns: dict[str, str]
    residual: str
    adapters: dict[str, str]
    new_adapter: NewAdapter


# ------------------------------------------------------------------------------------------------------ the mixture


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"is {density}, expected a share above 0 and at most 1")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"is {seed}, expected a whole number from 0 to 2^32 - 1")


class CombinationRecord(Record):
    """How delta weights are combined, where it is not their weighted sum.

    Attributes:
        method: as `mix --method`.
        density: the share of each adapter's delta weight that is kept.
        majority_sign: of what a sign is elected by.
        seed: of what is kept at random.
    """

    method: Annotated[str, one_of(PRUNING)]
    density: Annotated[float, checked_by(_check_density)]
    majority_sign: Annotated[str, one_of(MAJORITY_SIGNS)] | None = None
    seed: Annotated[int, checked_by(_check_seed)] | None = None


class MixtureRecord(Record):
    """A mixture without its tensors; `weights` are for the reader, but in a manifest, which has no others.

    Attributes:
        format_version: of this part.
        base_model: the base.
        adapters: in the order of their weights.
        granularity: which modules share a row of weights.
        normalize: `all` and `present` are a softmax, `none` are free weights.
        delta_scale: factor of the whole delta weight.
        groups: group -> the modules that share its row.
        weights: group -> adapter -> mixture weight, without delta_scale.
        task: what the model is for.
        config: keys of the base's config that the task changes.
        metrics: the record of a fit.
        modules_to_save: as `--modules-to-save`.
        combination: how delta weights become one, where they are not just summed.
        resize_vocab: the adapter whose vocabulary the export has.
        pooling: how a layer pools tokens for the head, where one does.
        prefixes: how names in files and in the model differ.
        data: how the mixture was made.
        head: tensor of a trained head -> the base's tensor that it replaces; null for none.
    """

    format_version: Literal[1] = FORMAT_VERSION
    base_model: BaseRecord
    adapters: list[AdapterRecord]
    granularity: Annotated[str, one_of(GRANULARITIES)]
    normalize: Annotated[str, one_of(NORMALIZE)]
    delta_scale: float
    combination: CombinationRecord | None = None
    groups: dict[str, list[str]]
    weights: dict[str, Scores] = Field(default_factory=dict)
    task: Annotated[str, one_of(TASKS)] | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    metrics: Annotated[FitMetrics, AS_WRITTEN, UNCHANGED] = Field(default_factory=FitMetrics)
    modules_to_save: str | None = None
    resize_vocab: str | None = None
    pooling: Annotated[str, one_of(LAYER_POOLINGS)] | None = None
    prefixes: Prefixes
    data: Annotated[MadeFrom, AS_WRITTEN, UNCHANGED] = Field(default_factory=MadeFrom)
    head: dict[str, str | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agree(self) -> MixtureRecord:
        """Refuse groups that share a module or have none, and adapters that share a name."""
        modules = [module for group in self.groups.values() for module in group]
        if not modules or not all(self.groups.values()):
            raise ValueError("groups is empty, or one of them has no module")
        if twice := _first_twice(modules):
            raise ValueError(f"module {twice!r} stands twice in groups")
        if _first_twice([adapter.name for adapter in self.adapters]):
            raise ValueError("two adapters have the same name")
        if "fit" in self.data and "data" not in self.data:
            raise ValueError("lacks data.data, which its data.fit worked on")
        return self

    def table(self) -> dict[str, Any]:
        """What a file holds of it: every key, but those that few mixtures have."""
        table = self.model_dump(warnings=False)
        return {key: value for key, value in table.items() if value or key not in RARE}


def _first_twice(names: list[str]) -> str | None:
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
