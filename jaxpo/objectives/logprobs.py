"""Log-probs of given tokens from hidden states, without the [tokens, vocabulary] logits.

Legend: R rows, S scored tokens in a row (those in use come first), D hidden size, V vocabulary, C tokens of a chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpo.models.product import contract


class TokenScores(NamedTuple):
    """Of the labels [R, S], float32. logps: log p(label), in nats. correct: 1 where the label was the likeliest token.

    confidence: log p(label) - log sum_v p(v)^2, how much likelier the label is than a token drawn from p is on average;
    None unless it was asked for.
    """

    logps: jax.Array
    correct: jax.Array
    confidence: jax.Array | None


def token_scores(
    hidden_RSD: jax.Array,
    head_VD: jax.Array,
    labels_RS: jax.Array,
    used: jax.Array,
    chunk: int,
    confidence: bool = False,
) -> TokenScores:
    """Score labels [R, S] given the hidden states that predict them; head is [V, D], logits are float32.

    Only the first `used` [] columns are computed, in chunks of `chunk` columns, which divides S; the rest is 0.

    The gradient flows through logps. Nothing of size V outlives a chunk: the backward pass recomputes the logits from
    the saved log-sum-exp, with dz = g (onehot(y) - softmax(z)), dh = dz W and dW = sum dz^T h.
    """
    if labels_RS.shape[1] % chunk:
        raise ValueError(f"chunk {chunk} does not divide {labels_RS.shape[1]} scored tokens")
    return _scores(chunk, confidence, hidden_RSD, head_VD, labels_RS, used)


def _columns(array: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, i * chunk, chunk, axis=1)


def _logits(hidden_RCD: jax.Array, head_VD: jax.Array) -> jax.Array:
    R, C, D = hidden_RCD.shape
    return contract(hidden_RCD.reshape(R * C, D), head_VD, 1, 1, jnp.float32).reshape(R, C, -1)


def _is_label(labels_RC: jax.Array, V: int) -> jax.Array:
    # A comparison instead of a gather: it partitions when the vocabulary is sharded, and fuses into the reductions.
    return labels_RC[..., None] == lax.broadcasted_iota(labels_RC.dtype, (1, 1, V), 2)


def _num_chunks(used: jax.Array, chunk: int) -> jax.Array:
    return lax.div(used + chunk - 1, jnp.asarray(chunk, used.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(chunk, confidence, hidden_RSD, head_VD, labels_RS, used) -> TokenScores:
    return _scores_forward(chunk, confidence, hidden_RSD, head_VD, labels_RS, used)[0]


def _scores_forward(chunk, confidence, hidden_RSD, head_VD, labels_RS, used):
    V = head_VD.shape[0]

    def body(i, carry):
        labels_RC = _columns(labels_RS, i, chunk)
        logits_RCV = _logits(_columns(hidden_RSD, i, chunk), head_VD)
        lse_RC = jax.nn.logsumexp(logits_RCV, axis=-1)
        label_RC = jnp.where(_is_label(labels_RC, V), logits_RCV, 0.0).sum(axis=-1)
        top_RC = (label_RC >= logits_RCV.max(axis=-1)).astype(jnp.float32)
        parts = (label_RC - lse_RC, top_RC, lse_RC)
        if confidence:
            # log sum_v p(v)^2 = lse(2 z) - 2 lse(z)
            parts += (label_RC + lse_RC - jax.nn.logsumexp(2.0 * logits_RCV, axis=-1),)
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, i * chunk, axis=1)
            for whole, part in zip(carry, parts, strict=True)
        )

    zeros = (jnp.zeros(labels_RS.shape, jnp.float32),) * (4 if confidence else 3)
    logps_RS, correct_RS, lse_RS, *more = lax.fori_loop(0, _num_chunks(used, chunk), body, zeros)
    scores = TokenScores(logps_RS, correct_RS, more[0] if confidence else None)
    return scores, (hidden_RSD, head_VD, labels_RS, used, lse_RS)


def _scores_backward(chunk, confidence, saved, gradients):
    hidden_RSD, head_VD, labels_RS, used, lse_RS = saved
    g_RS = gradients.logps
    V = head_VD.shape[0]

    def body(i, carry):
        d_hidden_RSD, d_head_VD = carry
        hidden_RCD = _columns(hidden_RSD, i, chunk)
        probs_RCV = jnp.exp(_logits(hidden_RCD, head_VD) - _columns(lse_RS, i, chunk)[..., None])
        onehot_RCV = _is_label(_columns(labels_RS, i, chunk), V).astype(jnp.float32)
        d_logits_RCV = (_columns(g_RS, i, chunk)[..., None] * (onehot_RCV - probs_RCV)).astype(hidden_RCD.dtype)
        d_logits_NV = d_logits_RCV.reshape(-1, V)
        d_hidden_RCD = contract(d_logits_NV, head_VD, 1, 0, jnp.float32).reshape(hidden_RCD.shape)
        d_head_VD += contract(d_logits_NV, hidden_RCD.reshape(len(d_logits_NV), -1), 0, 0, jnp.float32)
        d_hidden_RSD = lax.dynamic_update_slice_in_dim(d_hidden_RSD, d_hidden_RCD, i * chunk, axis=1)
        return d_hidden_RSD, d_head_VD

    zeros = (jnp.zeros(hidden_RSD.shape, jnp.float32), jnp.zeros(head_VD.shape, jnp.float32))
    d_hidden_RSD, d_head_VD = lax.fori_loop(0, _num_chunks(used, chunk), body, zeros)
    return d_hidden_RSD.astype(hidden_RSD.dtype), d_head_VD.astype(head_VD.dtype), None, None


_scores.defvjp(_scores_forward, _scores_backward)
