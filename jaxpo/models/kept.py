"""What a layer keeps for its backward pass, and what it computes again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# The platform that programs are made for, where it is not that of the process.
_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def made_for(platform: str) -> Iterator[None]:
    """Programs are traced for a platform that this process has no device of."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function of arrays, of which only the arguments are kept for the backward pass, which computes it again.

    For what is cheaper to compute than to write and read. The function must not close over traced arrays.
    """

    @jax.custom_vjp
    @wraps(function)
    def once(*arguments: jax.Array) -> jax.Array:
        return function(*arguments)

    def forward(*arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return function(*arguments), tuple(map(keep, arguments))

    def backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[Any, ...]:
        return jax.vjp(function, *map(restore, kept))[1](gradient)

    once.defvjp(forward, backward)
    return once


def named(x: jax.Array, name: str) -> jax.Array:
    """x under a name that a policy of `jax.checkpoint` may say to keep. For forward passes of a custom_vjp only."""
    return restore(checkpoint_name(keep(x), name))


def named_anywhere(x: jax.Array, name: str) -> jax.Array:
    """As `named`, which by itself passes no gradient on: integers have none."""
    same: Any = _named(x, name)
    return same


_named = jax.custom_vjp(named, nondiff_argnums=(1,))
_named.defvjp(lambda x, name: (named(x, name), None), lambda _name, _kept, gradient: (gradient,))


def kept_as_integers(x: jax.Array) -> bool:
    """Whether `keep` makes integers of x: on a CPU, by the default backend of the process or `made_for`.

    XLA updates a bfloat16 array on a CPU by way of float32, all of what is stacked for each layer.
    """
    return x.dtype == jnp.bfloat16 and (_PLATFORM.get() or jax.default_backend()) == "cpu"


def keep(x: jax.Array) -> jax.Array:
    """x in the form in which a scan over layers stacks it; `restore` undoes it."""
    return lax.bitcast_convert_type(x, jnp.uint16) if kept_as_integers(x) else x


def restore(kept: jax.Array) -> jax.Array:
    """What was given to `keep`."""
    return lax.bitcast_convert_type(kept, jnp.bfloat16) if kept.dtype == jnp.uint16 else kept
