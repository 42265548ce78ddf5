"""What a head sees: its last linear layer, what the model hands it, and what the poolings would hand it instead.

A class of transformers ends in one linear layer. What that layer is given, and what it could be given, one forward pass tells; so a
head is solved on features that are computed once. It knows models. It knows neither candidates nor how a head is solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import MixtureError, UnsupportedError
from ..models.pooling import LAYER_POOLINGS, add_pooling_layer, pool_tokens, pooled, token_layers, with_tokens

MODEL, CLS, LAST, MEAN = "model", "cls", "last", "mean"
CONFIG_KEY = "classifier_pooling"
"""By which a class pools, where it can."""
SMALL = 2.0**-11
"""δ: in tanh(δ·x) = δ·x·(1 - (δ·x)²/3 ...) what a token vector loses is below float32's own rounding of the layers before it."""
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}


@dataclass(frozen=True)
class _Reader:
    """How the class comes from a token's vector to its last linear layer: straight, or through a square linear layer and a function.

    Attributes:
        first: whether it reads the first token; else the last one.
        square: name of the square layer; empty where there is none.
        activation: a key of `ACTIVATIONS`; empty where there is none.
    """

    first: bool
    square: str = ""
    activation: str = ""


@dataclass
class HeadInputs:
    """A model's last linear layer, and the poolings that it can be given.

    Attributes:
        out: name of the last linear layer.
        own: whether what the class gives it comes from the base alone, so that a head is solved on it.
        picks: whether the layer sees every token and the class takes the logits of the last.
        reader: how the class reads a token; None where it does not read one.
        pooling: the one in use.
    """

    model: Any
    out: str
    own: bool
    picks: bool = False
    reader: _Reader | None = None
    pooling: str = MODEL
    _chosen: bool = False
    _caught: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def layer(self) -> nn.Linear:
        """The last linear layer."""
        found: nn.Linear = self.model.get_submodule(self.out)
        return found

    @property
    def poolings(self) -> list[str]:
        """Those on which a head can be solved."""
        if self.reader is None:
            return [MODEL] if self.own else []
        between = [CLS, LAST] if self.reader.first else []
        return [MEAN, *between, *([MODEL] if self.own else [])]

    def features(self, inputs: dict[str, Any], mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What the last layer sees of some rows under each pooling, or once one is chosen, under that; differentiable.

        Args:
            inputs: of the model, without labels.
            mask: [B, T]; None: every token counts.

        Returns:
            {pooling: [B, d], or [B, T, d] where every token is judged}, float32.
        """
        self._caught.clear()
        self.model(**inputs)
        given, tokens = self._caught.pop("given"), self._caught.pop("tokens", None)
        self._caught.clear()
        every = given if tokens is None else tokens
        counts = torch.ones(every.shape[:2], dtype=torch.int64, device=every.device) if mask is None else mask
        found = {MODEL: pool_tokens(given, counts, "lasttoken") if self.picks else given} if self.own else {}
        if self.reader is not None and tokens is not None:
            found |= {name: pooled(tokens.float(), counts, name) for name in LAYER_POOLINGS}
            if self.reader.first:
                found[CLS] = tokens[:, 0]
        wanted = self.poolings if not self._chosen else [self.pooling]
        return {name: found[name].float() for name in wanted}

    def choose(self, pooling: str) -> list[str]:
        """Let the model's head see this pooling from now on; the names of the parameters that make the head then."""
        self.pooling, self._chosen = pooling, True
        if pooling in LAYER_POOLINGS:
            add_pooling_layer(self.model, pooling)
        square = self.reader.square if self.reader and pooling != MODEL else ""
        return [
            f"{name}.{part}" for name in (self.out, square) if name for part, _ in self._module(name).named_parameters()
        ]

    @property
    def layer_pooling(self) -> str | None:
        """What a mixture records: the pooling, where it is not what the class itself reads."""
        return self.pooling if self.pooling in LAYER_POOLINGS else None

    def put(self, weight: torch.Tensor, bias: torch.Tensor, largest: float) -> None:
        """Give the class the head weight · x + bias, in the form in which it computes it.

        Args:
            weight: [K, d] float64.
            bias: [K] float64.
            largest: of the features' elements, which a shift must keep positive.
        """
        kind = self.reader.activation if self.reader and self.pooling != MODEL else ""
        if kind:
            square = self._module(self.reader.square)  # type: ignore[union-attr]
            unit = torch.eye(square.in_features, dtype=torch.float64)
            shift = 0.0
            if kind == "tanh":
                unit, weight = unit * SMALL, weight / SMALL
            else:
                shift = 2.0 ** math.ceil(math.log2(2 * largest + 8))
                bias = bias - shift * weight.sum(1)
            with torch.no_grad():
                square.weight.copy_(unit)
                square.bias.fill_(shift)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            if self.layer.bias is not None:
                self.layer.bias.copy_(bias)

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _catch(self) -> None:
        """Keep what the last layer is given, and the tokens' vectors, of every forward pass."""

        def given(module: Any, args: tuple[Any, ...]) -> None:
            self._caught["given"] = args[0]

        def tokens(module: Any, args: Any, output: Any) -> None:
            if isinstance(output[0], torch.Tensor) and output[0].ndim == 3:
                self._caught["tokens"] = output[0]

        self.layer.register_forward_pre_hook(given)
        if self.reader is not None:
            token_layers(self.model).register_forward_hook(tokens)


def find_head_inputs(model: Any, head: list[str], inputs: dict[str, Any], *, classifies: bool) -> HeadInputs | None:
    """The last linear layer of a new head, and what it may be given; None where the head ends in no such layer.

    What is found is tried out: the layer's output are the logits; a token's vector put in the place of all comes out in front of it.

    Args:
        model: with a new head.
        head: names of the head's modules.
        inputs: of one batch, without labels.
        classifies: whether the head sees one vector for each example.
    """
    out, picks = _last_layer(model, inputs, classifies=classifies)
    if not any(out == name or out.startswith(f"{name}.") for name in head):
        return None
    new = [part for name in head for part, _ in model.get_submodule(name).named_parameters(prefix=name)]
    own = all(name.rpartition(".")[0] == out for name in new)
    reader = _find_reader(model, out, inputs) if classifies else None
    found = HeadInputs(model, out, own, picks, reader)
    found._catch()
    return found if found.poolings else None


def _last_layer(model: Any, inputs: dict[str, Any], *, classifies: bool) -> tuple[str, bool]:
    """The linear layer whose output are the logits, and whether the class takes those of the last token; else an empty name."""
    with torch.no_grad(), _watched(model, lambda name, module: isinstance(module, nn.Linear)) as seen:
        output = model(**inputs)
    logits = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], dim=-1)
    mask: torch.Tensor | None = inputs.get("attention_mask") if classifies else None
    found = "", False
    for name, (_, result) in seen.items():
        every = mask is not None and result.ndim == 3 and result.shape[:2] == mask.shape
        last = mask is not None and every and _are_close(pool_tokens(result, mask, "lasttoken"), logits)
        if last or _are_close(result, logits):
            found = name, last
    return found


def _find_reader(model: Any, out: str, inputs: dict[str, Any]) -> _Reader | None:
    """How the class reads a token, found by giving it random vectors for all; None where it reads something else."""
    try:
        part = token_layers(model)
    except UnsupportedError:
        return None
    under = next(name for name, module in model.named_modules() if module is part)

    def outside(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not name.startswith(f"{under}.")

    with torch.no_grad(), _noise_after(part) as handed, _watched(model, outside) as seen:
        model(**inputs)
    if not handed or out not in seen:
        return None
    noise, mask = handed[0].float(), inputs.get("attention_mask")
    mask = torch.ones(noise.shape[:2], dtype=torch.int64, device=noise.device) if mask is None else mask
    read = seen[out][0].float()
    read = pool_tokens(read, mask, "lasttoken") if read.ndim == 3 else read
    for first, vector in ((True, noise[:, 0]), (False, pool_tokens(noise, mask, "lasttoken"))):
        if _are_close(read, vector):
            return _Reader(first)
        for name, (given, result) in seen.items():
            between = _are_close(given, vector) and result.shape == vector.shape
            if between and (kind := _activation(model.get_submodule(name), result, read)):
                return _Reader(first, name, kind)
    return None


def _activation(layer: nn.Module, result: torch.Tensor, read: torch.Tensor) -> str:
    """What stands between a layer with a bias and what is read: a key of `ACTIVATIONS`, or an empty text."""
    if layer.bias is None:
        return ""
    return next((kind for kind, function in ACTIVATIONS.items() if _are_close(read, function(result.float()))), "")


@contextmanager
def _noise_after(part: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Put random vectors in the place of all tokens behind a part of a model; the list gets them."""
    handed: list[torch.Tensor] = []

    def replace(module: Any, given: Any, output: Any) -> Any:
        tokens = output[0]
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3:
            return output
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens)
        handed.append(noise)
        return with_tokens(output, noise)

    handle = part.register_forward_hook(replace)
    try:
        yield handed
    finally:
        handle.remove()


@contextmanager
def _watched(model: nn.Module, wanted: Any) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """{module: (its input, its output)} of the last call of each wanted module within the block."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args:
                seen[name] = (args[0], output)

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if wanted(name, m)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _are_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-4))


def pool_by_config(model: Any, pooling: str | None) -> bool:
    """Let a class that pools as its config says (ModernBERT's `classifier_pooling`) take a pooling; whether it does.

    Args:
        model: with a new head.
        pooling: the one that is wanted.
    """
    config = model.config
    if not hasattr(config, CONFIG_KEY) or pooling not in (MEAN, getattr(type(config)(), CONFIG_KEY)):
        return False
    for place in (config, model):  # EuroBERT's class has taken it from there
        if hasattr(place, CONFIG_KEY):
            setattr(place, CONFIG_KEY, pooling)
    return True


def refuse_pooling(asked: str, found: HeadInputs | None, model: nn.Module) -> None:
    """Refuse a pooling that the model cannot have.

    Raises:
        MixtureError: with those that it has.
    """
    has = dict.fromkeys([*(found.poolings if found else []), MODEL])
    if asked not in (*has, "auto"):
        raise MixtureError(
            f"pooling is {asked}, and a head of {type(model).__name__} sees {' or '.join(has)} alone: give "
            f"{'one of these' if len(has) > 1 else 'that'}, or leave --pooling out."
        )
