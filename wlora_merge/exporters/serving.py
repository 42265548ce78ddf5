"""What servers take: checks before an export.

vLLM's rules: https://docs.vllm.ai/en/latest/features/lora.html and `vllm/config/lora.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..adapters.layouts import Layout
from ..errors import UnsupportedError
from ..mixture.mixture import Mixture

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` accepts; an adapter's r may be anything up to it."""


def check_server(server: str, mixture: Mixture, deltas: Sequence[ModuleDelta | TensorDelta]) -> None:
    """Refuse what a server would not load as one LoRA.

    Raises:
        UnsupportedError: a trained head, or a target module that the server has no LoRA for.
    """
    if mixture.head:
        raise UnsupportedError(
            f"--for {server}: the mixture has a trained head ({min(mixture.head)}), and vLLM loads no modules_to_save: "
            "export with --format dense."
        )
    for delta in deltas:
        layout = delta.layout if isinstance(delta, ModuleDelta) and delta.R else None
        if layout is not Layout.LINEAR or len(delta.shape) != 2:
            kind = layout.value if layout is not None else "whole tensor"
            raise UnsupportedError(
                f"--for {server}: {delta.module!r} is a {kind} {list(delta.shape)}, and vLLM has LoRA for linear layers alone: "
                "leave out the adapters that change it, or export with --format dense."
            )


def check_rank(r: int, *, server: str | None, max_rank: int | None, exact: bool) -> None:
    """Refuse a rank that a server would not take.

    Args:
        r: the uniform rank of the LoRA.
        server: the server's name; None checks none.
        max_rank: what the server was started with (vLLM: `--max-lora-rank`); None: the highest that it can be.
        exact: whether r came from the adapters and not from the user.

    Raises:
        UnsupportedError: with the rank to ask for, or the value to start the server with.
    """
    if server == "vllm" and max_rank is not None and max_rank not in VLLM_RANKS:
        raise UnsupportedError(
            f"--max-rank {max_rank}: vLLM's --max-lora-rank is one of {', '.join(map(str, VLLM_RANKS))}."
        )
    limit = max_rank if max_rank is not None else VLLM_RANKS[-1] if server == "vllm" else r
    if r > limit:
        why = "the adapters' ranks add up to it" if exact else "as asked for"
        start = f", or start the server with --max-lora-rank {fit}" if (fit := vllm_rank(r)) else ""
        raise UnsupportedError(
            f"the LoRA would have r = {r} ({why}), and the server takes at most {limit}: give --rank {limit} for the best "
            f"approximation{start}."
        )


def vllm_rank(r: int) -> int | None:
    """The smallest `--max-lora-rank` of vLLM that holds r; None where none does."""
    return next((rank for rank in VLLM_RANKS if rank >= r), None)
