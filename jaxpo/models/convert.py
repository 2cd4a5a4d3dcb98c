"""Hugging Face checkpoint to decoder, tensor by tensor, straight to where each parameter lives.

Host memory beyond the decoder itself is about the largest tensor: a tensor is mapped from its file, each device's share
of it copied out in the wanted dtype, and the mapping dropped before the next one.

Of several processes each reads the bytes of its share, and no others. The share of a device lies in one piece where the
file's outermost axis is the one that is split. Elsewhere, in a matrix that is stored transposed say, it would be a
piece of every row, and all processes would read all pages of the file; there each reads as many whole rows, and the
devices exchange what they have for what they are to have.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpo.console import progress
from jaxpo.models import native
from jaxpo.models.checkpoint import Checkpoint, StoredTensor
from jaxpo.models.decoder import Decoder, abstract_decoder, by_path, map_params, new_score
from jaxpo.models.families import Tensor


def load_decoder(
    checkpoint: Checkpoint, dtype: Any, shardings: Decoder | None = None, seed: int | None = None
) -> Decoder:
    """The checkpoint's decoder in `dtype`.

    `shardings` is a decoder with a Sharding for each leaf; without it all goes to the first device. A new score head is
    drawn from `seed`, in float32, the same wherever it lies: normal, of transformers' standard deviation.
    """
    abstract = abstract_decoder(checkpoint.decoder_config, dtype)
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    leaves = by_path(placed)
    params: dict[str, jax.Array] = {}
    if checkpoint.has_new_head:
        if seed is None:
            raise ValueError(f"{checkpoint.folder} has no score head, and there is no seed to draw one from")
        score = np.asarray(new_score(checkpoint.decoder_config, jax.random.key(seed)))
        params["score"] = jax.device_put(score.astype(dtype), leaves.pop("score").sharding)
    if checkpoint.native:
        passed_over = ["head"] if checkpoint.has_new_head and checkpoint.stored_config.head == "own" else []
        params |= native.read(checkpoint.folder, leaves, passed_over)
    else:
        params |= _stream(checkpoint, leaves)
    return map_params(lambda path, _: params[path], abstract)


def _stream(checkpoint: Checkpoint, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters of `leaves` from a checkpoint's tensors, one after the other."""
    fillings = {path: _Filling(leaf) for path, leaf in leaves.items()}
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with progress(f"loading {checkpoint.folder.name}", total, "B") as bar:
        for tensor in checkpoint.wanted:
            stored = checkpoint.tensors[tensor.name]
            _fill(fillings, tensor, stored)
            bar.advance(stored.nbytes)
    return {path: filling.array for path, filling in fillings.items()}


def _fill(fillings: Mapping[str, "_Filling"], tensor: Tensor, stored: StoredTensor) -> None:
    for name, part in zip(tensor.params, tensor.split(stored.read()), strict=True):
        fillings[name].put(part, tensor.layer)


class _Filling:
    """A parameter on its devices while it is filled, whole or layer by layer."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        assert leaf.sharding is not None
        self.shape, self.dtype, self.sharding = leaf.shape, np.dtype(leaf.dtype), leaf.sharding
        self._array: jax.Array | None = None

    @property
    def array(self) -> jax.Array:
        assert self._array is not None, "a checkpoint holds every parameter"
        return self._array

    def put(self, value: np.ndarray, layer: int | None) -> None:
        if layer is None:
            at = in_file_order(value, self.sharding)
            placed = self._place(value, at)
            self._array = placed if at is self.sharding else jax.jit(_same, out_shardings=self.sharding)(placed)
        else:
            if self._array is None:
                # From a number given at run time: XLA would keep a constant of this size in the compiled program.
                fill = jax.jit(jnp.broadcast_to, static_argnums=1, out_shardings=self.sharding)
                self._array = fill(np.zeros((), self.dtype), self.shape)
                self._insert = jax.jit(_insert, donate_argnums=0, out_shardings=self.sharding)
            at = in_file_order(value, _without_first_axis(self.sharding))
            self._array = self._insert(self._array, self._place(value, at), layer)
        # Devices work behind our back: without waiting, the copies of many tensors would pile up on the host.
        jax.block_until_ready(self._array)

    def _place(self, value: np.ndarray, sharding: Sharding) -> jax.Array:
        # A copy even where the dtype is right: jax may keep the memory it is given, and a mapped file can change.
        copy = partial(np.array, dtype=self.dtype, order="C")
        return jax.make_array_from_callback(value.shape, sharding, lambda index: copy(value[index]))


def in_file_order(value: np.ndarray, sharding: Sharding) -> Sharding:
    """Where to read a mapped array of several processes: in as many parts as `sharding` has, each in one piece.

    Which axis is the outermost one in the file is told by the strides. `sharding` itself where its parts are such
    pieces, where one process has them all, or where the outermost axis does not divide evenly.
    """
    if sharding.is_fully_addressable or not isinstance(sharding, NamedSharding):
        return sharding
    split = {axis: names for axis, names in enumerate(sharding.spec) if names is not None}
    outermost = max(range(value.ndim), key=lambda axis: value.strides[axis], default=0)
    over = tuple(name for names in split.values() for name in ((names,) if isinstance(names, str) else names))
    parts = math.prod(sharding.mesh.shape[name] for name in over)
    if split.keys() <= {outermost} or value.shape[outermost] % parts:
        return sharding
    spec = (over if axis == outermost else None for axis in range(value.ndim))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _same(value: jax.Array) -> jax.Array:
    return value


def _insert(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _without_first_axis(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding
