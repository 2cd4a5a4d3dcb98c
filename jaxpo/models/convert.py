"""Hugging Face checkpoint to decoder, tensor by tensor, straight to where each parameter lives.

Host memory beyond the decoder itself is about the largest tensor: a tensor is mapped from its file, each device's share
of it copied out in the wanted dtype, and the mapping dropped before the next one.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpo.console import progress
from jaxpo.models import native
from jaxpo.models.checkpoint import Checkpoint, StoredTensor, read_checkpoint
from jaxpo.models.decoder import Decoder, DecoderConfig, abstract_decoder, map_params, param_path
from jaxpo.models.families import Tensor

Place = Callable[[DecoderConfig, Decoder], Decoder]


def load(
    path: str | Path, revision: str | None = None, dtype: Any = jnp.float32, place: Place | None = None
) -> Decoder:
    """The decoder of a folder or hub id, in `dtype`.

    `place(config, abstract decoder)` gives its shardings, as `load_decoder` takes them.
    """
    checkpoint = read_checkpoint(path, revision)
    config = checkpoint.decoder_config
    shardings = None if place is None else place(config, abstract_decoder(config, dtype))
    return load_decoder(checkpoint, dtype, shardings)


def load_decoder(checkpoint: Checkpoint, dtype: Any, shardings: Decoder | None = None) -> Decoder:
    """The checkpoint's decoder in `dtype`.

    `shardings` is a decoder with a Sharding for each leaf; without it all goes to the first device.
    """
    abstract = abstract_decoder(checkpoint.decoder_config, dtype)
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    if checkpoint.native:
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        return native.read(checkpoint.folder, placed)
    params = {
        param_path(path): _Filling(leaf.shape, np.dtype(leaf.dtype), sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True
        )
    }
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with progress(f"loading {checkpoint.folder.name}", total, "B") as bar:
        for tensor in checkpoint.wanted:
            stored = checkpoint.tensors[tensor.name]
            _fill(params, tensor, stored)
            bar.advance(stored.nbytes)
    return map_params(lambda path, _: params[path].array, abstract)


def _fill(params: dict[str, "_Filling"], tensor: Tensor, stored: StoredTensor) -> None:
    for name, part in zip(tensor.params, tensor.split(stored.read()), strict=True):
        params[name].put(part, tensor.layer)


class _Filling:
    """A parameter on its devices while it is filled, whole or layer by layer."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self._array: jax.Array | None = None

    @property
    def array(self) -> jax.Array:
        assert self._array is not None, "a checkpoint holds every parameter"
        return self._array

    def put(self, value: np.ndarray, layer: int | None) -> None:
        if layer is None:
            self._array = self._place(value, self.sharding)
        else:
            if self._array is None:
                # From a number given at run time: XLA would keep a constant of this size in the compiled program.
                fill = jax.jit(jnp.broadcast_to, static_argnums=1, out_shardings=self.sharding)
                self._array = fill(np.zeros((), self.dtype), self.shape)
                self._insert = jax.jit(_insert, donate_argnums=0, out_shardings=self.sharding)
            self._array = self._insert(self._array, self._place(value, _without_first_axis(self.sharding)), layer)
        # Devices work behind our back: without waiting, the copies of many tensors would pile up on the host.
        jax.block_until_ready(self._array)

    def _place(self, value: np.ndarray, sharding: Sharding) -> jax.Array:
        # A copy even where the dtype is right: jax may keep the memory it is given, and a mapped file can change.
        copy = partial(np.array, dtype=self.dtype, order="C")
        return jax.make_array_from_callback(value.shape, sharding, lambda index: copy(value[index]))


def _insert(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _without_first_axis(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding
