"""A linear head on frozen features is a convex problem: solved to its optimum in float64, and judged by leaving each example out.

It knows numbers. It knows neither models nor tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

SHARPNESS = 0.1
"""Temperature of the cross-entropy of leave-one-out predictions, as features are trained by it."""
MOST_NEWTON, MOST_CONJUGATE = 60, 250
GRADIENT, SHORTEST = 1e-10, 1e-10
"""The largest element of the gradient at which a head counts as solved, and the shortest share of a step that is tried."""
RIDGE = 3.0
"""Of the ridge regression whose leave-one-out predictions are compared: on features of norm 1 any from 1 to 10 chooses alike."""
TEMPERATURES = torch.logspace(0, 2.5, 26, dtype=torch.float64)
"""Factors of the leave-one-out predictions, which are shrunk towards zero, of which the best is taken for their cross-entropy."""


def solve(
    features: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor], outputs: int, l2: float, *, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias that minimize loss(features @ weight.T + bias) + l2/2 · ‖weight‖², to the optimum.

    Newton's method, each step by conjugate gradients on products with the Hessian (Nocedal and Wright, Numerical Optimization,
    algorithm 7.1). The weight is a sum of the features' rows, so the search is in the space that they span.

    Args:
        features: [n, d], any float dtype.
        loss: logits [n, outputs] float64 -> the sum of a convex loss, twice differentiable.
        outputs: how many logits there are.
        l2: above 0; it does not hold the bias.
        bias: whether there is one; else it is zero.

    Returns:
        weight [outputs, d] and bias [outputs], float64.
    """
    wide = features.detach().double()
    basis = torch.linalg.qr(wide.T).Q if wide.shape[0] < wide.shape[1] else None  # [d, n]
    rows = wide if basis is None else wide @ basis
    held = torch.full((rows.shape[1] + bias,), l2, dtype=torch.float64, device=wide.device)
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        held[-1] = 0.0
    found = torch.zeros(outputs, rows.shape[1], dtype=torch.float64, device=wide.device)
    for _ in range(MOST_NEWTON):
        logits = (rows @ found.T).requires_grad_()
        with torch.enable_grad():
            value = loss(logits)
            slope = torch.autograd.grad(value, logits, create_graph=True)[0]
        gradient = slope.detach().T @ rows + held * found
        if float(gradient.abs().max()) < GRADIENT:
            break

        def curve(step: torch.Tensor, slope: torch.Tensor = slope, logits: torch.Tensor = logits) -> torch.Tensor:
            return torch.autograd.grad(slope, logits, rows @ step.T, retain_graph=True)[0].T @ rows + held * step

        step = _conjugate(curve, -gradient)
        before, fall, share = float(value.detach() + _held(found, held)), float((gradient * step).sum()), 1.0
        while float(loss(rows @ (found + share * step).T) + _held(found + share * step, held)) > (
            before + 1e-4 * share * fall
        ):
            share /= 2
            if share < SHORTEST:  # nothing is left to gain but rounding
                break
        if share < SHORTEST:
            break
        found = found + share * step
    weight = found[:, :-1] if bias else found
    shift = found[:, -1] if bias else torch.zeros(outputs, dtype=torch.float64, device=wide.device)
    return weight if basis is None else weight @ basis.T, shift


def _held(found: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    return (held * found.square()).sum() / 2


def _conjugate(curve: Callable[[torch.Tensor], torch.Tensor], downhill: torch.Tensor) -> torch.Tensor:
    """The step x with curve(x) = downhill, the nearer the smaller the gradient is; conjugate gradients."""
    step, rest, way = torch.zeros_like(downhill), downhill.clone(), downhill.clone()
    size = first = float(rest.square().sum())
    for _ in range(MOST_CONJUGATE):
        bent = curve(way)
        bend = float((way * bent).sum())
        if bend <= 1e-14 * float(way.square().sum()):
            break
        step, rest = step + size / bend * way, rest - size / bend * bent
        size, last = float(rest.square().sum()), size
        if size <= min(0.01, math.sqrt(first)) * first:
            break
        way = rest + size / last * way
    return step if bool(step.any()) else downhill


def leave_one_out(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What a ridge regression on all other rows predicts for each row, in closed form: (H·Y - diag(H)·Y) / (1 - diag(H)).

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, eq. 7.64, with the kernel x·x' + 1.

    Args:
        features: [n, d], of norm 1 or so.
        targets: [n, k].

    Returns:
        [n, k] float64.
    """
    x, y = features.double(), targets.double()
    kernel = x @ x.T + 1
    hat = kernel @ torch.linalg.inv(kernel + RIDGE * torch.eye(len(x), dtype=torch.float64, device=x.device))
    own = hat.diagonal()[:, None]
    predicted: torch.Tensor = (hat @ y - own * y) / (1 - own)
    return predicted


def left_out_losses(features: torch.Tensor, classes: torch.Tensor, count: int) -> torch.Tensor:
    """The cross-entropy of each row's leave-one-out prediction, at the temperature that is best for all [n].

    Args:
        features: [n, d].
        classes: [n] int64.
        count: how many classes there are.
    """
    targets = torch.nn.functional.one_hot(classes, count).double()
    predicted = leave_one_out(features, targets - 1 / count)
    losses = [
        torch.nn.functional.cross_entropy(factor * predicted, classes, reduction="none")
        for factor in TEMPERATURES.to(predicted.device)
    ]
    return min(losses, key=lambda each: float(each.mean()))


def left_out_accuracy(features: torch.Tensor, classes: torch.Tensor) -> float:
    """The mean accuracy of the classes, each row given to the nearest mean of the classes' other rows, by cosine similarity.

    Args:
        features: [n, d].
        classes: [n] int64; the only row of a class is given to another.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    names = sorted(set(classes.tolist()))
    member = torch.stack([(classes == name).double() for name in names], dim=1)  # [n, k]
    sums, counts = member.T @ unit, member.sum(0)
    scores = unit @ sums.T  # of a sum, whose direction is the mean's
    own = (member * scores).sum(1)
    lengths = sums.norm(dim=1).clamp(min=1e-12).expand(len(unit), -1).clone()
    left = (sums[member.argmax(1)] - unit).norm(dim=1).clamp(min=1e-12)
    lengths[member.bool()] = left
    scores[member.bool()] = own - 1
    scores = scores / lengths
    scores[member.bool() & (counts <= 1).expand_as(member)] = -math.inf
    right = (scores.argmax(1) == member.argmax(1)).double()
    return float(torch.stack([right[member[:, k].bool()].mean() for k in range(len(names))]).mean())


def left_out_errors(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The squared error of each row's leave-one-out prediction [n].

    Args:
        features: [n, d].
        targets: [n, k].
    """
    centred = targets.double() - targets.double().mean(0)
    return (leave_one_out(features, centred) - centred).square().mean(1)


def left_out_objective(features: torch.Tensor, targets: torch.Tensor, *, classes: bool) -> torch.Tensor:
    """The loss of a batch's leave-one-out predictions, through which features are trained: what the head will be asked for.

    Args:
        features: [n, d]; they are brought to norm 1.
        targets: [n, k]: one-hot rows of classes, or what is to be predicted.
        classes: the cross-entropy of the classes; else the mean squared error.

    Returns:
        A number.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    predicted = leave_one_out(unit, targets)
    if classes:
        return torch.nn.functional.cross_entropy(predicted / SHARPNESS, targets.argmax(1))
    return (predicted - targets).square().mean()
