"""Attention tile by tile, each segment by itself: no key is computed that is of another one.

In a row of many examples that is most keys, and nothing of size [T, T] ever exists. The softmax is summed up tile after
tile, with a running maximum (Dao et al. 2022, arXiv 2205.14135, algorithm 1); the backward pass recomputes the
probabilities from the log of the softmax's sum (Dao 2023, arXiv 2307.08691, algorithm 2). Plain XLA: it runs anywhere,
and on a CPU it is the fastest there is.

Tiles begin where segments do, so what comes out for a token does not depend, to the bit, on what else is in its row: a
policy equal to its reference has the reference's log-probs, also in bfloat16.

Keys come before queries in scores, and queries, keys and gradients are at hand in both orders, so that each product
takes rows on its left and columns on its right, and a maximum or a sum goes over the first axis: on a CPU anything else
is several times slower.

Shape legend: R rows, T tokens of a row, P pieces that its queries come in (of queries there are R * P rows), C tokens
of a tile, N query heads, K key and value heads, G = N / K heads of queries to one of keys, H head size, S queries that
meet the same key head, G for each token of a piece and of what fills it up (Q in a tile): token by token, and of a
token head by head, so that a tile's lie side by side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpo.models.attention.context import Context, Ranges, changes, filled, ranges
from jaxpo.models.kept import keep, named, restore

TILE = 128
# The score of a key out of sight: finite, so that a row of them gives no NaN.
HIDDEN = -1e30


def attention(
    q_RQNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None,
    pieces: jax.Array | None,
) -> jax.Array:
    """See `packed_attention`. Products are summed in float32; probabilities enter them in the inputs' precision."""
    tile = min(k_RTKH.shape[1], TILE)
    context = Context(*(filled(field, tile) for field in context))
    # A tile may begin before the first query of a piece.
    cut = Cut(tile, 0 if pieces is None else tile)
    starts_P = jnp.zeros(1, jnp.int32) if pieces is None else pieces
    R, Q, N, H = q_RQNH.shape
    q = q_RQNH.reshape(R * len(starts_P), Q // len(starts_P), N, H)
    out: Any = _attention(cut, q, k_RTKH, v_RTKH, context.segments, ranges(context, window), starts_P)
    return out.reshape(R, Q, N, H)


class Cut(NamedTuple):
    """Tokens of a tile, and places that queries have before the first one."""

    tile: int
    before: int


class Tiles(NamedTuple):
    """The tiles that hold queries, in order, int32 [R * P * T] of which the first `number` [] are there.

    row: of the keys. piece: of the queries, of the P in each row. place: that the first query has in its piece. begin,
    segment: the place in the row of the tile's first token, and of its segment's.
    """

    row: jax.Array
    piece: jax.Array
    place: jax.Array
    begin: jax.Array
    segment: jax.Array
    number: jax.Array


def tiles_of(segments_RT: jax.Array, cut: Cut, starts_P: jax.Array, queries: int) -> Tiles:
    """Each segment from its first token on, in tiles of which the last may reach into what follows.

    Of these the ones that reach into a piece: so many queries, from a place of starts_P on.
    """
    (R, T), P = segments_RT.shape, len(starts_P)
    places_T = jnp.arange(T)
    start_RT = lax.cummax(jnp.where(changes(segments_RT), places_T, 0), axis=1)
    begins_RT = (segments_RT > 0) & ((places_T - start_RT) % cut.tile == 0)
    reaches_PT = (places_T > starts_P[:, None] - cut.tile) & (places_T < starts_P[:, None] + queries)
    begins_RPT = begins_RT[:, None] & reaches_PT
    (found,) = jnp.nonzero(begins_RPT.reshape(-1), size=R * P * T, fill_value=0)
    piece, begin = found // T, found % T
    row = piece // P
    place = begin - starts_P[piece % P] + cut.before
    return Tiles(row, piece, place, begin, start_RT.reshape(-1)[row * T + begin], begins_RPT.sum())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    cut: Cut, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sight: Ranges, starts_P: jax.Array
) -> jax.Array:
    return _forward(cut, q, k, v, segments, sight, starts_P)[0]


def _forward(
    cut: Cut, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sight: Ranges, starts_P: jax.Array
):
    tile, before = cut
    K, H = k.shape[2:]
    G, scale = q.shape[2] // K, H**-0.5
    q_kept, k_kept, v_kept = _filled(q, cut, segments), *(_filled(x, Cut(tile, 0), segments) for x in (k, v))
    q_RKHS, k_RKTH, v_RKHT = _queries_last(q_kept, K), _heads_first(k_kept), _tokens_last(v_kept)
    tiles = tiles_of(segments, cut, starts_P, q.shape[1])

    def of_queries(n: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out_RKHS, lse_RKS = so_far
        r, i, first = tiles.row[n], tiles.begin[n], tiles.segment[n]
        p, here = tiles.piece[n], tiles.place[n]
        q_KHQ = _tile(q_RKHS, p, here * G, tile * G, axis=3)
        sight_Q = _sight(segments, sight, r, i, tile, G)

        def of_keys(m: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]):
            top_KQ, sum_KQ, out_KHQ = sums
            j = first + m * tile
            k_KCH, v_KHC = _tile(k_RKTH, r, j, tile, axis=2), _tile(v_RKHT, r, j, tile, axis=3)
            scores_KCQ = _dot("kch,khq->kcq", k_KCH, q_KHQ) * scale
            scores_KCQ = jnp.where(sight_Q.see(j + jnp.arange(tile)[:, None]), scores_KCQ, HIDDEN)
            new_KQ = jnp.maximum(top_KQ, scores_KCQ.max(axis=1))
            weights_KCQ, shrink_KQ = jnp.exp(scores_KCQ - new_KQ[:, None]), jnp.exp(top_KQ - new_KQ)
            out_KHQ = out_KHQ * shrink_KQ[:, None] + _dot("khc,kcq->khq", v_KHC, weights_KCQ.astype(q.dtype))
            return new_KQ, sum_KQ * shrink_KQ + weights_KCQ.sum(axis=1), out_KHQ

        nothing_KQ = jnp.zeros((K, tile * G), jnp.float32)
        start = (nothing_KQ + HIDDEN, nothing_KQ, jnp.zeros((K, H, tile * G), jnp.float32))
        top_KQ, sum_KQ, out_KHQ = lax.fori_loop(0, (i - first) // tile + 1, of_keys, start)
        out = (out_KHQ / sum_KQ[:, None])[None]
        lse = (top_KQ + jnp.log(sum_KQ))[None]
        # What lies behind the segment's end is the next one's, whose tiles are still to be written.
        return (
            lax.dynamic_update_slice(out_RKHS, out, (p, 0, 0, here * G)),
            lax.dynamic_update_slice(lse_RKS, lse, (p, 0, here * G)),
        )

    R, _, _, S = q_RKHS.shape
    start = (jnp.zeros(q_RKHS.shape, jnp.float32), jnp.zeros((R, K, S), jnp.float32))
    out_RKHS, lse_RKS = lax.fori_loop(0, tiles.number, of_queries, start)
    out = named(_queries(_tokens_first(out_RKHS, G), before, q.shape[1]).astype(q.dtype), "attention")
    lse_RKS = checkpoint_name(lse_RKS, "attention")
    return out, (*map(keep, (q, k, v, out)), segments, sight, starts_P, lse_RKS)


def _backward(cut: Cut, saved: Any, d_out: jax.Array):
    tile, before = cut
    *kept, segments, sight, starts_P, lse_RKS = saved
    q, k, v, out = map(restore, kept)
    T, K, H = k.shape[1:]
    G, scale = q.shape[2] // K, H**-0.5
    q_kept, d_out_kept = (_filled(x, cut, segments) for x in (q, d_out))
    k_kept, v_kept = (_filled(x, Cut(tile, 0), segments) for x in (k, v))
    q_RKSH, d_out_RKSH = _grouped(q_kept, K), _grouped(d_out_kept, K)
    q_RKHS, d_out_RKHS = _queries_last(q_kept, K), _queries_last(d_out_kept, K)
    k_RKTH, k_RKHT, v_RKTH = _heads_first(k_kept), _tokens_last(k_kept), _heads_first(v_kept)
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    inner_RKS = _grouped(filled(inner, tile, before), K)[..., 0]
    tiles = tiles_of(segments, cut, starts_P, q.shape[1])

    def of_queries(n: jax.Array, so_far: tuple[jax.Array, jax.Array, jax.Array]):
        d_q_RKHS, d_k_RKTH, d_v_RKTH = so_far
        r, i, first = tiles.row[n], tiles.begin[n], tiles.segment[n]
        p, here = tiles.piece[n], tiles.place[n]
        q_KQH, d_out_KQH = (_tile(x, p, here * G, tile * G, axis=2) for x in (q_RKSH, d_out_RKSH))
        q_KHQ, d_out_KHQ = (_tile(x, p, here * G, tile * G, axis=3) for x in (q_RKHS, d_out_RKHS))
        lse_KQ, inner_KQ = (_tile(x, p, here * G, tile * G, axis=2)[:, None] for x in (lse_RKS, inner_RKS))
        sight_Q = _sight(segments, sight, r, i, tile, G)

        def of_keys(m: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]):
            d_q_KHQ, d_k_RKTH, d_v_RKTH = sums
            j = first + m * tile
            k_KCH, v_KCH = _tile(k_RKTH, r, j, tile, axis=2), _tile(v_RKTH, r, j, tile, axis=2)
            k_KHC = _tile(k_RKHT, r, j, tile, axis=3)
            scores_KCQ = _dot("kch,khq->kcq", k_KCH, q_KHQ) * scale
            seen_CQ = sight_Q.see(j + jnp.arange(tile)[:, None])
            probs_KCQ = jnp.exp(jnp.where(seen_CQ, scores_KCQ - lse_KQ, HIDDEN))
            d_probs_KCQ = _dot("kch,khq->kcq", v_KCH, d_out_KHQ)
            d_scores_KCQ = (probs_KCQ * (d_probs_KCQ - inner_KQ) * scale).astype(q.dtype)
            d_k_RKTH = _add_to_tile(d_k_RKTH, _dot("kcq,kqh->kch", d_scores_KCQ, q_KQH), r, j)
            d_v_RKTH = _add_to_tile(d_v_RKTH, _dot("kcq,kqh->kch", probs_KCQ.astype(q.dtype), d_out_KQH), r, j)
            return d_q_KHQ + _dot("khc,kcq->khq", k_KHC, d_scores_KCQ), d_k_RKTH, d_v_RKTH

        start = (jnp.zeros((K, H, tile * G), jnp.float32), d_k_RKTH, d_v_RKTH)
        d_q_KHQ, d_k_RKTH, d_v_RKTH = lax.fori_loop(0, (i - first) // tile + 1, of_keys, start)
        d_q = d_q_KHQ[None]
        return lax.dynamic_update_slice(d_q_RKHS, d_q, (p, 0, 0, here * G)), d_k_RKTH, d_v_RKTH

    nothing_RKTH = jnp.zeros(k_RKTH.shape, jnp.float32)
    start = (jnp.zeros(q_RKHS.shape, jnp.float32), nothing_RKTH, nothing_RKTH)
    d_q_RKHS, d_k_RKTH, d_v_RKTH = lax.fori_loop(0, tiles.number, of_queries, start)
    Q = q.shape[1]
    d_q = _written(lambda x: _queries(_tokens_first(x, G), before, Q).astype(q.dtype), d_q_RKHS, segments)
    d_k, d_v = (_written(lambda x: _heads_first(x)[:, :T].astype(q.dtype), x, segments) for x in (d_k_RKTH, d_v_RKTH))
    return d_q, d_k, d_v, None, None, None


_attention.defvjp(_forward, _backward)


def _filled(x: jax.Array, cut: Cut, segments: jax.Array) -> jax.Array:
    """x as it is kept, with a tile of zeros more: the last tile of a row may begin at its last token."""
    return _written(lambda x: filled(x, *cut), keep(x), segments)


def _queries(x_RTNH: jax.Array, before: int, number: int) -> jax.Array:
    """What is of the queries, without the places before and after them."""
    return x_RTNH[:, before : before + number]


def _written(function: Callable[[jax.Array], jax.Array], x: jax.Array, segments: jax.Array) -> jax.Array:
    """function(x), for which x is written to memory before, and the result before anything is made of it.

    A CPU's compiler otherwise makes one loop of a transpose and what comes before or after, which reads column by
    column and takes ten times as long. It cannot tell that there is no segment below 0.
    """

    def in_a_branch() -> jax.Array:
        shape = jax.eval_shape(function, x)
        return lax.cond(segments[0, 0] >= 0, function, lambda _: jnp.zeros(shape.shape, shape.dtype), x)

    return lax.platform_dependent(cpu=in_a_branch, default=lambda: function(x))


def _dot(how: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(how, a, b, preferred_element_type=jnp.float32)


def _grouped(x_RTNH: jax.Array, K: int) -> jax.Array:
    """[R, T, N, H] as [R, K, S, H]."""
    R, T, N, H = x_RTNH.shape
    return x_RTNH.reshape(R, T, K, N // K, H).swapaxes(1, 2).reshape(R, K, -1, H)


def _queries_last(x_RTNH: jax.Array, K: int) -> jax.Array:
    """[R, T, N, H] as [R, K, H, S]."""
    return _grouped(x_RTNH, K).swapaxes(2, 3)


def _tokens_first(x_RKHS: jax.Array, G: int) -> jax.Array:
    """[R, K, H, S] as [R, T, N, H]."""
    R, K, H, S = x_RKHS.shape
    return x_RKHS.swapaxes(2, 3).reshape(R, K, S // G, G, H).swapaxes(1, 2).reshape(R, S // G, K * G, H)


def _heads_first(x: jax.Array) -> jax.Array:
    return x.swapaxes(1, 2)


def _tokens_last(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 3, 1)


def _tile(x: jax.Array, r: jax.Array, i: jax.Array, tile: int, axis: int) -> jax.Array:
    """The tile of row r that begins at token i, without the row's axis; `axis` is that of the tokens in x."""
    row = lax.dynamic_index_in_dim(x, r, axis=0, keepdims=False)
    return restore(lax.dynamic_slice_in_dim(row, i, tile, axis=axis - 1))


def _add_to_tile(x_RKTH: jax.Array, d_KCH: jax.Array, r: jax.Array, j: jax.Array) -> jax.Array:
    at = (r, 0, j, 0)
    old = lax.dynamic_slice(x_RKTH, at, (1, *d_KCH.shape))
    return lax.dynamic_update_slice(x_RKTH, old + d_KCH[None], at)


def _sight(segments: jax.Array, sight: Ranges, r: jax.Array, i: jax.Array, tile: int, G: int) -> Ranges:
    """What the queries of a tile see, each token's once for each of a group's G heads: fields [C * G].

    Queries behind the segment's end see nothing here: they have tiles of their own.
    """
    prompt, prompt_end, own, own_last = (_tile(field, r, i, tile, axis=1) for field in sight)
    segments_C = _tile(segments, r, i, tile, axis=1)
    within = segments_C == segments_C[0]
    fields = Ranges(prompt, jnp.where(within, prompt_end, 0), own, jnp.where(within, own_last, -1))
    return Ranges(*(jnp.repeat(field, G) for field in fields))
