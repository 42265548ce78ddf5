"""Learn a mixture of LoRA adapters on a few examples, and fold it into one model to serve.

    import wlora_merge

    mixture = wlora_merge.fit(base, adapters, data, task="text-classification", out="mixture")
    wlora_merge.export("mixture", "dense", "served")
    wlora_merge.verify("served")

With all adapters of a folder that can be mixed on the base, those that cannot being named in a warning:

    wlora_merge.mix(base, wlora_merge.mixable(base, wlora_merge.find_adapters("adapters")), out="mixture")

With a training loop of your own:

    wlora_merge.attach(model, adapters)            # only model.wlora_weights requires gradients
    ...
    wlora_merge.Mixture.from_model(model).save("mixture")

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.find import find_adapters
    from .errors import WloraMergeError, WloraMergeWarning
    from .exporters.export import export
    from .exporters.verify import verify
    from .mixture.attach import attach, detach
    from .mixture.compatibility import mixable
    from .mixture.mix import mix
    from .mixture.mixture import Mixture
    from .training.fit import fit

_HOMES = {
    "Mixture": "mixture.mixture",
    "WloraMergeError": "errors",
    "WloraMergeWarning": "errors",
    "attach": "mixture.attach",
    "detach": "mixture.attach",
    "export": "exporters.export",
    "find_adapters": "adapters.find",
    "fit": "training.fit",
    "mix": "mixture.mix",
    "mixable": "mixture.compatibility",
    "verify": "exporters.verify",
}

__all__ = [
    "Mixture",
    "WloraMergeError",
    "WloraMergeWarning",
    "__version__",
    "attach",
    "detach",
    "export",
    "find_adapters",
    "fit",
    "mix",
    "mixable",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("wlora-merge")
    if name not in _HOMES:
        raise AttributeError(f"module 'wlora_merge' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
