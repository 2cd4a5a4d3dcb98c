"""The optimizer's state in the hosts' memory: on the devices it takes room only while an update is computed."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def offloaded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, its moments handed out and taken in the hosts' memory. What it computes is the same to the bit."""

    def init(params: Any) -> Any:
        return moved(optimizer.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, moved(state, jax.memory.Space.Device), params)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformation(init, update)


def moved(state: Any, space: Any) -> Any:
    """The arrays of a state in another memory."""
    return _moments(lambda leaf: jax.device_put(leaf, space), state)


def in_host_memory(state: Any) -> Any:
    """The shapes and shardings of a state as `offloaded` leaves it, from those of one on the devices."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind("pinned_host"))

    return _moments(placed, state)


def _moments(function: Callable[[Any], Any], state: Any) -> Any:
    """The state with function(moment) for each moment; counters, which have no axis, stay as they are."""
    return jax.tree.map(lambda leaf: function(leaf) if leaf.ndim else leaf, state)
