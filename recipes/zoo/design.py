"""What each adapter of the zoo is trained on, and how. No adapter has to be trained to know it.

Every one of Banking77's intents belongs to a group that is judged. So no intent can be left out of the whole zoo. Instead the
intents of an adapter all come from one group, and `has_seen` names the tasks on which it must not be judged.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs import SENTENCES, SHARED

GROUPS = ("g0", "g1", "g2", "g3", "g4", "g5")
TARGETS = {
    "minilm": {
        "qv": ("query", "value"),
        "qkvo": ("query", "key", "value", "attention.output.dense"),
        "all": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    },
    "smollm2": {
        "qv": ("q_proj", "v_proj"),
        "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    },
}
LAST_LAYERS = {"minilm": (3, 4, 5), "smollm2": tuple(range(15, 30))}
BBH = (  # short ones, and none that recipes/bench_fit reports
    "sports_understanding",
    "hyperbaton",
    "snarks",
    "disambiguation_qa",
    "object_counting",
    "movie_recommendation",
    "ruin_names",
    "multistep_arithmetic_two",
    "dyck_languages",
    "word_sorting",
    "date_understanding",
    "logical_deduction_three_objects",
)
"""Tasks of BIG-Bench Hard for the language model."""


@dataclass(frozen=True)
class Spec:
    """One adapter. The same spec gives the same adapter."""

    name: str
    base: str
    """minilm or smollm2"""
    dataset: str
    """banking77, bbh, or a key of bench_fit's SENTENCES"""
    part: str
    """banking77: the group of its intents; bbh: the task; sentences: `2/6`, the second of six parts that share no example"""
    labels: tuple[str, ...]
    """the classes; none where they are the answers of a bbh task"""
    has_seen: tuple[str, ...]
    """jobs of recipes/bench_fit on which this adapter must not be judged"""
    steps: int
    batch_size: int
    shuffled: bool = False
    """whether the labels were permuted over the training examples: an adapter that learned nothing true"""
    r: int = 8
    lora_alpha: int = 16
    targets: str = "qv"
    layers: tuple[int, ...] | None = None
    """none: every layer"""
    use_rslora: bool = False
    use_dora: bool = False
    seed: int = 0

    @property
    def target_modules(self) -> list[str]:
        """As PEFT takes them: a module is meant whose name ends so."""
        return list(TARGETS[self.base][self.targets])

    def as_json(self) -> dict[str, Any]:
        """The spec as JSON reads it back."""
        read: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return read


def minilm() -> list[Spec]:
    """72 classifiers: eight of each group of Banking77, six of each sentence dataset; 14 of them with shuffled labels."""
    groups = json.loads((SHARED / "data/banking77/groups.json").read_text())
    banking = [spec for number, group in enumerate(GROUPS) for spec in _group(group, groups[group], number)]
    return _with_variants(
        banking + [spec for name in ("trec", "sst2", "mpqa", "subj") for spec in _parts("minilm", name, 6, shuffled=2)]
    )


def smollm2() -> list[Spec]:
    """24 language models: SST-2, MPQA, intents of Banking77, twelve tasks of BBH; five of them with shuffled labels."""
    groups = json.loads((SHARED / "data/banking77/groups.json").read_text())
    specs = [spec for dataset in ("sst2", "mpqa") for spec in _parts("smollm2", dataset, 4, shuffled=1)]
    for group in ("g0", "g3", "g4", "g5"):  # those of g1 and g2 are tasks on which bench_fit tunes
        intents, no = tuple(groups[group][:4]), group == "g5"
        specs.append(_spec(f"banking-{group}", "smollm2", "banking77", group, intents, f"banking:{group}", shuffled=no))
    for task in BBH:
        no = task in ("snarks", "object_counting")
        specs.append(_spec(task, "smollm2", "bbh", task, (), f"bbh:{task}", shuffled=no))
    return _with_variants(specs)


DESIGNS = {"minilm": minilm, "smollm2": smollm2}


def usable(specs: Iterable[Spec], job: str) -> list[Spec]:
    """The adapters that have not seen a job's task, in the order given."""
    return [spec for spec in specs if job not in spec.has_seen]


def _group(group: str, intents: list[str], number: int) -> list[Spec]:
    """All intents of a group, both halves of them, five pairs; the group's number says which of these is shuffled."""
    mixed = random.Random(f"zoo {group}").sample(intents, len(intents))
    parts = {"all": mixed, "half1": mixed[:6], "half2": mixed[6:]}
    parts |= {f"pair{k + 1}": mixed[2 * k : 2 * k + 2] for k in range(5)}
    shuffled = ("all", "half1", "half2", "pair1", "pair2", "pair3")[number]
    steps = {11: 90, 6: 60, 5: 60, 2: 20}
    return [
        _spec(
            f"banking-{group}-{part}",
            "minilm",
            "banking77",
            group,
            tuple(sorted(chosen)),
            f"banking:{group}",
            steps=steps[len(chosen)],
            shuffled=part == shuffled,
        )
        for part, chosen in parts.items()
    ]


def _parts(base: str, dataset: str, parts: int, *, shuffled: int) -> list[Spec]:
    """As many adapters of one dataset, which share no example; the last ones shuffled."""
    labels, seen = tuple(SENTENCES[dataset][1]), f"{base}:{dataset}"
    return [
        _spec(f"{dataset}-{k}", base, dataset, f"{k}/{parts}", labels, seen, shuffled=k > parts - shuffled)
        for k in range(1, parts + 1)
    ]


def _spec(
    name: str,
    base: str,
    dataset: str,
    part: str,
    labels: tuple[str, ...],
    seen: str,
    *,
    shuffled: bool,
    steps: int | None = None,
) -> Spec:
    """One that is trained as long as its base needs, but for `steps`."""
    usual, batch_size = {"minilm": (50, 24), "smollm2": (30, 4 if dataset == "bbh" else 8)}[base]
    return Spec(name, base, dataset, part, labels, (seen,), steps or usual, batch_size, shuffled)


def _with_variants(specs: list[Spec]) -> list[Spec]:
    """Ranks 2 to 16, one, two or all kinds of target, and a few features, spread evenly over the adapters by chance."""
    numbers = random.Random("zoo").sample(range(len(specs)), len(specs))
    varied = []
    for seed, (spec, i) in enumerate(zip(specs, numbers, strict=True)):
        r, rslora = (2, 4, 8, 16)[i % 4], i % 6 == 5
        varied.append(
            replace(
                spec,
                r=r,
                lora_alpha=r if rslora or i % 24 >= 12 else 2 * r,
                targets=("qv", "qkvo", "all")[i // 4 % 3],
                layers=LAST_LAYERS[spec.base] if i % 12 == 10 else None,
                use_rslora=rslora,
                use_dora=spec.base == "minilm" and i % 24 == 7,
                seed=seed,
            )
        )
    return varied
