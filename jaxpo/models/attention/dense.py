"""Attention with a [T, T] mask over the whole row: the plainest implementation, which the others are checked against.

Shape legend: R rows, T tokens of a row, Q queries, N query heads, K key and value heads, H head size.
"""

import jax
import jax.numpy as jnp

from jaxpo.models.attention.context import Context, places_of, visible
from jaxpo.models.kept import named_anywhere


def attention(
    q_RQNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None,
    pieces: jax.Array | None,
) -> jax.Array:
    """See `packed_attention`. Probabilities are never kept for the backward pass."""

    @jax.checkpoint
    def masked(q, k, v, context: Context) -> jax.Array:
        places_Q, places_T = places_of(pieces, q.shape[1]), jnp.arange(k.shape[1])
        mask_R1QT = visible(context.at(places_Q), places_Q, context, places_T, window)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask_R1QT, implementation="xla")

    return named_anywhere(masked(q_RQNH, k_RTKH, v_RTKH, context), "attention")
