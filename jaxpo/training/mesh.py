"""The device mesh and where arrays live on it: one table from logical to mesh axes, apart from the model's code."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpo.batch import DeviceBatch, HostBatch, PackedBatch
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
from jaxpo.training import sequence
from jaxpo.training.flops import PEAK

AXES = ("data", "fsdp", "sequence", "tensor")
# A microbatch's rows are split over these, and the tokens of each row over another one.
BATCH_AXES = ("data", "fsdp")
SEQUENCE = "sequence"
# Along these every device computes by itself; what lies along `tensor` a partitioner divides.
BY_THEMSELVES = (*BATCH_AXES, SEQUENCE)

# A parameter's logical axis is split over these mesh axes; what is not named here is not split.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", SEQUENCE),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def axis_sizes(config: MeshConfig, devices: int, called: str) -> dict[str, int]:
    """The size of each axis of a mesh over so many devices, `called` so; -1 takes what the others leave.

    Raises UserError where they do not come out.
    """
    asked = {axis: dataclasses.asdict(config)[axis] for axis in AXES}
    rest = math.prod(size for size in asked.values() if size != -1)
    sizes = {axis: devices // rest if size == -1 else size for axis, size in asked.items()}
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"mesh is {', '.join(f'{axis}={size}' for axis, size in asked.items())}, which cannot cover the {devices} "
            f"{called}: expected axes whose product is {devices} (-1 takes the rest)."
        )
    return sizes


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices: data x fsdp x sequence x tensor."""
    sizes = axis_sizes(config, jax.device_count(), f"{jax.default_backend()} device(s) here")
    devices = near_each_other(tuple(sizes.values()), jax.devices())
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def near_each_other(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in axes of these sizes, such that along each of them a TPU's chips are near each other.

    Slices of TPUs, which only a network joins, lie along `data`. Raises UserError where they cannot.
    """
    # Only TPUs of several slices have the attribute; GPUs of several hosts, too, but there any axis may go across.
    tpus = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpus else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *rest = sizes
    if data % slices:
        raise UserError(
            f"mesh.data is {data} on {slices} slices of TPUs, of which each has copies of its own; expected a multiple "
            f"of {slices}."
        )
    within, across = (data // slices, *rest), (slices, *(1 for _ in rest))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def _of_axes(axes: tuple[str, ...], spec: PartitionSpec) -> PartitionSpec:
    """What a spec says of some mesh axes."""
    each = [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in spec]
    return PartitionSpec(*(tuple(axis for axis in names if axis in axes) or None for names in each))


def on_devices(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of all: each process moves what its own devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # Not make_array_from_callback, whose transfers are implicit ones: the training loop's guard refuses those.
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
        return self._devices(BATCH_AXES)

    def _devices(self, axes: Sequence[str]) -> int:
        """Devices along some mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

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
    def row_devices(self) -> int:
        """Devices that a row's tokens are split over."""
        return self.mesh.shape[SEQUENCE]

    def fields(self, batch: PackedBatch[Any]) -> PackedBatch[Any]:
        """How the fields of a packed batch are split: rows, and along the sequence what is of tokens; not its totals.

        Of a whole batch, fields [M, R, ...], or of a microbatch, [R, ...].
        """
        whole = np.ndim(batch.tokens) == 3

        def spec(name: str, field: Any) -> PartitionSpec:
            if np.ndim(field) < 2:
                return PartitionSpec()
            split = (BATCH_AXES, SEQUENCE) if name in sequence.SPLIT else (BATCH_AXES,)
            return PartitionSpec(None, *split) if whole else PartitionSpec(*split)

        specs: list[Any] = [spec(name, field) for name, field in batch._asdict().items()]
        return PackedBatch(*specs)

    def arranged(self, batch: HostBatch) -> HostBatch:
        """A packed batch in the order in which its tokens are split over devices."""
        return batch if self.row_devices == 1 else sequence.laid_out(batch, self.row_devices)

    def put(self, batch: HostBatch) -> DeviceBatch:
        """A packed batch on the devices: rows and tokens split over them, totals on each."""
        batch = self.arranged(batch)
        at = (NamedSharding(self.mesh, spec) for spec in self.fields(batch))
        return DeviceBatch(*(on_devices(field, sharding) for field, sharding in zip(batch, at, strict=True)))

    @property
    def number(self) -> int:
        """Of devices."""
        return self.mesh.size

    def over_rows(self, score: Score) -> Score:
        """`score`, run on every device by itself: on its own tokens, and its own parts of the weights.

        What crosses devices is then what is written down here and in `product.linears`, nothing that a partitioner
        thought of: along `fsdp` and `sequence` weights are gathered where they are used, and the gradients of their
        parts summed to where these lie; along `sequence` keys and values are gathered, and scores summed. Only along
        `tensor` a partitioner divides what is left.
        """
        if self.number == 1:
            return score

        def on_all(decoder: Decoder, batch: DeviceBatch) -> Scores:
            weights = jax.tree.map(lambda at: _of_axes(BY_THEMSELVES, at.spec), self.decoder(decoder.config, decoder))
            return jax.shard_map(
                score,
                mesh=self.mesh,
                in_specs=(weights, self.fields(batch)),
                out_specs=PartitionSpec(BATCH_AXES),
                # With nothing to divide along `tensor` a device is all by itself, as kernels want it.
                axis_names={*BY_THEMSELVES} if self.mesh.shape["tensor"] > 1 else {*AXES},
                check_vma=False,
            )(decoder, batch)

        return on_all

    def parts(self, config: DecoderConfig) -> Parts | None:
        """How matrices are split along the width of the residual stream, None if they are not."""
        over, (across,) = self.along("embed", config.width), RULES["mlp"]
        return Parts(over, across, self.mesh.shape[across]) if over else None

    def whole(self, decoder: Decoder) -> Decoder:
        """Inside `over_rows`: the decoder with whole matrices outside its blocks, which are used more than once."""
        parts = self.parts(decoder.config)

        def gather(path: str, leaf: jax.Array) -> jax.Array:
            if parts is None or path.startswith("blocks.") or LOGICAL_AXES[path][-1] != "embed":
                return leaf
            # Of what lies along no mesh axis there is nothing to divide.
            return parts.split(1, leaf.shape[0] if LOGICAL_AXES[path][0] in RULES else 1).whole(leaf)

        return map_params(gather, decoder)

    def rows(self, context: Context) -> Context:
        """Inside `over_rows`: the context of whole rows, from that of a device's own tokens."""
        return Context(*map(self._whole_row, context))

    def summed(self, scores: Scores) -> Scores:
        """Inside `over_rows`: the scores of whole rows, from those of a device's own tokens."""
        return scores if self.row_devices == 1 else lax.psum(scores, SEQUENCE)

    def spread(self, attention: Attention) -> Attention:
        """Inside `over_rows`: `attention`, run on every device by itself, on its own heads and its own queries."""
        return self._over_heads(self._over_queries(attention))

    def _whole_row(self, x_RT: jax.Array) -> jax.Array:
        """[R, T, ...] of all devices of a row, in the row's order."""
        if self.row_devices == 1:
            return x_RT
        chunks = jnp.split(lax.all_gather(x_RT, SEQUENCE, axis=1, tiled=True), 2 * self.row_devices, axis=1)
        places = [chunk for device in range(self.row_devices) for chunk in sequence.chunks_of(device, self.row_devices)]
        return jnp.concatenate([chunks[places.index(chunk)] for chunk in range(len(chunks))], axis=1)

    def _over_queries(self, attention: Attention) -> Attention:
        """`attention` for a device's two chunks of queries, over the keys and values of whole rows.

        For the backward pass keys and values are gathered anew, unless all is kept; in it their gradients are summed to
        where the tokens are.
        """
        if self.row_devices == 1:
            return attention

        def of_chunks(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            context: Context,
            window: int | None,
            _: jax.Array | None,
        ) -> jax.Array:
            chunks = jnp.stack(sequence.chunks_of(lax.axis_index(SEQUENCE), self.row_devices))
            places = chunks * (q.shape[1] // len(chunks))
            return attention(q, self._whole_row(k), self._whole_row(v), context, window, places)

        return of_chunks

    def _over_heads(self, attention: Attention) -> Attention:
        """`attention` for a device's own heads along `tensor`.

        A loop over tiles or a kernel's call is nothing that a partitioner could split. Heads that do not divide evenly
        are computed on each device.
        """
        (along,) = RULES["kv_heads"]
        if self.mesh.shape[along] == 1:
            return attention

        def on_each(
            q: jax.Array, k: jax.Array, v: jax.Array, context: Context, window: int | None, pieces: jax.Array | None
        ) -> jax.Array:
            heads = PartitionSpec(None, None, along if k.shape[2] % self.mesh.shape[along] == 0 else None)
            return jax.shard_map(
                lambda q, k, v, context, pieces: attention(q, k, v, context, window, pieces),
                in_specs=(heads, heads, heads, PartitionSpec(), PartitionSpec()),
                out_specs=heads,
                axis_names={along},
                # Copies on devices of `tensor` are equal, which the check cannot see through loops.
                check_vma=False,
            )(q, k, v, context, pieces)

        return on_each

    def along(self, axis: str | None, size: int) -> tuple[str, ...]:
        """The mesh axes that a parameter's logical axis is split over: the first ones of its rule that divide it."""
        names = [name for name in RULES.get(axis or "", ()) if self.mesh.shape[name] > 1]
        while size % self._devices(names):
            names.pop()
        return tuple(names)

    def parameter(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        """A parameter's sharding from its logical axes; an axis that does not divide evenly stays whole."""
        return NamedSharding(
            self.mesh, PartitionSpec(*(self.along(*one) or None for one in zip(axes, shape, strict=True)))
        )

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
