"""bfloat16 weights and moments: rounding that is right on average, and an AdamW that follows float32's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo.config import OptimizerConfig
from jaxpo.models.decoder import Decoder
from jaxpo.training.low_precision import LowPrecisionState, low_precision, stochastically_rounded
from jaxpo.training.optimizer import make_optimizer


def test_rounding_takes_the_neighbours_as_often_as_they_are_near() -> None:
    values = (np.random.default_rng(0).normal(size=64) * 10.0 ** np.arange(-32, 32)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4096)
    found = np.asarray(jax.vmap(lambda key: stochastically_rounded(jnp.asarray(values), key))(keys), np.float64)
    below = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    above = (below.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    assert np.all((found == below) | (found == above))
    share = (values.astype(np.float64) - below) / (above.astype(np.float64) - below)
    # Four standard deviations of a share of 4,096 draws.
    np.testing.assert_allclose((found == above).mean(axis=0), share, atol=4 * 0.5 / 64)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 3.3895314e38, 1e-40])
def test_rounding_leaves_alone_what_bfloat16_holds(value: float) -> None:
    kept = jnp.full(1000, value, jnp.bfloat16)
    found = stochastically_rounded(kept.astype(jnp.float32), jax.random.key(1))
    np.testing.assert_array_equal(found.astype(jnp.float32), kept.astype(jnp.float32))


def trained(dtype: Any, steps: int, rate: float, **settings: Any) -> np.ndarray:
    """Weights [10_000] that begin at 1 and have a gradient of 1 and some noise, after steps of AdamW."""
    config = OptimizerConfig(learning_rate=rate, schedule="constant", betas=(0.9, 0.999), **settings)
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=0.0)
    optimizer = low_precision(adamw, config.state_dtype or dtype, config.rounding)
    weights = jnp.ones(10_000, dtype)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        weights, state = carry
        grads = (1.0 + 0.5 * jax.random.normal(key, weights.shape)).astype(dtype)
        updates, state = optimizer.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), keys)
    return np.asarray(weights, np.float64)


def test_small_updates_arrive_on_average_and_to_the_nearest_they_are_lost() -> None:
    steps, rate = 400, 1e-4
    wanted = trained("float32", steps, rate)
    assert wanted.mean() == pytest.approx(1.0 - 0.9 * steps * rate, abs=0.005)
    found = trained("bfloat16", steps, rate)
    # A weight walks three distances between numbers of bfloat16 below 1 off its way: the mean of 10,000 weights is
    # exact to 0.00012.
    assert found.mean() == pytest.approx(wanted.mean(), abs=0.0005)
    assert np.all(trained("bfloat16", steps, rate, rounding="nearest") == 1.0)


def test_moments_alone_may_be_bfloat16() -> None:
    wanted, found = trained("float32", 400, 1e-4), trained("float32", 400, 1e-4, state_dtype="bfloat16")
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found.mean(), wanted.mean(), atol=2e-4)
    assert np.abs(found - wanted).max() < 0.05 * (1.0 - wanted.mean())
    # To the nearest, the second moment stops growing long before it is 1: steps stay too long.
    nearest = trained("float32", 400, 1e-4, state_dtype="bfloat16", rounding="nearest")
    assert abs(nearest.mean() - wanted.mean()) > 10 * abs(found.mean() - wanted.mean())


@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_has_the_dtype_that_was_asked_for(dtype: Any, state_dtype: Any, small_decoder: Decoder) -> None:
    decoder: Any = jax.tree.map(lambda p: jnp.asarray(p, dtype), small_decoder)
    optimizer = make_optimizer(OptimizerConfig(state_dtype=state_dtype), small_decoder.config, 10, 1.0, dtype)
    state = optimizer.init(decoder)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.01, jnp.float32), decoder)
    updates, after = optimizer.update(grads, state, decoder)
    moments = {str(leaf.dtype) for leaf in jax.tree.leaves(after) if leaf.size > 1}
    assert moments == {state_dtype or dtype}
    for new, old in zip(*map(jax.tree.leaves, (after, state)), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert isinstance(state, LowPrecisionState) == ("bfloat16" in (dtype, state_dtype))
    changed = optax.apply_updates(decoder, updates)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(changed)} == {dtype}


def test_the_same_state_gives_the_same_update_and_the_next_step_another() -> None:
    """A resumed run rounds as the run would have that it goes on from."""
    optimizer = low_precision(optax.sgd(1e-3), "bfloat16", "stochastic")
    weights = jnp.ones(1000, jnp.bfloat16)
    state = optimizer.init(weights)
    first, after = optimizer.update(weights, state, weights)
    again, _ = optimizer.update(weights, state, weights)
    later, _ = optimizer.update(weights, after, weights)
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(later))
    # Each leaf has its own draws.
    both, _ = optimizer.update([weights] * 2, optimizer.init([weights] * 2), [weights] * 2)
    one, other = map(np.asarray, jax.tree.leaves(both))
    assert np.any(one != other)
