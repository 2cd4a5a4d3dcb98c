"""What a token of a packed row may see.

Shape legend: R rows, T tokens of a row, Q queries, K keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Context(NamedTuple):
    """Where the tokens of packed rows belong, int32 [R, T] each, as in `batch.PackedBatch`.

    Segments lie one after the other in a row, padding (segment 0) comes last.
    """

    segments: jax.Array
    branches: jax.Array
    positions: jax.Array

    def at(self, places: jax.Array) -> "Context":
        """Of the tokens [Q] at these places of each row."""
        return Context(*(field[:, places] for field in self))


def filled(x: jax.Array, after: int, before: int = 0) -> jax.Array:
    """x [R, T, ...] with so many tokens more, of zeros: in a context, of padding."""
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def places_of(pieces: jax.Array | None, queries: int, more: int = 0) -> jax.Array:
    """Where in the row so many queries lie, int32 [Q], in pieces of one length that begin at `pieces` [P].

    more: queries that only fill up, as if they were the row's first, which sees itself.
    """
    starts = jnp.zeros(1, jnp.int32) if pieces is None else pieces
    places = starts[:, None] + jnp.arange(queries // len(starts), dtype=jnp.int32)
    return jnp.pad(places.reshape(-1), (0, more))


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


class Ranges(NamedTuple):
    """The same, as the places in the row of the keys that each query sees, int32 [R, T] each.

    Those of the prompt from `prompt` on and before `prompt_end`, and those of its own branch from `own` to `own_last`.
    """

    prompt: jax.Array
    prompt_end: jax.Array
    own: jax.Array
    own_last: jax.Array

    def see(self, places: jax.Array) -> jax.Array:
        """Whether keys at these places are seen, of fields that broadcast with them."""
        of_prompt = (places >= self.prompt) & (places < self.prompt_end)
        return of_prompt | ((places >= self.own) & (places <= self.own_last))


def ranges(context: Context, window: int | None) -> Ranges:
    """What `visible` says, where a segment is its prompt and then its branches, each in one piece."""
    segments_RT, branches_RT, positions_RT = context
    places_RT = jnp.broadcast_to(jnp.arange(segments_RT.shape[1], dtype=jnp.int32), segments_RT.shape)

    def since(begins_RT: jax.Array) -> jax.Array:
        return lax.cummax(jnp.where(begins_RT, places_RT, 0), axis=1)

    new_segment_RT = changes(segments_RT)
    start_RT = since(new_segment_RT)
    own_RT = since(new_segment_RT | changes(branches_RT))
    before_RT = jnp.pad(branches_RT[:, :-1], ((0, 0), (1, 0)))
    # A token of the prompt has all it sees in its own branch, which is the prompt: an end that lies before its segment.
    prompt_end_RT = since((branches_RT != 0) & (new_segment_RT | (before_RT == 0)))
    prompt_end_RT = jnp.where(branches_RT == 0, 0, prompt_end_RT)
    if window is None:
        return Ranges(start_RT, prompt_end_RT, own_RT, places_RT)
    # The key at start + n of the prompt has position n.
    first_RT = start_RT + positions_RT - window + 1
    return Ranges(
        jnp.maximum(start_RT, first_RT), prompt_end_RT, jnp.maximum(own_RT, places_RT - window + 1), places_RT
    )


def changes(values_RT: jax.Array) -> jax.Array:
    """Whether a token's value is another than that of the token before: bool [R, T], true of the first."""
    return jnp.pad(values_RT[:, 1:] != values_RT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
