"""Attention with a [T, T] mask over the whole row: the plainest implementation, which the others are checked against.

Shape legend: R rows, T tokens of a row, Q queries, N query heads, K key and value heads, H head size.
"""

import jax

from jaxpo.models.attention.context import Context, places, visible
from jaxpo.models.kept import named_anywhere


def attention(
    q_RQNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None,
    first: jax.Array | None,
) -> jax.Array:
    """See `packed_attention`. Probabilities are never kept for the backward pass."""

    @jax.checkpoint
    def masked(q, k, v, context: Context) -> jax.Array:
        Q = q.shape[1]
        queries, places_Q, places_T = context.part(first, Q), places(first, Q), places(None, k.shape[1])
        mask_R1QT = visible(queries, places_Q, context, places_T, window)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask_R1QT, implementation="xla")

    return named_anywhere(masked(q_RQNH, k_RTKH, v_RTKH, context), "attention")
