"""Checksums of arrays on their devices, by which a checkpoint that was changed on disk is told from a good one."""

from typing import Any

import jax
import jax.numpy as jnp


def checksum(array: jax.Array) -> jax.Array:
    """A uint32 [] of the array's bits and their places, the same however it is sharded; one flipped bit changes it.

    TensorStore checks the small parts of a checkpoint only: without this a flipped byte of a weight would go unnoticed.
    """
    # Moments may lie in the host's memory, where nothing is computed.
    array = jax.device_put(array, jax.memory.Space.Device)
    bits = jax.lax.bitcast_convert_type(array, {4: jnp.uint32, 2: jnp.uint16}[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    # An odd factor modulo 2^32 can be undone, so no change of a single number cancels out.
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


checksum_all = jax.jit(lambda arrays: {name: checksum(array) for name, array in arrays.items()})


def checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """The checksum of every array."""
    return {name: int(value) for name, value in jax.device_get(checksum_all(arrays)).items()}


def check_sums(arrays: dict[str, Any], sums: dict[str, int]) -> None:
    """Raise ValueError unless the arrays are the ones whose checksums were written."""
    damaged = [name for name, value in checksums(arrays).items() if sums[name] != value]
    if damaged:
        raise ValueError(f"{', '.join(damaged[:4])} changed since it was written.")
