"""From token scores to sums per completion, and the scorer as a whole against one sequence at a time."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo.batch import Completions, Example, PackedBatch, Statistic
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder
from jaxpo.objectives.logprobs import Blocks
from jaxpo.objectives.score import Scorer, Scores, completions_of, head_blocks, microbatch, sum_by_slot


@given(row_length=st.integers(1, 5000), rows=st.integers(1, 2000), platform=st.sampled_from(["cpu", "gpu"]))
def test_blocks_of_the_head_are_no_larger_than_a_row_and_than_they_may_be(
    row_length: int, rows: int, platform: str
) -> None:
    sizes = head_blocks(row_length, rows, platform, 1).tokens
    assert min(sizes) >= 1 and max(sizes) <= row_length
    assert max(sizes) * rows <= max(1024, rows * (8 if platform == "cpu" else 1))
    assert all(larger % smaller == 0 for larger, smaller in pairwise(sizes))


@given(row_length=st.integers(1, 5000), rows=st.integers(1, 2000))
def test_an_accelerator_s_blocks_cover_the_row_without_one_to_spare(row_length: int, rows: int) -> None:
    (block,) = head_blocks(row_length, rows, "gpu", 1).tokens
    number = -(-row_length // block)
    assert number * block - row_length < number


def test_a_block_of_the_head_takes_as_much_as_it_may() -> None:
    sizes = {
        (2048, 1): 128,
        (2048, 4): 128,
        (512, 1): 128,
        (96, 64): 6,
        (32768, 1): 1024,
        (8192, 8): 128,
        (100, 1): 100,
    }
    assert {size: head_blocks(*size, "tpu", 4) for size in sizes} == {k: Blocks((v,)) for k, v in sizes.items()}
    assert head_blocks(2048, 1, "cpu", 1) == Blocks((1024, 128), 4096)
    assert head_blocks(2048, 4, "cpu", 1) == Blocks((256, 32), 4096)
    assert head_blocks(100, 1, "cpu", 1) == Blocks((100,), 4096)


def test_words_that_lie_on_several_devices_meet_the_head_together() -> None:
    assert head_blocks(2048, 1, "cpu", 2).words is None


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
    assert part.num_tokens.tolist() == [0, *(sum(len(e.completions[k]) for e in pairs) for k in range(2))]


def sequence_tables(decoder: Any) -> Any:
    """A function from a sequence's tokens to its hidden states [T, D], alone in a row."""

    def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    @jax.jit
    def hidden(decoder: Any, tokens: jax.Array) -> jax.Array:
        return decoder.hidden(tokens[None], jnp.arange(len(tokens))[None], causal)[0][0]

    def of(tokens: np.ndarray) -> jax.Array:
        # Padding at the end: causal attention hides it, and one length is compiled.
        row = np.zeros(128, np.int32)
        row[: len(tokens)] = tokens
        return hidden(decoder, jnp.asarray(row))

    return of


@pytest.fixture(scope="module")
def lists(pairs: list[Example]) -> list[Example]:
    """Twelve lists of two to four answers; the others are empty. One prompt is a single token."""
    rng = np.random.default_rng(9)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(0, 96, rng.integers(1, longest), dtype=np.int32)

    nothing = np.zeros(0, np.int32)
    made = []
    for n in range(12):
        size = 2 + n % 3
        answers = (*(ids(20) for _ in range(size)), *[nothing] * (4 - size))
        made.append(Example(f"lists.jsonl:{n + 1}", ids(30) if n else np.array([7], np.int32), answers))
    return made


@pytest.fixture(scope="module", params=["pairs", "lists"])
def examples(request: pytest.FixtureRequest, pairs: list[Example], lists: list[Example]) -> list[Example]:
    return pairs if request.param == "pairs" else lists


@pytest.fixture(scope="module")
def one_by_one(small_decoder: Decoder, examples: list[Example]) -> dict[str, np.ndarray]:
    """The fields of `Scores` [N, B] from whole logits of each prompt with a completion as a sequence of its own."""
    decoder: Any = jax.tree.map(jnp.asarray, small_decoder)
    hidden = sequence_tables(decoder)
    K = len(examples[0].completions)
    found = {name: np.zeros((len(examples), 1 + K)) for name in ("logps", "correct", "shared", "confidence")}
    for n, example in enumerate(examples):
        shortest = min(map(len, example.completions))
        for k, completion in enumerate(example.completions, 1):
            tokens = np.concatenate([example.prompt, completion])
            logits = np.asarray(decoder.logits(hidden(tokens)), np.float64)[: len(tokens) - 1]
            table = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            labels = tokens[1:]
            logps = np.take_along_axis(table, labels[:, None], axis=1)[:, 0]
            P = len(example.prompt)
            spans = {0: slice(0, P - 1), k: slice(P - 1, None)} if k == 1 else {k: slice(P - 1, None)}
            for branch, span in spans.items():
                found["logps"][n, branch] = logps[span].sum()
                found["correct"][n, branch] = (table.argmax(-1) == labels)[span].sum()
                found["shared"][n, branch] = logps[span][:shortest].sum()
                collisions = np.log((np.exp(table) ** 2).sum(axis=-1))
                found["confidence"][n, branch] = (logps - collisions)[span].sum()
    return found


EVERYTHING: frozenset[Statistic] = frozenset({"shared", "confidence", "prompt"})


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared prompt", "duplicated prompt"])
@pytest.mark.parametrize("score_prompt", [True, False], ids=["prompts scored", "completions only"])
def test_packed_scores_are_those_of_sequences_alone(
    small_decoder: Decoder,
    examples: list[Example],
    one_by_one: dict[str, np.ndarray],
    share_prompt: bool,
    score_prompt: bool,
) -> None:
    """Prompts, once each; completions; as many tokens as the shortest one has: all against one at a time."""
    packing = Packing(256, 16, share_prompt=share_prompt, score_prompt=score_prompt)
    batch, places = pack(examples, None, packing)
    assert max(place.slot for place in places) > 0
    assert int(batch.num_microbatches) == 1
    scores = score(Scorer("float32", "none", Blocks((64,)), EVERYTHING), small_decoder, batch)
    taken = {(place.row, place.slot) for place in places}
    for name, wanted in one_by_one.items():
        values = np.asarray(getattr(scores, name))
        found = np.array([values[place.row, place.slot] for place in places])
        scored = wanted * ([score_prompt] + [True] * (wanted.shape[1] - 1))
        # Of a prompt's shared tokens nobody asks.
        first = 1 if name == "shared" else 0
        np.testing.assert_allclose(found[:, first:], scored[:, first:], rtol=2e-6, atol=2e-5, err_msg=name)
        empty = [slot for slot in np.ndindex(values.shape[:2]) if slot not in taken]
        assert not any(np.any(values[slot]) for slot in empty)
    assert not np.any(scores.rewards)


def score(scorer: Scorer, decoder: Any, batch: Any) -> Scores:
    """The scores of the only microbatch."""
    return jax.jit(lambda d, b: scorer(d, microbatch(b, jnp.int32(0))))(
        jax.tree.map(jnp.asarray, decoder), jax.tree.map(jnp.asarray, batch)
    )


def test_what_is_not_asked_for_is_zero(small_decoder: Decoder, pairs: list[Example]) -> None:
    batch, _ = pack(pairs, None, Packing(256, 16))
    plain = score(Scorer("float32", "none", Blocks((64,))), small_decoder, batch)
    everything = score(Scorer("float32", "none", Blocks((64,)), EVERYTHING), small_decoder, batch)
    np.testing.assert_array_equal(plain.logps, everything.logps)
    assert not np.any(plain.shared)
    assert not np.any(plain.confidence)
    assert np.all(np.asarray(everything.shared)[..., 1:] >= np.asarray(everything.logps)[..., 1:] - 1e-3)
    assert plain.logps.shape[-1] == 3
    assert plain.rewards.shape[-1] == 2


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared prompt", "duplicated prompt"])
def test_rewards_are_those_of_the_last_token_of_each_sequence(
    small_decoder: Decoder, examples: list[Example], share_prompt: bool
) -> None:
    config = replace(small_decoder.config, head="score")
    decoder: Any = Decoder(config, jax.random.key(3), jnp.float32)
    hidden = sequence_tables(decoder)
    batch, places = pack(examples, None, Packing(256, 16, share_prompt=share_prompt))
    rewards: frozenset[Statistic] = frozenset({"rewards"})
    scores = score(Scorer("float32", "none", Blocks((64,)), rewards), decoder, batch)
    K = len(examples[0].completions)
    wanted = np.zeros((len(examples), K))
    for (n, k), _ in np.ndenumerate(wanted):
        tokens = np.concatenate([examples[n].prompt, examples[n].completions[k]])
        if len(examples[n].completions[k]):
            last = np.asarray(hidden(tokens)[len(tokens) - 1], np.float64)
            wanted[n, k] = last @ np.asarray(decoder.score[...], np.float64)[0]
    found = np.array([scores.rewards[place.row, place.slot] for place in places])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted).max() > 0.1
    assert not any(map(np.any, (scores.logps, scores.correct, scores.shared, scores.confidence)))
    assert np.count_nonzero(scores.rewards) == np.count_nonzero(wanted)


def test_completions_of_a_batch_are_those_of_its_microbatches(small_decoder: Decoder, lists: list[Example]) -> None:
    """Fields by name: nothing is taken for another, of a microbatch or of all of them."""
    rng = np.random.default_rng(1)
    judged = [
        replace(e, label=0.25 + n / 20, scores=rng.normal(size=4).astype(np.float32)) for n, e in enumerate(lists)
    ]
    references = rng.normal(size=(12, 2, 4)).astype(np.float32)
    batch, places = pack(judged, references, Packing(128, 2, score_prompt=True))
    M, R, X, B = batch.lengths.shape
    assert int(batch.num_microbatches) > 1
    fields = {name: rng.normal(size=(M, R, X, B)).astype(np.float32) for name in Scores._fields}
    scores = Scores(**{**fields, "rewards": fields["rewards"][..., 1:]})  # pyright: ignore[reportArgumentType]
    carry = {"beta_scale": jnp.float32(1.0)}
    whole = completions_of(scores, jax.tree.map(jnp.asarray, batch), carry)
    assert whole.present.sum() == 12
    for example, place, reference in zip(judged, places, references, strict=True):
        at = np.ravel_multi_index(place, (M, R, X))
        assert whole.lengths[at].tolist() == [len(c) for c in example.completions]
        assert int(whole.prompt_lengths[at]) == len(example.prompt) - 1
        assert float(whole.label[at]) == pytest.approx(example.label)
        for name, wanted in {
            "scores": example.scores,
            "reference_logps": reference[0],
            "shared_reference_logps": reference[1],
            "logps": scores.logps[place][1:],
            "prompt_logps": scores.logps[place][0],
            "correct": scores.correct[place][1:],
            "shared_logps": scores.shared[place][1:],
            "confidence": scores.confidence[place][1:],
            "rewards": scores.rewards[place],
        }.items():
            np.testing.assert_array_equal(getattr(whole, name)[at], wanted, err_msg=name)
    assert whole.num_tokens.tolist() == [sum(len(e.prompt) - 1 for e in lists), *whole.lengths.sum(axis=0).tolist()]
    parts = [
        completions_of(
            jax.tree.map(lambda f, i=i: f[i], scores), microbatch(jax.tree.map(jnp.asarray, batch), jnp.int32(i)), carry
        )
        for i in range(M)
    ]
    for name in Completions._fields:
        if name not in ("carry", "num_examples", "num_tokens"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name), err_msg=name)
    assert all(float(part.num_examples) == 12 for part in parts)
