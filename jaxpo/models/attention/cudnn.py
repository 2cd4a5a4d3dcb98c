"""Attention on an NVIDIA GPU: the flash kernels of cuDNN, with what a token may see as a mask [Q, T] over the row.

They compute all tiles of a row, masked or not, and keep none of them. What their backward pass needs besides the output
no policy of `jax.checkpoint` can keep, so that with any but `none` the forward kernel runs again there, and the output
has no name to be kept by either.
"""

import jax
import jax.numpy as jnp

from jaxpo.models.attention.context import Context, filled, places_of, visible


def attention(
    q_RQNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None,
    pieces: jax.Array | None,
) -> jax.Array:
    """See `packed_attention`. For bfloat16 and heads of a multiple of 8, up to 128 wide; see `supports`."""
    Q, T = q_RQNH.shape[1], k_RTKH.shape[1]

    def even(x: jax.Array) -> jax.Array:
        """The kernels take even lengths."""
        return filled(x, x.shape[1] % 2)

    places_Q, places_T = places_of(pieces, Q, Q % 2), jnp.arange(T + T % 2)
    mask_RQT = visible(context.at(places_Q), places_Q, Context(*map(even, context)), places_T, window)
    q, k, v = map(even, (q_RQNH, k_RTKH, v_RTKH))
    return jax.nn.dot_product_attention(q, k, v, mask=mask_RQT[:, None], implementation="cudnn")[:, :Q]


def supports(compute_dtype: str, head_dim: int) -> bool:
    """Whether there is a kernel for heads of this size."""
    return compute_dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
