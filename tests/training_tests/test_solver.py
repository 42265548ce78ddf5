"""A head that is solved: scikit-learn's optimum, a gradient of zero, and leave-one-out predictions equal to fits without each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from torch.nn import functional as F

from wlora_merge.training.solver import (
    RIDGE,
    leave_one_out,
    left_out_accuracy,
    left_out_errors,
    left_out_losses,
    left_out_objective,
    solve,
)

EXACT: dict[str, Any] = {"tol": 1e-12, "max_iter": 20000}


def rows_of(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator), dim=1)


def slope(
    rows: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    l2: float,
) -> float:
    """The largest element of the objective's gradient."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    value = loss(rows.double() @ weight.T + bias) + l2 / 2 * weight.square().sum()
    return max(float(g.abs().max()) for g in torch.autograd.grad(value, [weight, bias]))


@pytest.mark.parametrize(("n", "d", "classes"), [(44, 384, 11), (60, 8, 3), (12, 5, 12)])
def test_a_head_of_several_classes_is_scikit_learn_s(n: int, d: int, classes: int) -> None:
    rows, wanted = rows_of(n, d), torch.arange(n) % classes
    loss = lambda logits: F.cross_entropy(logits, wanted, reduction="sum")  # noqa: E731
    weight, bias = solve(rows, loss, classes, 0.1, bias=True)
    assert slope(rows, loss, weight, bias, 0.1) < 1e-8
    theirs = LogisticRegression(C=10.0, **EXACT).fit(rows.double().numpy(), wanted.numpy())
    got = (rows.double() @ weight.T + bias).softmax(1)
    np.testing.assert_allclose(got.numpy(), theirs.predict_proba(rows.double().numpy()), atol=1e-5)


def test_a_head_of_two_classes_holds_its_weight_as_scikit_learn_holds_one_vector() -> None:
    rows, wanted = rows_of(16, 40), torch.arange(16) % 2
    weight, bias = solve(rows, lambda logits: F.cross_entropy(logits, wanted, reduction="sum"), 2, 0.2, bias=True)
    theirs = LogisticRegression(C=10.0, **EXACT).fit(rows.double().numpy(), wanted.numpy())
    np.testing.assert_allclose((weight[1] - weight[0]).numpy(), theirs.coef_[0], atol=1e-5)
    assert float(bias[1] - bias[0]) == pytest.approx(float(theirs.intercept_[0]), abs=1e-5)


def test_a_head_without_a_bias_is_scikit_learn_s_without_an_intercept() -> None:
    rows, wanted = rows_of(30, 12), torch.arange(30) % 3
    weight, bias = solve(rows, lambda logits: F.cross_entropy(logits, wanted, reduction="sum"), 3, 0.1, bias=False)
    theirs = LogisticRegression(C=10.0, fit_intercept=False, **EXACT).fit(rows.double().numpy(), wanted.numpy())
    assert not bias.any()
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=1e-5)


def test_several_labels_are_one_against_the_rest() -> None:
    rows = rows_of(40, 60)
    wanted = (torch.rand(40, 4, generator=torch.Generator().manual_seed(1)) < 0.4).double()
    loss = lambda logits: F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")  # noqa: E731
    weight, bias = solve(rows, loss, 4, 0.1, bias=True)
    theirs = OneVsRestClassifier(LogisticRegression(C=10.0, **EXACT)).fit(rows.double().numpy(), wanted.int().numpy())
    got = (rows.double() @ weight.T + bias).sigmoid()
    np.testing.assert_allclose(got.numpy(), theirs.predict_proba(rows.double().numpy()), atol=1e-5)


def test_a_regression_is_ridge_regression() -> None:
    rows, wanted = rows_of(20, 50), torch.linspace(-1, 3, 20, dtype=torch.float64)
    loss = lambda logits: (logits.squeeze(-1) - wanted).square().sum() / 2  # noqa: E731
    weight, bias = solve(rows, loss, 1, 0.1, bias=True)
    theirs = Ridge(alpha=0.1, solver="svd").fit(rows.double().numpy(), wanted.numpy())
    np.testing.assert_allclose(weight[0].numpy(), theirs.coef_, atol=1e-9)
    assert float(bias) == pytest.approx(float(theirs.intercept_), abs=1e-9)


def test_classes_that_a_line_divides_and_equal_rows_have_a_finite_head() -> None:
    rows = torch.cat([torch.ones(4, 3), -torch.ones(4, 3)]) / 3**0.5
    wanted = torch.tensor([0] * 4 + [1] * 4)
    loss = lambda logits: F.cross_entropy(logits, wanted, reduction="sum")  # noqa: E731
    weight, bias = solve(rows, loss, 2, 0.2, bias=True)
    assert slope(rows, loss, weight, bias, 0.2) < 1e-8
    assert bool(((rows.double() @ weight.T + bias).argmax(1) == wanted).all())


def test_leave_one_out_predictions_are_those_of_fits_without_each_row() -> None:
    rows, targets = rows_of(9, 6).double(), torch.randn(9, 2, generator=torch.Generator().manual_seed(2)).double()
    got = leave_one_out(rows, targets)
    for left in range(9):
        kept = [row for row in range(9) if row != left]
        kernel = rows @ rows.T + 1
        model = KernelRidge(alpha=RIDGE, kernel="precomputed").fit(kernel[kept][:, kept].numpy(), targets[kept].numpy())
        np.testing.assert_allclose(got[left].numpy(), model.predict(kernel[left][kept][None].numpy())[0], atol=1e-10)
    assert float(left_out_errors(rows, targets).mean()) == pytest.approx(
        float((leave_one_out(rows, targets - targets.mean(0)) - targets + targets.mean(0)).square().mean())
    )


def test_the_accuracy_of_nearest_means_leaves_each_row_out() -> None:
    rows, classes = rows_of(14, 5), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3])
    right: dict[int, list[bool]] = {}
    for left in range(14):
        others = torch.arange(14) != left
        means = [rows[others & (classes == name)].mean(0) for name in range(4)]
        best = max(range(4), key=lambda name: float(F.cosine_similarity(rows[left], means[name], dim=0)))
        right.setdefault(int(classes[left]), []).append(best == int(classes[left]))
    wanted = np.mean([np.mean(values) for values in right.values()])
    assert left_out_accuracy(rows, classes) == pytest.approx(float(wanted))
    assert left_out_accuracy(rows[:3], torch.tensor([0, 1, 2])) == 0.0  # the only one of a class is never given to it


def test_features_that_tell_classes_apart_have_a_lower_left_out_loss() -> None:
    classes = torch.arange(12) % 3
    apart = F.normalize(F.one_hot(classes, 3).float() + 0.1 * rows_of(12, 3), dim=1)
    close, mixed = (float(left_out_losses(rows, classes, 3).mean()) for rows in (apart, rows_of(12, 3)))
    assert close < 0.5 < mixed


@pytest.mark.parametrize("classes", [True, False])
def test_the_left_out_objective_has_the_gradient_of_finite_differences(classes: bool) -> None:
    rows = rows_of(6, 4).requires_grad_()
    targets = F.one_hot(torch.arange(6) % 2, 2).float()
    left_out_objective(rows, targets, classes=classes).backward()
    for i, j in ((0, 0), (3, 2), (5, 3)):
        step = torch.zeros(6, 4)
        step[i, j] = 1e-2
        with torch.no_grad():
            up, down = (float(left_out_objective(rows + s * step, targets, classes=classes)) for s in (1, -1))
        assert float(rows.grad[i, j]) == pytest.approx((up - down) / 2e-2, abs=2e-3)  # type: ignore[index]
