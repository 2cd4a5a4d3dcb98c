"""Attention on an NVIDIA GPU: the flash kernels of cuDNN, with what a token may see as a mask [T, T] over the row.

They compute all tiles of a row, masked or not, and keep none of them. What their backward pass needs besides the output
no policy of `jax.checkpoint` can keep, so that with any but `none` the forward kernel runs again there, and the output
has no name to be kept by either.
"""

import jax
import jax.numpy as jnp

from jaxpo.models.attention.context import Context, filled, visible


def attention(
    q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array, context: Context, window: int | None
) -> jax.Array:
    """See `packed_attention`. For bfloat16 and heads of a multiple of 8, up to 128 wide; see `supports`."""
    T = q_RTNH.shape[1]
    # The kernels take even lengths.
    q, k, v = (filled(x, T % 2) for x in (q_RTNH, k_RTKH, v_RTKH))
    context = Context(*(filled(field, T % 2) for field in context))
    places = jnp.arange(q.shape[1])
    mask_R1TT = visible(context, places, context, places, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_R1TT, implementation="cudnn")[:, :T]


def supports(compute_dtype: str, head_dim: int) -> bool:
    """Whether there is a kernel for heads of this size."""
    return compute_dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
