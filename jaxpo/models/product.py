"""The product of activations with a weight matrix, with gradients written out.

Three reasons not to leave it to autodiff. The weights' gradient keeps the weights' own precision: activations in
bfloat16 do not round it. Rows and tokens are one axis in every product: over two axes XLA transposes an operand first,
element by element, which on a CPU costs as much as the product. And a CPU multiplies bfloat16 at its full speed only
if asked for a float32 result.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpo.models.kept import keep, kept_as_integers, restore

# The name of what comes out, for policies that say what is kept.
PRODUCT = "product"


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times kernel [I, O]: [..., O] of x's dtype, summed in float32."""
    return _product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


def linear(x: jax.Array, kernel: jax.Array, num_input_axes: int) -> jax.Array:
    """x [..., *inputs] times kernel [*inputs, *outputs]: [..., *outputs] of x's dtype, summed in float32."""
    inputs, outputs = kernel.shape[:num_input_axes], kernel.shape[num_input_axes:]
    leading = x.shape[: x.ndim - num_input_axes]
    y = product(x.reshape(*leading, math.prod(inputs)), kernel.reshape(math.prod(inputs), math.prod(outputs)))
    return y.reshape(*leading, *outputs)


def _named_product(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return checkpoint_name(contract(x_NI, kernel_IO.astype(x_NI.dtype), 1, 0, x_NI.dtype), PRODUCT)


_product = jax.custom_vjp(_named_product)


def _forward(x_NI: jax.Array, kernel_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # A CPU multiplies in bfloat16 by rows of the left side only, which is x's other side when weights get gradients.
    return _named_product(x_NI, kernel_IO), (keep(x_NI.T) if kept_as_integers(x_NI) else x_NI, kernel_IO)


def _backward(saved: tuple[jax.Array, jax.Array], d_y_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
    kept, kernel_IO = saved
    d_x_NI = contract(d_y_NO, kernel_IO.astype(d_y_NO.dtype), 1, 1, d_y_NO.dtype)
    if kept.dtype == d_y_NO.dtype:
        return d_x_NI, contract(kept, d_y_NO, 0, 0, kernel_IO.dtype)
    return d_x_NI, contract(restore(kept), d_y_NO, 1, 0, kernel_IO.dtype)


_product.defvjp(_forward, _backward)


def contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The product of two matrices over one axis of each, rounded once, to `dtype`."""

    def summed_as(sum_dtype: jax.typing.DTypeLike) -> jax.Array:
        axes = (((a_axis,), (b_axis,)), ((), ()))
        return lax.dot_general(a, b, axes, preferred_element_type=sum_dtype).astype(dtype)

    if jnp.finfo(dtype).bits >= 32:
        return summed_as(dtype)
    return lax.platform_dependent(cpu=lambda: summed_as(jnp.float32), default=lambda: summed_as(dtype))
