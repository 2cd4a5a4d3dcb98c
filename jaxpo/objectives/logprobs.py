"""Log-probs of given tokens from hidden states, without the [tokens, vocabulary] logits.

Legend: R rows, S scored tokens in a row (those in use come first), D hidden size, V vocabulary; N tokens and W words of
a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxpo.models.product import contract, summed_over_rows


@dataclass(frozen=True)
class Blocks:
    """The part of the logits that is computed at once.

    tokens: columns of [R, S]. Blocks of the first size are taken as long as they are full, then of the next, and what
    is left goes into one more of the last; each size is a multiple of the next. words: rows of the head, all of them if
    None. A few at once stay in a CPU's cache from the product that makes their logits to those that make their
    gradients; all at once suit a device that holds a part of the vocabulary, or has a fast memory.
    """

    tokens: tuple[int, ...]
    words: int | None = None


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
    blocks: Blocks,
    confidence: bool = False,
) -> TokenScores:
    """Score labels [R, S] given the hidden states that predict them; head is [V, D], logits are float32.

    Only the first `used` [] columns are scored, the rest is 0; a block of columns begins with a used one. The head is
    rounded to the hidden states' dtype, its gradient is not.

    The gradient flows through logps. Nothing of size V outlives a block: the backward pass recomputes the logits from
    the saved log-sum-exp, with dz = g (onehot(y) - softmax(z)), dh = dz W and dW = sum dz^T h. With a head that is not
    differentiated, as where adapters are trained, there is no dW, which is a third of the products.
    """
    if labels_RS.shape[1] % blocks.tokens[-1]:
        raise ValueError(f"blocks of {blocks.tokens[-1]} do not divide {labels_RS.shape[1]} scored tokens")
    if any(larger % smaller for larger, smaller in pairwise(blocks.tokens)):
        raise ValueError(f"blocks of {blocks.tokens}: each size must be a multiple of the next")
    return _scores(blocks, confidence, hidden_RSD, head_VD, labels_RS, used)


class Words(NamedTuple):
    """Where a block of words lies: its first word, their number, and the first that no block before it holds.

    The last block may begin within the one before, so that all are of one size; `new` is None if it does not.
    """

    start: jax.Array
    number: int
    new: jax.Array | None

    def of(self, matrix_VD: jax.Array) -> jax.Array:
        """The rows of this block."""
        if len(matrix_VD) == self.number:
            return matrix_VD
        return lax.dynamic_slice_in_dim(matrix_VD, self.start, self.number)

    def put(self, matrix_VD: jax.Array, rows_WD: jax.Array) -> jax.Array:
        if matrix_VD.shape == rows_WD.shape:
            return rows_WD
        return lax.dynamic_update_slice_in_dim(matrix_VD, rows_WD, self.start, axis=0)

    def are(self, labels_N: jax.Array) -> jax.Array:
        """Whether a word is a token's label, bool [W, N].

        A comparison instead of a gather: it partitions when the vocabulary is sharded, and fuses into the reductions.
        """
        places_W1 = lax.broadcasted_iota(labels_N.dtype, (self.number, 1), 0) + self.start.astype(labels_N.dtype)
        same_WN = places_W1 == labels_N
        return same_WN if self.new is None else same_WN & (places_W1 >= self.new)

    def logits(self, words_WD: jax.Array, hidden_ND: jax.Array) -> jax.Array:
        """Float32 [W, N], -inf for a word that a block before has had."""
        logits_WN = contract(words_WD, hidden_ND, 1, 1, jnp.float32)
        if self.new is None:
            return logits_WN
        places_W1 = lax.broadcasted_iota(self.new.dtype, (self.number, 1), 0) + self.start
        return jnp.where(places_W1 >= self.new, logits_WN, -jnp.inf)


def _over_words(blocks: Blocks, V: int, body: Callable[[Words, Any], Any], carry: Any) -> Any:
    """Carry through the blocks of words."""
    size = min(blocks.words or V, V)
    if size == V:
        return body(Words(jnp.int32(0), V, None), carry)

    def of_block(j: jax.Array, carry: Any) -> Any:
        begin = jnp.int32(j * size)
        return body(Words(jnp.minimum(begin, V - size), size, begin if V % size else None), carry)

    return lax.fori_loop(0, -(-V // size), of_block, carry)


def _over_tokens(
    blocks: Blocks, S: int, used: jax.Array, body: Callable[[jax.Array, int, Any], Any], carry: Any
) -> Any:
    """Carry through the blocks of columns that hold a used one: where each begins and its number of columns."""

    def of_blocks(first: jax.Array, size: int, count: jax.Array, carry: Any) -> Any:
        return lax.fori_loop(0, count, lambda i, c: body(first + i * size, size, c), carry)

    first = jnp.zeros_like(used)
    for size in (size for size in blocks.tokens if size <= S):
        rest = size - 1 if size == blocks.tokens[-1] else 0
        count = lax.div(used - first + rest, jnp.asarray(size, used.dtype))
        carry = of_blocks(first, size, count, carry)
        first += count * size
    return carry


def _columns(array_RS: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """Columns of [R, S, ...], row by row: [R * size, ...]."""
    columns = lax.dynamic_slice_in_dim(array_RS, first, size, axis=1)
    return columns.reshape(-1, *columns.shape[2:])


def _put_columns(array_RS: jax.Array, columns: jax.Array, first: jax.Array) -> jax.Array:
    columns = columns.reshape(len(array_RS), -1, *columns.shape[1:])
    return lax.dynamic_update_slice_in_dim(array_RS, columns, first, axis=1)


class Sums(NamedTuple):
    """What is known of each token [R, S] after some of the words.

    The largest logit z, the sum of exp(z - largest), that of its squares if confidence is asked for, and the label's
    logit, 0 until its block has come.
    """

    largest: jax.Array
    exp: jax.Array
    squares: jax.Array | None
    label: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(blocks, confidence, hidden_RSD, head_VD, labels_RS, used) -> TokenScores:
    return _scored(blocks, confidence, hidden_RSD, head_VD, labels_RS, used)[0]


def _scores_forward(blocks, confidence, hidden, head, labels, used):
    """Of arguments that say of themselves whether they are differentiated."""
    scores, saved = _scored(blocks, confidence, hidden.value, head.value, labels.value, used.value)
    # What is saved is arrays; the shape of a tree tells the backward pass whether the head has a gradient.
    learns = () if head.perturbed else None
    return scores, (*saved, learns)


def _scored(blocks, confidence, hidden_RSD, head_VD, labels_RS, used):
    def of_words(words: Words, sums_RS: Sums) -> Sums:
        words_WD = words.of(head_VD).astype(hidden_RSD.dtype)

        def of_tokens(first: jax.Array, size: int, sums_RS: Sums) -> Sums:
            before = jax.tree.map(lambda field: _columns(field, first, size), sums_RS)
            # Words before tokens: a CPU adds up over the first axis many times as fast as over the last.
            logits_WN = words.logits(words_WD, _columns(hidden_RSD, first, size))
            largest_N = jnp.maximum(before.largest, logits_WN.max(axis=0))
            shrink_N, exp_WN = jnp.exp(before.largest - largest_N), jnp.exp(logits_WN - largest_N)
            is_label_WN = words.are(_columns(labels_RS, first, size))
            after = Sums(
                largest_N,
                before.exp * shrink_N + exp_WN.sum(axis=0),
                None if before.squares is None else before.squares * shrink_N**2 + (exp_WN**2).sum(axis=0),
                before.label + jnp.where(is_label_WN, logits_WN, 0.0).sum(axis=0),
            )
            return jax.tree.map(lambda field, part: _put_columns(field, part, first), sums_RS, after)

        return _over_tokens(blocks, labels_RS.shape[1], used, of_tokens, sums_RS)

    nothing_RS = jnp.zeros(labels_RS.shape, jnp.float32)
    start = Sums(nothing_RS - jnp.inf, nothing_RS, nothing_RS if confidence else None, nothing_RS)
    largest_RS, exp_RS, squares_RS, label_RS = _over_words(blocks, len(head_VD), of_words, start)
    is_used_S = jnp.arange(labels_RS.shape[1]) < used

    def scored(values_RS: jax.Array) -> jax.Array:
        return jnp.where(is_used_S, values_RS, 0.0)

    lse_RS = scored(largest_RS + jnp.log(exp_RS))
    logps_RS, correct_RS = scored(label_RS - lse_RS), scored((label_RS >= largest_RS).astype(jnp.float32))
    confidence_RS = None
    if squares_RS is not None:
        # log sum_v p(v)^2 = lse(2 z) - 2 lse(z)
        confidence_RS = scored(label_RS + lse_RS - 2.0 * largest_RS - jnp.log(squares_RS))
    # Of a column that nobody scores exp(logit - inf) is 0 in the backward pass, whatever its logits are.
    saved_RS = jnp.where(is_used_S, lse_RS, jnp.inf)
    return TokenScores(logps_RS, correct_RS, confidence_RS), (hidden_RSD, head_VD, labels_RS, used, saved_RS)


def _scores_backward(blocks, confidence, saved, gradients):
    hidden_RSD, head_VD, labels_RS, used, lse_RS, learns = saved
    dtype, (R, S, D) = hidden_RSD.dtype, hidden_RSD.shape
    if isinstance(gradients.logps, SymbolicZero):
        return None, None, None, None
    g_RS = jnp.where(jnp.arange(S) < used, gradients.logps, 0.0)

    def of_words(words: Words, so_far: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        d_hidden_DRS, d_head_VD = so_far
        words_WD = words.of(head_VD).astype(dtype)
        left, axis = summed_over_rows(words_WD)

        def of_tokens(first: jax.Array, size: int, so_far: tuple[jax.Array, jax.Array | None]) -> Any:
            d_hidden_DRS, d_words_WD = so_far
            hidden_ND, lse_N, g_N = (_columns(x, first, size) for x in (hidden_RSD, lse_RS, g_RS))
            probs_WN = jnp.exp(words.logits(words_WD, hidden_ND) - lse_N)
            onehot_WN = words.are(_columns(labels_RS, first, size)).astype(jnp.float32)
            d_logits_WN = (g_N * (onehot_WN - probs_WN)).astype(dtype)
            d_hidden_DN = contract(left, d_logits_WN, axis, 0, jnp.float32)
            at = (0, 0, first)
            d_hidden_DRN = lax.dynamic_slice(d_hidden_DRS, at, (D, R, size)) + d_hidden_DN.reshape(D, R, size)
            if d_words_WD is not None:
                d_words_WD += contract(d_logits_WN, hidden_ND, 1, 0, jnp.float32)
            return lax.dynamic_update_slice(d_hidden_DRS, d_hidden_DRN, at), d_words_WD

        d_words_WD = None if d_head_VD is None else words.of(d_head_VD)
        d_hidden_DRS, d_words_WD = _over_tokens(blocks, S, used, of_tokens, (d_hidden_DRS, d_words_WD))
        return d_hidden_DRS, None if d_head_VD is None else words.put(d_head_VD, d_words_WD)

    d_head_VD = None if learns is None else jnp.zeros(head_VD.shape, jnp.float32)
    start = (jnp.zeros((D, R, S), jnp.float32), d_head_VD)
    d_hidden_DRS, d_head_VD = _over_words(blocks, len(head_VD), of_words, start)
    d_hidden_RSD = d_hidden_DRS.transpose(1, 2, 0).astype(dtype)
    return d_hidden_RSD, None if d_head_VD is None else d_head_VD.astype(head_VD.dtype), None, None


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)
