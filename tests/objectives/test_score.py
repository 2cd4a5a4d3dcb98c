"""From token scores to sums per completion, and the scorer as a whole against one sequence at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo.batch import Example, PackedBatch
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder
from jaxpo.objectives.score import Scorer, head_chunk, microbatch, sum_by_slot


@given(row_length=st.integers(1, 5000), rows=st.integers(1, 2000))
def test_head_chunks_cover_the_row_without_one_to_spare(row_length: int, rows: int) -> None:
    chunk = head_chunk(row_length, rows)
    chunks = -(-row_length // chunk)
    assert chunks * chunk - row_length < chunks
    assert chunk * rows <= max(1024, rows)


def test_a_head_chunk_takes_as_much_as_it_may() -> None:
    assert [head_chunk(2048, 1), head_chunk(2048, 4), head_chunk(512, 1), head_chunk(96, 64)] == [1024, 256, 512, 16]


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_values_are_summed_into_their_slots(data: st.DataObject) -> None:
    R, X, K, S = 2, 3, 2, 12
    slots = np.array(data.draw(st.lists(st.integers(0, X * K), min_size=R * S, max_size=R * S))).reshape(R, S)
    values = np.random.default_rng(0).integers(-9, 9, (R, S)).astype(np.float32)
    expected = np.zeros((R, X * K + 1), np.float32)
    for r in range(R):
        np.add.at(expected[r], slots[r], values[r])
    found = sum_by_slot(jnp.asarray(values), jnp.asarray(slots, jnp.int32), (R, X, K))
    np.testing.assert_array_equal(found, expected[:, :-1].reshape(R, X, K))


def test_a_microbatch_is_a_slice_with_the_totals_of_the_batch(pairs: list[Example]) -> None:
    batch, _ = pack(pairs, None, Packing(128, 2))
    part = microbatch(jax.tree.map(jnp.asarray, batch), jnp.int32(1))
    assert isinstance(part, PackedBatch)
    np.testing.assert_array_equal(part.tokens, batch.tokens[1])
    np.testing.assert_array_equal(part.lengths, batch.lengths[1])
    assert int(part.num_examples) == 16
    assert int(part.num_tokens) == sum(len(c) for e in pairs for c in e.completions)


@pytest.fixture(scope="module")
def one_by_one(small_decoder: Decoder, pairs: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [N, K] and likeliest tokens [N, K], each prompt with a completion as a sequence of its own."""

    def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    @jax.jit
    def logits(decoder: Any, tokens: jax.Array) -> jax.Array:
        hidden, _ = decoder.hidden(tokens[None], jnp.arange(len(tokens))[None], causal)
        return decoder.logits(hidden)[0]

    logps, likeliest = np.zeros((2, len(pairs), 2))
    for n, example in enumerate(pairs):
        for k, completion in enumerate(example.completions):
            # Padding at the end: causal attention hides it, and few lengths are compiled.
            row = np.zeros(128, np.int32)
            tokens = np.concatenate([example.prompt, completion])
            row[: len(tokens)] = tokens
            at = np.arange(len(example.prompt), len(tokens))
            table = np.asarray(jax.nn.log_softmax(logits(small_decoder, jnp.asarray(row))))[at - 1]
            logps[n, k] = table[np.arange(len(at)), completion].sum()
            likeliest[n, k] = (table.argmax(-1) == completion).sum()
    return logps, likeliest


@pytest.mark.parametrize("share_prompt", [True, False])
def test_packed_scores_are_those_of_sequences_alone(
    small_decoder: Decoder, pairs: list[Example], one_by_one: tuple[np.ndarray, np.ndarray], share_prompt: bool
) -> None:
    batch, places = pack(pairs, None, Packing(256, 16, share_prompt=share_prompt))
    assert max(place.slot for place in places) > 0
    scorer = Scorer("float32", "none", 64)
    scores = jax.jit(lambda d, b: scorer(d, microbatch(b, jnp.int32(0))))(
        jax.tree.map(jnp.asarray, small_decoder), jax.tree.map(jnp.asarray, batch)
    )
    logps = np.array([scores.logps[place.row, place.slot] for place in places])
    correct = np.array([scores.correct[place.row, place.slot] for place in places])
    np.testing.assert_allclose(logps, one_by_one[0], rtol=1e-6)
    np.testing.assert_array_equal(correct, one_by_one[1])
    taken = {(place.row, place.slot) for place in places}
    empty = [s for s in np.ndindex(scores.logps.shape[:2]) if s not in taken]
    assert not any(np.any(scores.logps[s]) for s in empty)
