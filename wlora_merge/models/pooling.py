"""Pooling: how the vectors of the tokens become the one vector that a head sees.

It knows tensors and how transformers lays out an encoder. It knows neither heads nor files.

Source of the modes: https://github.com/huggingface/sentence-transformers, `modules/pooling.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError

if TYPE_CHECKING:
    import torch

LAYER_POOLINGS = ("mean", "last")
"""What `add_pooling_layer` knows: poolings of encoders whose class reads the first token."""


def pool_tokens(tokens: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector for each row of token embeddings, in float32 throughout: float16 sums of long rows would overflow.

    mean: Σ m_t·x_t / max(Σ m_t, 1); mean_sqrt_len_tokens: over its square root; weightedmean: with weights m_t·t, t from 1;
    max over the tokens with m_t = 1; cls and lasttoken: the first and the last of them. A row without any gives 0 (max: -inf;
    cls: its first position, whatever the mask).

    Args:
        tokens: [batch, sequence, hidden].
        mask: [batch, sequence], 1 or 0, padded on either side.
        mode: one of those above.

    Returns:
        [batch, hidden] of the tokens' dtype.
    """
    import torch

    values, kept = tokens.float(), mask.unsqueeze(-1).float()
    length = mask.shape[1]
    if mode in ("cls", "lasttoken"):
        first = mask.to(torch.int32).argmax(1)
        last = length - 1 - mask.flip(1).to(torch.int32).argmax(1)
        index = (first if mode == "cls" else last).view(-1, 1, 1).expand(-1, 1, tokens.shape[-1])
        result = (values if mode == "cls" else values * kept).gather(1, index).squeeze(1)
    elif mode == "max":
        result = values.masked_fill(kept == 0, float("-inf")).amax(1)
    else:
        weights = kept * torch.arange(1, length + 1).view(1, -1, 1) if mode == "weightedmean" else kept
        total = weights.sum(1).clamp(min=1)
        result = (values * weights).sum(1) / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)
    return result.to(tokens.dtype)


def pooled(tokens: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """What a pooling layer gives: the layer norm, without scale and shift, of the tokens' mean or of the last one.

    Its norm is √hidden, so that a linear head sees a vector of one length, as of a sentence transformer that normalizes.

    Args:
        tokens: [batch, sequence, hidden], any float dtype.
        mask: [batch, sequence], 1 or 0.
        pooling: one of `LAYER_POOLINGS`.

    Returns:
        [batch, hidden] of the tokens' dtype.
    """
    import torch

    mode = {"mean": "mean", "last": "lasttoken"}[pooling]
    vector = pool_tokens(tokens, mask, mode).float()
    return torch.nn.functional.layer_norm(vector, vector.shape[-1:], eps=1e-12).to(tokens.dtype)


def add_pooling_layer(model: Any, pooling: str) -> None:
    """Let every token of an encoder's output be the pooled vector, as if one more layer did it; the class reads the first.

    An export in the dense format writes that layer (`exporters.pooling_layer`); here it is a hook.

    Args:
        model: a transformers model whose class reads the first token of its body's output.
        pooling: one of `LAYER_POOLINGS`.

    Raises:
        UnsupportedError: its body has no stack of layers that gives token vectors.
    """
    seen = dict[str, Any]()

    def look(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen["mask"] = named.get("attention_mask", given[1] if len(given) > 1 else None)

    def replace(module: Any, given: Any, output: Any) -> Any:
        """The pooled vector in the place of each token's."""
        import torch

        tokens = output[0]
        mask = seen.pop("mask", None)
        mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device) if mask is None else mask
        vector = pooled(tokens, mask, pooling).unsqueeze(1).expand_as(tokens)
        return with_tokens(output, vector)

    token_layers(model).register_forward_hook(replace)
    model.base_model.register_forward_pre_hook(look, with_kwargs=True)


def with_tokens(output: Any, tokens: torch.Tensor) -> Any:
    """What a part of a model gives, a tuple or a ModelOutput, with other token vectors in the place of its own."""
    if isinstance(output, tuple):
        return (tokens, *output[1:])
    output["last_hidden_state"] = tokens
    return output


def token_layers(model: Any) -> Any:
    """The part of a model whose output are the vectors of the tokens: its body, or in one with a pooler of its own the encoder.

    Raises:
        UnsupportedError: it has no body apart from its head, or no encoder of that name.
    """
    body = model.base_model
    part = body if getattr(body, "pooler", None) is None else getattr(body, "encoder", None)
    if body is model or part is None:
        raise UnsupportedError(
            f"{type(model).__name__}: it has no encoder apart from its head whose token vectors could be pooled: use --pooling model."
        )
    return part
