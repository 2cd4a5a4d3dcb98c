"""The device mesh and where arrays live on it: one table from logical to mesh axes, apart from the model's code."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpo.batch import DeviceBatch, HostBatch
from jaxpo.config import MeshConfig
from jaxpo.errors import UserError
from jaxpo.models.attention import Attention, Context
from jaxpo.models.decoder import (
    LOGICAL_AXES,
    Decoder,
    DecoderConfig,
    abstract_decoder,
    logical_axes,
    map_params,
)
from jaxpo.models.product import Parts
from jaxpo.objectives.score import Score, Scores
from jaxpo.training.flops import PEAK

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# A parameter's logical axis is split over this mesh axis; what is not named here is not split.
RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices, data x fsdp x tensor; an axis of -1 takes what the others leave."""
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.device_count()
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh is data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}, which cannot cover the {devices} "
            f"{jax.default_backend()} device(s) here: expected axes whose product is {devices} (-1 takes the rest)."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _along(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """What a spec says of some mesh axes."""
    return PartitionSpec(*(axis if axis in axes else None for axis in spec))


def on_devices(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of all: each process moves what its own devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    places = sharding.addressable_devices_indices_map(array.shape)
    parts = [jax.device_put(array[index], device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


@dataclass(frozen=True)
class Layout:
    """Shardings on a mesh for everything a step touches."""

    mesh: Mesh

    @property
    def batch_devices(self) -> int:
        """Devices that a microbatch's rows are split over."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def peak_flops(self) -> float | None:
        """What all devices could do in a second, in bfloat16; None where that is not known."""
        devices = list(self.mesh.devices.flat)
        each = PEAK.get(devices[0].device_kind)
        return each and each * len(devices)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """For [M, R, ...] arrays of a packed batch."""
        return NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))

    def put(self, batch: HostBatch) -> DeviceBatch:
        """A packed batch on the devices: rows split over them, totals on each."""
        at = (self.rows if np.ndim(field) > 1 else self.replicated for field in batch)
        return DeviceBatch(*(on_devices(field, sharding) for field, sharding in zip(batch, at, strict=True)))

    def over_rows(self, score: Score) -> Score:
        """`score`, run on every device by itself: on its own rows, and its own parts of the weights.

        What crosses devices is then what is written down here and in `product.linears`, nothing that a partitioner
        thought of: along `fsdp` weights are gathered where they are used, and the gradients of their parts summed to
        where these lie. Only along `tensor` a partitioner divides what is left.
        """
        if self.mesh.size == 1:
            return score

        def on_all(decoder: Decoder, batch: DeviceBatch) -> Scores:
            weights = jax.tree.map(lambda at: _along(at.spec, BATCH_AXES), self.decoder(decoder.config, decoder))
            rows = PartitionSpec(BATCH_AXES)
            fields: list[Any] = [rows if np.ndim(field) > 1 else PartitionSpec() for field in batch]
            return jax.shard_map(
                score,
                mesh=self.mesh,
                in_specs=(weights, DeviceBatch(*fields)),
                out_specs=rows,
                # With nothing to divide along `tensor` a device is all by itself, as kernels want it.
                axis_names={*BATCH_AXES} if self.mesh.shape["tensor"] > 1 else {*AXES},
                check_vma=False,
            )(decoder, batch)

        return on_all

    def parts(self, config: DecoderConfig) -> Parts | None:
        """How matrices are split along the width of the residual stream, None if they are not."""
        (over,) = self.parameter((config.width,), ("embed",)).spec
        across = RULES["mlp"]
        return Parts(over, across, self.mesh.shape[across]) if over and self.mesh.shape[over] > 1 else None

    def whole(self, decoder: Decoder) -> Decoder:
        """Inside `over_rows`: the decoder with whole matrices outside its blocks, which are used more than once."""
        parts = self.parts(decoder.config)

        def gather(path: str, leaf: jax.Array) -> jax.Array:
            if parts is None or path.startswith("blocks.") or LOGICAL_AXES[path][-1] != "embed":
                return leaf
            # Of what lies along no mesh axis there is nothing to divide.
            return parts.split(1, leaf.shape[0] if LOGICAL_AXES[path][0] in RULES else 1).whole(leaf)

        return map_params(gather, decoder)

    def spread(self, attention: Attention) -> Attention:
        """Inside `over_rows`: `attention`, run on every device of `tensor` by itself, on its own heads.

        A loop over tiles or a kernel's call is nothing that a partitioner could split. Heads that do not divide evenly
        are computed on each device.
        """
        if self.mesh.shape["tensor"] == 1:
            return attention

        def on_each(q: jax.Array, k: jax.Array, v: jax.Array, context: Context, window: int | None) -> jax.Array:
            even = k.shape[2] % self.mesh.shape[RULES["kv_heads"]] == 0
            heads = PartitionSpec(None, None, RULES["kv_heads"] if even else None)
            return jax.shard_map(
                lambda q, k, v, context: attention(q, k, v, context, window),
                in_specs=(heads, heads, heads, PartitionSpec()),
                out_specs=heads,
                axis_names={RULES["kv_heads"]},
                # Copies on devices of `tensor` are equal, which the check cannot see through loops.
                check_vma=False,
            )(q, k, v, context)

        return on_each

    def parameter(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        """A parameter's sharding from its logical axes; an axis that does not divide evenly stays whole."""
        spec = [RULES.get(axis or "") for axis in axes]
        spec = [m if m and size % self.mesh.shape[m] == 0 else None for m, size in zip(spec, shape, strict=True)]
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def decoder(self, config: DecoderConfig, abstract: Decoder) -> Decoder:
        """Shardings shaped like the decoder whose arrays (or their shapes) `abstract` holds."""
        axes = jax.tree.leaves(logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
        leaves, tree = jax.tree.flatten(abstract)
        return tree.unflatten([self.parameter(a.shape, names) for a, names in zip(leaves, axes, strict=True)])

    def place(self, config: DecoderConfig, abstract: Any) -> Any:
        """`abstract` (a pytree of shapes) with a sharding on every leaf.

        A leaf that belongs to a parameter of the decoder, as in the optimizer's moments, lies where the parameter does;
        any other is on every device.
        """
        decoder = abstract_decoder(config, jnp.float32)
        at = {
            f".{jax.tree_util.keystr(path, simple=True, separator='.')}": sharding
            for (path, _), sharding in zip(
                jax.tree_util.tree_leaves_with_path(decoder),
                jax.tree.leaves(self.decoder(config, decoder)),
                strict=True,
            )
        }

        def put(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            name = f".{jax.tree_util.keystr(path, simple=True, separator='.')}"
            sharding = next((at[param] for param in at if name.endswith(param)), self.replicated)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(put, abstract)
