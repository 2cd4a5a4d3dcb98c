"""Attention on a TPU: the splash kernel of JAX, which leaves out the tiles of a row that no token sees.

It takes what a token may see as a mask [Q, T], one for all heads, of which it computes the tiles that hold anything;
the scores never leave the chip. Dao 2023 (arXiv 2307.08691), in Pallas.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from jaxpo.models.attention.context import Context, filled, places_of, visible

# Heads are filled up to the width of a TPU's vector registers, rows to whole tiles.
LANES = 128
TILES = (512, 256, 128)


def attention(
    q_RQNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None,
    pieces: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `packed_attention`. `interpret` runs the kernel as plain JAX, on any device, to test it."""
    Q, H = q_RQNH.shape[1], q_RQNH.shape[3]

    def whole_tiles(x: jax.Array) -> jax.Array:
        return filled(x, -x.shape[1] % LANES)

    def heads_first(x: jax.Array) -> jax.Array:
        wide = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, -H % LANES)])
        return whole_tiles(wide).swapaxes(1, 2)

    # The mask is made again for the backward pass: kept for each layer, it would take more than the activations.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention"))
    def of_row(row: tuple[jax.Array, jax.Array, jax.Array, Context, Context]) -> jax.Array:
        q_NQH, k_KTH, v_KTH, queries, keys = row
        Q, T = q_NQH.shape[1], k_KTH.shape[1]
        mask_1QT = visible(queries, places_Q, keys, jnp.arange(T), window)[None]
        kernel = splash.make_splash_mha(
            mask_1QT,
            block_sizes=block_sizes(Q, T),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        out: Any = known_to_be_dynamic(kernel)(q_NQH, k_KTH, v_KTH)
        return out

    places_Q = places_of(pieces, Q, -Q % LANES)
    # A key that fills a row up is padding, and a segment of its own.
    queries, keys = context.at(places_Q), Context(*map(whole_tiles, context))
    # The kernel does not scale scores.
    q_RNQH = heads_first((q_RQNH.astype(jnp.float32) * H**-0.5).astype(q_RQNH.dtype))
    out_RNQH = lax.map(of_row, (q_RNQH, heads_first(k_RTKH), heads_first(v_RTKH), queries, keys))
    return out_RNQH.swapaxes(1, 2)[:, :Q, :, :H]


def known_to_be_dynamic(kernel: splash.SplashAttentionKernel) -> splash.SplashAttentionKernel:
    """The kernel with a flag of its masks as a constant: made while JAX traces, it is an array no `if` can read."""
    masks: list[Any] = [kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info]
    return splash.SplashAttentionKernel(*(mask._replace(is_dynamic_mask=True) for mask in masks), **kernel.kwargs)


def block_sizes(Q: int, T: int) -> splash.BlockSizes:
    """The largest tiles that divide Q queries and T keys."""
    of_queries, of_keys = (next(tile for tile in TILES if length % tile == 0) for length in (Q, T))
    return splash.BlockSizes(
        block_q=of_queries,
        block_kv=of_keys,
        block_q_dkv=of_queries,
        block_kv_dkv=of_keys,
        block_q_dq=of_queries,
        block_kv_dq=of_keys,
    )
