"""Attention over packed rows: a token sees its own prompt and its own completion, never a sibling or a neighbour.

Shape legend: R rows, T tokens of a row, N query heads, K key and value heads, H head size.
"""

import jax
import jax.numpy as jnp


def visible(
    segments_RT: jax.Array, branches_RT: jax.Array, positions_RT: jax.Array, window: int | None = None
) -> jax.Array:
    """Which keys (last axis) a query (axis before) may read: bool [R, T, T].

    Both are of one segment, the key is of the prompt (branch 0) or of the query's own branch, and not after the query
    in the row. With a sliding `window` the key's position is fewer than `window` before the query's. Padding is a
    segment of its own: it sees padding, so that no query is without a key.
    """
    T = segments_RT.shape[-1]
    index_T = jnp.arange(T)
    seen = segments_RT[:, :, None] == segments_RT[:, None, :]
    seen &= (branches_RT[:, None, :] == 0) | (branches_RT[:, None, :] == branches_RT[:, :, None])
    seen &= index_T[None, :, None] >= index_T[None, None, :]
    if window is not None:
        seen &= positions_RT[:, :, None] - positions_RT[:, None, :] < window
    return seen


def packed_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    segments_RT: jax.Array,
    branches_RT: jax.Array,
    positions_RT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention [R, T, N, H] under `visible`; probabilities are float32 and never kept for the backward pass.

    A place of padding (segment 0) puts out 0 and passes no gradient on.
    """

    @jax.checkpoint
    def attention(q, k, v, segments, branches, positions):
        mask_R1TT = visible(segments, branches, positions, window)[:, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=mask_R1TT, implementation="xla")
        return jnp.where((segments > 0)[:, :, None, None], out, 0)

    return attention(q_RTNH, k_RTKH, v_RTKH, segments_RT, branches_RT, positions_RT)
