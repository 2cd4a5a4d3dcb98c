"""Losses against their formulas in float64 NumPy, values and gradients."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.objectives import losses

Formula = Callable[[np.ndarray, np.ndarray], np.ndarray]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def dpo_formula(chosen: np.ndarray, rejected: np.ndarray, beta: float, smoothing: float = 0.0) -> np.ndarray:
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)


def ipo_formula(chosen: np.ndarray, rejected: np.ndarray, beta: float) -> np.ndarray:
    return (chosen - rejected - 1 / (2 * beta)) ** 2


CASES = {
    "dpo": (losses.dpo, dpo_formula, {"beta": 0.1}),
    "dpo-steep": (losses.dpo, dpo_formula, {"beta": 2.5}),
    "cdpo": (partial(losses.dpo, label_smoothing=0.2), partial(dpo_formula, smoothing=0.2), {"beta": 0.1}),
    "ipo": (losses.ipo, ipo_formula, {"beta": 0.1}),
    "ipo-flat": (losses.ipo, ipo_formula, {"beta": 0.7}),
}


def log_ratios() -> tuple[np.ndarray, np.ndarray]:
    """Float32 numbers, near zero and far from it, as float64."""
    rng = np.random.default_rng(1)
    scale = np.repeat([0.01, 1.0, 20.0], 40)
    chosen, rejected = rng.normal(size=(2, 120)) * scale
    return chosen.astype(np.float32).astype(np.float64), rejected.astype(np.float32).astype(np.float64)


def slopes(formula: Formula, chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences of a float64 formula."""
    h = 1e-4
    return (
        (formula(chosen + h, rejected) - formula(chosen - h, rejected)) / (2 * h),
        (formula(chosen, rejected + h) - formula(chosen, rejected - h)) / (2 * h),
    )


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_the_formulas(case: str) -> None:
    loss, formula, settings = CASES[case]
    chosen, rejected = log_ratios()
    value = loss(jnp.float32(chosen), jnp.float32(rejected), **settings)
    np.testing.assert_allclose(value, formula(chosen, rejected, **settings), rtol=2e-6, atol=1e-7)

    gradient = jax.grad(lambda c, r: loss(c, r, **settings).sum(), argnums=(0, 1))
    expected = slopes(partial(formula, **settings), chosen, rejected)
    for found, wanted in zip(gradient(jnp.float32(chosen), jnp.float32(rejected)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_dpo_gradient_is_minus_beta_sigmoid_of_minus_the_margin() -> None:
    """Equation 7's gradient, from the paper: beta * sigmoid(rejected reward - chosen reward), on each side."""
    beta, c, r = 0.3, 1.5, -0.25
    weight = beta / (1.0 + math.exp(beta * (c - r)))
    found = jax.grad(losses.dpo, argnums=(0, 1))(c, r, beta)
    np.testing.assert_allclose(found, (-weight, weight), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_of_the_reference_itself_is_ln_2(beta: float, smoothing: float) -> None:
    np.testing.assert_allclose(losses.dpo(jnp.zeros(3), jnp.zeros(3), beta, smoothing), math.log(2), rtol=1e-7)


def test_dpo_sees_the_margin_only() -> None:
    chosen, rejected = map(jnp.float32, log_ratios())
    shifted = losses.dpo(chosen + 4.0, rejected + 4.0, 0.1)
    np.testing.assert_allclose(shifted, losses.dpo(chosen, rejected, 0.1), atol=1e-6)


def test_label_smoothing_is_the_expectation_over_flipped_labels() -> None:
    chosen, rejected = map(jnp.float32, log_ratios())
    right, flipped = losses.dpo(chosen, rejected, 0.1), losses.dpo(rejected, chosen, 0.1)
    mixed = losses.dpo(chosen, rejected, 0.1, label_smoothing=0.25)
    np.testing.assert_allclose(mixed, 0.75 * right + 0.25 * flipped, rtol=1e-6)


def test_conservative_dpo_is_least_where_the_model_is_as_sure_as_the_labels() -> None:
    beta, smoothing = 0.2, 0.1
    margin = math.log((1 - smoothing) / smoothing) / beta
    slope = jax.grad(losses.dpo)
    assert abs(slope(margin, 0.0, beta, smoothing)) < 1e-7
    assert slope(margin - 0.1, 0.0, beta, smoothing) < -1e-5
    assert slope(margin + 0.1, 0.0, beta, smoothing) > 1e-5


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_least_at_a_margin_of_one_over_two_beta(beta: float) -> None:
    target = 1.0 / (2.0 * beta)
    slope = jax.grad(losses.ipo)
    assert losses.ipo(jnp.float32(target), jnp.float32(0.0), beta) == 0.0
    assert slope(target, 0.0, beta) == 0.0
    assert slope(target - 0.5, 0.0, beta) == pytest.approx(-1.0)
    assert slope(target + 0.5, 0.0, beta) == pytest.approx(1.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("chosen", "rejected"), [(500.0, -500.0), (-500.0, 500.0), (500.0, 500.0), (-500.0, -500.0)])
def test_extreme_log_ratios_stay_exact(case: str, chosen: float, rejected: float) -> None:
    loss, formula, settings = CASES[case]
    c, r = jnp.float32([chosen]), jnp.float32([rejected])
    exact = np.array([chosen]), np.array([rejected])
    np.testing.assert_allclose(loss(c, r, **settings), formula(*exact, **settings), rtol=1e-6, atol=1e-30)
    found = jax.grad(lambda c, r: loss(c, r, **settings).sum(), argnums=(0, 1))(c, r)
    expected = slopes(partial(formula, **settings), *exact)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
