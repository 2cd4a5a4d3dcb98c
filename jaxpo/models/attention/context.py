"""What a token of a packed row may see.

Shape legend: R rows, T tokens of a row, Q queries, K keys.
"""

from typing import NamedTuple

import jax


class Context(NamedTuple):
    """Where the tokens of packed rows belong, int32 [R, T] each, as in `batch.PackedBatch`.

    Segments lie one after the other in a row, padding (segment 0) comes last.
    """

    segments: jax.Array
    branches: jax.Array
    positions: jax.Array


def visible(queries: Context, query_places: jax.Array, keys: Context, key_places: jax.Array, window: int | None):
    """Which keys a query may read: bool [..., Q, K], of fields [..., Q] and [..., K] and their places in the row.

    Both are of one segment, the key is of the prompt (branch 0) or of the query's own branch, and not after the query
    in the row. With a sliding `window` the key's position is fewer than `window` before the query's. Padding is a
    segment of its own.
    """
    seen = queries.segments[..., :, None] == keys.segments[..., None, :]
    seen &= (keys.branches[..., None, :] == 0) | (keys.branches[..., None, :] == queries.branches[..., :, None])
    seen &= query_places[..., :, None] >= key_places[..., None, :]
    if window is not None:
        seen &= queries.positions[..., :, None] - keys.positions[..., None, :] < window
    return seen
