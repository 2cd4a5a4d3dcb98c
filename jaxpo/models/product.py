"""The product of activations with a weight matrix, with gradients written out.

Three reasons not to leave it to autodiff. The weights' gradient keeps the weights' own precision: activations in
bfloat16 do not round it. Rows and tokens are one axis in every product: over two axes XLA transposes an operand first,
element by element, which on a CPU costs as much as the product. And a CPU multiplies bfloat16 at its full speed only
if asked for a float32 result.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxpo.models.kept import keep, kept_as_integers, named, restore

# The name of what comes out, for policies that say what is kept.
PRODUCT = "product"


class Split(NamedTuple):
    """How a matrix is split: over mesh axes along its axis 0 or 1, and across another one, if so, along the other."""

    over: tuple[str, ...]
    axis: int
    across: str | None

    def whole(self, matrix: jax.Array) -> jax.Array:
        """The matrix, gathered from all that it is split over."""
        return self._along(lambda m: lax.all_gather(m, self.over, axis=self.axis, tiled=True), matrix)

    def summed(self, matrix: jax.Array) -> jax.Array:
        """A part of the sum of the matrices of all that it is split over."""
        return self._along(lambda m: lax.psum_scatter(m, self.over, scatter_dimension=self.axis, tiled=True), matrix)

    def _along(self, move: Callable[[jax.Array], jax.Array], matrix: jax.Array) -> jax.Array:
        if self.across is None:
            return move(matrix)
        # A partitioner would bring together what lies across, not knowing that it can be moved as it is.
        at = PartitionSpec(*(None if axis == self.axis else self.across for axis in range(2)))
        return jax.shard_map(move, in_specs=at, out_specs=at, axis_names={self.across}, check_vma=False)(matrix)


class Parts(NamedTuple):
    """How matrices lie on devices, inside a `jax.shard_map` over the mesh axes `over`.

    Along the width of the residual stream they are split over those; along the other one, where it divides evenly,
    over the `ways` devices of the mesh axis `across`, which is left to a partitioner.
    """

    over: tuple[str, ...]
    across: str
    ways: int

    def split(self, axis: int, other: int) -> Split:
        """A matrix whose axis `axis` is the width of the residual stream, and whose other axis is so long."""
        even = self.ways > 1 and other % self.ways == 0
        return Split(self.over, axis, self.across if even else None)


def linears(
    x: jax.Array, kernels: Sequence[jax.Array], num_input_axes: int, splits: Sequence[Split] | None = None
) -> list[jax.Array]:
    """x [..., *inputs] times each kernel [*inputs, *outputs]: [..., *outputs] of x's dtype, summed in float32.

    The backward pass keeps x once for them all. Kernels that are split, as matrices, are gathered for each product, in
    x's dtype, and their gradients are summed to where the parts lie, in the kernels' own.
    """
    leading, inputs = x.shape[: x.ndim - num_input_axes], x.shape[x.ndim - num_input_axes :]
    outputs = [kernel.shape[num_input_axes:] for kernel in kernels]
    matrices = [k.reshape(-1, math.prod(out)) for k, out in zip(kernels, outputs, strict=True)]
    ys = _products(splits and tuple(splits), x.reshape(math.prod(leading), math.prod(inputs)), matrices)
    return [y.reshape(*leading, *out[:-1], -1) for y, out in zip(ys, outputs, strict=True)]


Splits = tuple[Split, ...] | None


def _named_products(splits: Splits, x_NI: jax.Array, kernels_IO: list[jax.Array]) -> list[jax.Array]:
    whole = _whole(splits, [kernel_IO.astype(x_NI.dtype) for kernel_IO in kernels_IO])
    return [named(contract(x_NI, kernel_IO, 1, 0, x_NI.dtype), PRODUCT) for kernel_IO in whole]


_products = jax.custom_vjp(_named_products, nondiff_argnums=(0,))


def _forward(
    splits: Splits, x_NI: jax.Array, kernels_IO: list[jax.Array]
) -> tuple[list[jax.Array], tuple[jax.Array, list[jax.Array]]]:
    return _named_products(splits, x_NI, kernels_IO), (keep(x_NI), kernels_IO)


def _backward(
    splits: Splits, saved: tuple[jax.Array, list[jax.Array]], d_ys_NO: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    kept, kernels_IO = saved
    whole = _whole(splits, [k.astype(d_y.dtype) for k, d_y in zip(kernels_IO, d_ys_NO, strict=True)])
    dtypes = [kernel_IO.dtype for kernel_IO in kernels_IO]
    # What many devices sum up is rounded after that.
    summed_in = dtypes if splits is None else [jnp.dtype(jnp.float32)] * len(dtypes)
    d_kernels_IO = _d_kernels(restore(kept), d_ys_NO, summed_in)
    parts = [contract(d_y_NO, k_IO, 1, 1, d_y_NO.dtype) for d_y_NO, k_IO in zip(d_ys_NO, whole, strict=True)]
    if splits is not None:
        of_parts = zip(splits, d_kernels_IO, dtypes, strict=True)
        d_kernels_IO = [split.summed(d).astype(dtype) for split, d, dtype in of_parts]
    return functools.reduce(jnp.add, parts), d_kernels_IO


def _whole(splits: Splits, kernels_IO: list[jax.Array]) -> list[jax.Array]:
    return kernels_IO if splits is None else [s.whole(k) for s, k in zip(splits, kernels_IO, strict=True)]


_products.defvjp(_forward, _backward)


def _d_kernels(x_NI: jax.Array, d_ys_NO: list[jax.Array], dtypes: list[Any]) -> list[jax.Array]:
    """The gradients [I, O] of the kernels. Where a factor has to be turned, it is the narrower one."""
    if kept_as_integers(x_NI) and x_NI.shape[1] > sum(d_y_NO.shape[1] for d_y_NO in d_ys_NO):
        return [
            turned(contract(turned(d_y_NO), x_NI, 1, 0, dtype)) for d_y_NO, dtype in zip(d_ys_NO, dtypes, strict=True)
        ]
    x, axis = summed_over_rows(x_NI)
    return [contract(x, d_y_NO, axis, 0, dtype) for d_y_NO, dtype in zip(d_ys_NO, dtypes, strict=True)]


def summed_over_rows(x: jax.Array) -> tuple[jax.Array, int]:
    """A matrix for the left side of a product over its first axis, and the axis that this is of what is returned.

    A CPU multiplies bfloat16 by rows of the left side only: there the matrix is turned first.
    """
    return (turned(x), 1) if kept_as_integers(x) else (x, 0)


def turned(x: jax.Array) -> jax.Array:
    """The transpose of a matrix, written to memory.

    Left to itself, XLA has a product read its operand or write its result by columns instead, before it looks for a
    kernel that multiplies bfloat16, and finds none. It cannot tell that the slice taken here is the whole.
    """
    bits = lax.bitcast_convert_type(x, f"uint{x.dtype.itemsize * 8}")
    none = (bits[0, 0] >> (x.dtype.itemsize * 8 - 1)) >> 1
    wider = jnp.pad(bits.T, ((0, 1), (0, 0)))
    same = lax.dynamic_slice(wider, (none.astype(jnp.int32), jnp.int32(0)), x.shape[::-1])
    return lax.bitcast_convert_type(same, x.dtype)


def contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The product of two matrices over one axis of each, rounded once, to `dtype`."""

    def summed_as(sum_dtype: jax.typing.DTypeLike) -> jax.Array:
        axes = (((a_axis,), (b_axis,)), ((), ()))
        return lax.dot_general(a, b, axes, preferred_element_type=sum_dtype).astype(dtype)

    if jnp.finfo(dtype).bits >= 32:
        return summed_as(dtype)
    return lax.platform_dependent(cpu=lambda: summed_as(jnp.float32), default=lambda: summed_as(dtype))
