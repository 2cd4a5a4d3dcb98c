"""Weights and moments kept in bfloat16, for an optimizer that computes in float32.

Rounded to the nearest, a weight of bfloat16 never moves by less than a 256th of itself, as every step of a fine-tuning
would have it, and a second moment with a beta of 0.999 never falls. Rounded up or down at random, so that the mean is
right, both follow what float32 would have done (Zamirai et al. 2020, arXiv 2010.06192, sec. 4.1).
"""

from itertools import accumulate
from operator import mul
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

Rounding = Literal["nearest", "stochastic"]


class LowPrecisionState(NamedTuple):
    """The number of updates done, from which what is random follows, and the optimizer's state as it is kept."""

    updates: jax.Array
    inner: Any


def low_precision(
    optimizer: optax.GradientTransformation, state_dtype: str, rounding: Rounding
) -> optax.GradientTransformation:
    """The optimizer, its state kept in `state_dtype`. It sees gradients, weights and its state in float32.

    Updates are such that the weights, with them added, are rounded as `rounding` says to their own dtype.
    """

    def kept(tree: Any, dtypes: Any, key: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        each = enumerate(zip(leaves, jax.tree.leaves(dtypes), strict=True))
        return structure.unflatten([rounded(x, dtype, jax.random.fold_in(key, n), rounding) for n, (x, dtype) in each])

    def state_dtypes(inner: Any) -> Any:
        return jax.tree.map(lambda x: jnp.dtype(state_dtype) if is_float(x) else x.dtype, inner)

    def init(params: Any) -> LowPrecisionState:
        inner = optimizer.init(in_float32(params))
        inner = jax.tree.map(lambda x, dtype: x.astype(dtype), inner, state_dtypes(inner))
        return LowPrecisionState(jnp.zeros((), jnp.int32), inner)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        of_weights, of_state = jax.random.split(jax.random.fold_in(jax.random.key(0), state.updates))
        weights = in_float32(params)
        updates, inner = optimizer.update(in_float32(updates), in_float32(state.inner), weights)
        dtypes = jax.tree.map(lambda p: p.dtype, params)
        after = kept(jax.tree.map(jnp.add, weights, updates), dtypes, of_weights)
        updates = jax.tree.map(lambda q, p: q.astype(jnp.float32) - p, after, weights)
        return updates, LowPrecisionState(state.updates + 1, kept(inner, state_dtypes(inner), of_state))

    return optax.GradientTransformation(init, update)


def is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_float(x) else x, tree)


def rounded(x: jax.Array, dtype: Any, key: jax.Array, rounding: Rounding) -> jax.Array:
    if rounding == "stochastic" and x.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return stochastically_rounded(x, key)
    return x.astype(dtype)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16 of float32 x: one of its two neighbours, the nearer the likelier, so that x is the mean.

    What bfloat16 holds stays as it is; so do infinities and NaN.
    """
    # bfloat16 is the upper half of float32: random lower halves carry into it as often as they should.
    noise = noise_like(x, jax.random.bits(key, (), jnp.uint32)) & jnp.uint32(0xFFFF)
    pattern = (lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), lax.bitcast_convert_type(pattern, jnp.float32), x).astype(jnp.bfloat16)


def noise_like(x: jax.Array, seed: jax.Array) -> jax.Array:
    """uint32 of x's shape, uniform at random: a hash (lowbias32, Wellons 2018) of each element's number and the seed.

    Unlike jax.random's, it becomes a part of the loop that uses it, on any mesh: nothing is stored, and what a
    cryptographic hash would cost, ten times the optimizer on a CPU, is saved.
    """
    number = jnp.broadcast_to(seed, x.shape)
    for axis, stride in enumerate(accumulate(reversed(x.shape[1:]), mul, initial=1)):
        number += lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1 - axis) * jnp.uint32(stride % 2**32)
    number = (number ^ (number >> 16)) * jnp.uint32(0x7FEB352D)
    number = (number ^ (number >> 15)) * jnp.uint32(0x846CA68B)
    return number ^ (number >> 16)
