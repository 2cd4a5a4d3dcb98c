"""Packing: every token once, every prediction from its own context alone, and the same rows every time."""

from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo.batch import Example, HostBatch, PackedBatch
from jaxpo.data.pack import Packing, Place, assign_rows, balanced, bucket, check_fits, pack, shorter_rows
from jaxpo.errors import UserError
from jaxpo.models.attention.context import Context, visible
from jaxpo.training.loop import count_places


def example(n: int, prompt: int, completions: list[int]) -> Example:
    """Tokens are all different and say where they come from, so that a misplaced one is seen; so do label and scores.

    Every third example has no ratings.
    """
    lengths = [prompt, *completions]
    ids = np.split(np.arange(1, 1 + sum(lengths), dtype=np.int32) + 1000 * (n + 1), np.cumsum(lengths)[:-1])
    scores = None if n % 3 == 2 else np.arange(len(completions), 0, -1, dtype=np.float32) + n
    return Example(f"rows.jsonl:{n + 1}", ids[0], tuple(ids[1:]), 1 / (n + 1), scores)


@st.composite
def examples(draw: st.DrawFn, longest: int = 12) -> list[Example]:
    """Of 1 to 4 completions, which lists of fewer fill up with empty ones."""
    K = draw(st.integers(1, 4))
    length = st.integers(1, longest)
    count = draw(st.integers(1, 12))

    def answers() -> list[int]:
        size = draw(st.integers(1, K))
        return [draw(length) for _ in range(size)] + [0] * (K - size)

    return [example(n, draw(length), answers()) for n in range(count)]


def padding(batch: HostBatch) -> float:
    """The share of computed places that hold no token."""
    tokens, places = count_places(batch)
    return 1 - tokens / places


packings = st.builds(
    lambda rows, devices, **rest: Packing(rows=rows * devices, devices=devices, **rest),
    row_length=st.sampled_from([96, 100, 160]),
    rows=st.integers(1, 3),
    devices=st.integers(1, 3),
    packed=st.booleans(),
    share_prompt=st.booleans(),
    microbatches=st.integers(1, 3),
    score_prompt=st.booleans(),
    shorter=st.sampled_from([(), (64,), (49, 80)]),
)
quick = settings(deadline=None, max_examples=60)


@quick
@given(examples(), packings)
def test_each_prediction_sees_its_own_context_and_nothing_else(rows: list[Example], packing: Packing) -> None:
    """For every scored token: what attention may read is the prompt and the completion before it, in order."""
    batch, places = pack(rows, None, packing)
    B = 1 + len(rows[0].completions)
    M, R, _ = batch.tokens.shape
    flat = PackedBatch(*(np.asarray(f).reshape(M * R, *f.shape[2:]) if np.ndim(f) > 1 else f for f in batch))
    # A row at a time: shapes, and with them compiled operations, stay few.
    fields = (flat.segments, flat.branches, flat.positions)
    contexts = [Context(*(jnp.asarray(field[r]) for field in fields)) for r in range(M * R)]
    T = jnp.arange(batch.tokens.shape[-1])
    seen = [np.asarray(visible(context, T, context, T, None)) for context in contexts]
    scored = 0
    for one, place in zip(rows, places, strict=True):
        r = place.microbatch * R + place.row
        # What comes before a branch, and what is scored of it.
        branches = [(one.prompt[:1], one.prompt[1:] if packing.score_prompt else one.prompt[:0])]
        branches += [(one.prompt, completion) for completion in one.completions]
        assert batch.lengths[place].tolist() == [len(labels) for _, labels in branches]
        for b, (before, labels) in enumerate(branches):
            targets = np.flatnonzero(flat.target_slots[r] == place.slot * B + b)
            np.testing.assert_array_equal(flat.target_labels[r, targets], labels)
            scored += len(targets)
            for j, at in enumerate(flat.target_positions[r, targets]):
                keys = np.flatnonzero(seen[r][at])
                context = np.concatenate([before, labels[:j]])
                np.testing.assert_array_equal(flat.tokens[r, keys], context)
                np.testing.assert_array_equal(flat.positions[r, keys], np.arange(len(context)))
                assert keys[-1] == at
        for k, completion in enumerate(one.completions):
            if len(completion):
                at = flat.ends[r, place.slot, k]
                keys = np.flatnonzero(seen[r][at])
                np.testing.assert_array_equal(flat.tokens[r, keys], np.concatenate([one.prompt, completion]))
            else:
                assert flat.ends[r, place.slot, k] == 0
    slots = batch.lengths.shape[2]
    assert scored == np.count_nonzero(flat.target_slots < slots * B) == int(batch.num_tokens.sum())
    # The used targets come first, in the order of the slots.
    for targets in flat.target_slots:
        assert np.all(np.diff(targets) >= 0)


@quick
@given(examples(), packings)
def test_what_is_known_of_an_example_lies_where_it_lies(rows: list[Example], packing: Packing) -> None:
    N, K = len(rows), len(rows[0].completions)
    references = np.random.default_rng(0).normal(size=(N, 2, K)).astype(np.float32)
    batch, places = pack(rows, references, packing)
    for n, (one, place) in enumerate(zip(rows, places, strict=True)):
        np.testing.assert_array_equal(batch.references[place], references[n])
        assert batch.labels[place] == np.float32(one.label)
        np.testing.assert_array_equal(batch.scores[place], 0 if one.scores is None else one.scores)
    empty = np.ones(batch.labels.shape, bool)
    empty[tuple(zip(*places, strict=True))] = False
    for field in ("references", "labels", "scores", "lengths", "ends"):
        values = getattr(batch, field)
        assert not np.any(values[empty]), field
        assert values.dtype == (np.int32 if field in ("lengths", "ends") else np.float32)


@quick
@given(examples(), packings)
def test_every_token_lies_in_one_place(rows: list[Example], packing: Packing) -> None:
    batch, _ = pack(rows, None, packing)
    expected: Counter[int] = Counter()
    for one in rows:
        copies = 1 if packing.share_prompt else sum(len(completion) > 0 for completion in one.completions)
        expected.update(dict.fromkeys(one.prompt.tolist(), copies))
        for completion in one.completions:
            expected.update(completion.tolist())
    assert Counter(batch.tokens[batch.segments > 0].tolist()) == expected
    for field in ("tokens", "positions", "branches"):
        assert not np.any(getattr(batch, field)[batch.segments == 0]), field


@quick
@given(examples(), packings)
def test_shapes_and_totals(rows: list[Example], packing: Packing) -> None:
    batch, places = pack(rows, None, packing)
    M, R, T = batch.tokens.shape
    assert packing.rows == R
    assert T in (*packing.shorter, packing.row_length)
    used = int(batch.num_microbatches)
    assert max(used, packing.microbatches * packing.row_length // T) <= M
    assert bucket(M) == M
    assert not np.any(batch.segments[used:])
    assert int(batch.num_examples) == len(rows) == np.count_nonzero(batch.lengths[..., 1])
    of_prompts = sum(len(e.prompt) - 1 for e in rows) * packing.score_prompt
    of_completions = np.sum([[len(c) for c in e.completions] for e in rows], axis=0)
    assert batch.num_tokens.tolist() == [of_prompts, *of_completions] == batch.lengths.sum(axis=(0, 1, 2)).tolist()
    assert len(set(places)) == len(rows)
    assert batch.references.shape[3] == 1
    assert not np.any(batch.references)
    if not packing.packed:
        assert {place.slot for place in places} == {0}
        assert len({(place.microbatch, place.row) for place in places}) == len(rows)
    assert padding(batch) == pytest.approx(1 - np.count_nonzero(batch.segments) / (used * R * T))


@quick
@given(examples(), packings)
def test_packing_is_a_function_of_the_examples(rows: list[Example], packing: Packing) -> None:
    once, again = pack(rows, None, packing), pack(list(rows), None, packing)
    assert once[1] == again[1]
    for a, b in zip(once[0], again[0], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_rows_hold_every_item_once_and_do_not_depend_on_the_order(sizes: list[int], random: object) -> None:
    rows = assign_rows(sizes, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in row) <= 50 for row in rows)
    assert all(row == sorted(row) for row in rows)

    shuffled = list(sizes)
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    contents = sorted(sorted(sizes[item] for item in row) for row in rows)
    assert sorted(sorted(shuffled[item] for item in row) for row in assign_rows(shuffled, 50)) == contents


def test_best_fit_takes_the_row_with_the_least_room() -> None:
    """Largest first: 6, 5, 4, 3, 2 into rows of 10; 4 joins 6, which it fills, then 3 and 2 join 5."""
    assert assign_rows([2, 3, 4, 5, 6], 10) == [[2, 4], [0, 1, 3]]


def test_rows_of_real_lengths_are_at_least_nine_tenths_full() -> None:
    """Batches of 64 pairs with the long-tailed lengths of chat data: prompts of 150 tokens, answers of 60."""
    rng = np.random.default_rng(0)
    fractions = []
    for _ in range(20):
        prompts = np.clip(rng.lognormal(4.6, 0.9, 64), 5, 512).astype(int)
        answers = np.clip(rng.lognormal(3.7, 0.9, (64, 2)), 2, 256).astype(int)
        rows = [example(n, p, a) for n, (p, a) in enumerate(zip(prompts.tolist(), answers.tolist(), strict=True))]
        fractions.append(1 - padding(pack(rows, None, Packing(2048, 1))[0]))
    assert np.mean(fractions) >= 0.9


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 3), st.integers(2, 4))
def test_balanced_rows_are_the_same_rows(costs: list[int], each: int, devices: int) -> None:
    packing = Packing(50, each * devices, devices=devices)
    rows = assign_rows(costs, 50)
    laid = balanced(rows, costs, packing)
    assert len(laid) == -(-len(rows) // packing.rows) * packing.rows
    assert sorted(row for row in laid if row) == sorted(rows)


def test_devices_have_rows_of_like_cost() -> None:
    """Batches of 64 pairs of chat on 4 devices: the time that devices wait for the slowest, by the keys they see."""
    rng = np.random.default_rng(0)
    waits: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(20):
        prompts = np.clip(rng.lognormal(4.6, 0.9, 64), 5, 512).astype(int)
        answers = np.clip(rng.lognormal(3.7, 0.9, (64, 2)), 2, 256).astype(int)
        rows = [example(n, p, a) for n, (p, a) in enumerate(zip(prompts.tolist(), answers.tolist(), strict=True))]
        for devices, wait in waits.items():
            batch, _ = pack(rows, None, Packing(1024, 8, devices=devices))
            seen = np.where(batch.segments > 0, batch.positions + 1, 0).sum(-1)
            of_device = seen.reshape(-1, 4, 2).sum(-1)
            wait.append(1 - of_device.sum() / (4 * of_device.max(axis=1).sum()))
    counted, balanced_by_cost = np.mean(waits[1]), np.mean(waits[4])
    assert balanced_by_cost < 0.5 * counted, (counted, balanced_by_cost)


def test_a_batch_takes_the_length_that_leaves_the_fewest_places_empty() -> None:
    packing = Packing(100, 1, shorter=(40, 70))
    assert packing.rows_of([30, 30, 10]) == (70, [[0, 1, 2]])
    assert packing.rows_of([40, 39]) == (40, [[0], [1]])
    assert packing.rows_of([50, 49]) == (100, [[0, 1]])
    # Of two layouts with as many places, the one of longer rows.
    assert Packing(80, 1, shorter=(40,)).rows_of([40, 40]) == (80, [[0, 1]])
    # Whole microbatches count: three rows of 40 take the places of four.
    assert Packing(70, 2, shorter=(40,)).rows_of([40, 30, 25]) == (70, [[0, 1], [2]])


def lengths_like_chat(count: int) -> list[list[int]]:
    """Sizes of examples in batches of 8: two answers of 60 tokens to prompts of 150, with long tails."""
    rng = np.random.default_rng(3)
    prompts = np.clip(rng.lognormal(4.6, 0.9, (count, 8)), 5, 512)
    return (prompts + np.clip(rng.lognormal(3.7, 0.9, (count, 8, 2)), 2, 256).sum(-1)).astype(int).tolist()


def test_few_lengths_that_suit_the_data_leave_little_empty() -> None:
    batches = lengths_like_chat(64)
    packing = Packing(2688, 1)

    def fill(shapes: int, batches: list[list[int]]) -> float:
        suited = replace(packing, shorter=shorter_rows(packing, lengths_like_chat(64), shapes))
        assert len(suited.shorter) <= shapes - 1
        return sum(map(sum, batches)) / sum(map(suited.places, batches))

    fills = [fill(shapes, batches) for shapes in (1, 2, 4, 8)]
    assert fills == sorted(fills)
    assert fills[0] < 0.8
    assert fills[2] > 0.88
    # Also of batches that were not looked at.
    assert fill(4, lengths_like_chat(200)[64:]) > 0.87


def test_no_length_is_taken_that_saves_nothing() -> None:
    assert shorter_rows(Packing(256, 1), [[256, 256], [256]], 4) == ()
    assert shorter_rows(Packing(256, 1), [[100], [90]], 4) == (128,)
    assert shorter_rows(Packing(100, 1), [[100], [90]], 4) == ()


def by_hand(batch: HostBatch) -> dict[str, list[object]]:
    """The fields of the first row by name."""
    return {name: getattr(batch, name)[0, 0].tolist() for name in PackedBatch._fields[:13]}


def test_a_pair_by_hand() -> None:
    """Prompt 2, answers 2 and 1: one row, the prompt once, positions of the second answer restart after the prompt."""
    references = np.array([[[-1.5, -2.5], [-1.25, -2.5]]], np.float32)
    batch, places = pack([example(0, 2, [2, 1])], references, Packing(6, 1))
    assert places == [Place(0, 0, 0)]
    assert by_hand(batch) == {
        "tokens": [1001, 1002, 1003, 1004, 1005, 0],
        "positions": [0, 1, 2, 3, 2, 0],
        "segments": [1, 1, 1, 1, 1, 0],
        "branches": [0, 0, 1, 1, 2, 0],
        "target_positions": [1, 2, 1, 0, 0, 0],
        "target_labels": [1003, 1004, 1005, 0, 0, 0],
        "target_slots": [1, 1, 2, 3, 3, 3],
        "target_indices": [0, 1, 0, 0, 0, 0],
        "ends": [[3, 4]],
        "lengths": [[0, 2, 1]],
        "references": [[[-1.5, -2.5], [-1.25, -2.5]]],
        "labels": [1.0],
        "scores": [[2.0, 1.0]],
    }


def test_a_pair_by_hand_with_the_prompt_twice() -> None:
    batch, _ = pack([example(0, 2, [2, 1])], None, Packing(8, 1, share_prompt=False))
    assert by_hand(batch) == {
        "tokens": [1001, 1002, 1003, 1004, 1001, 1002, 1005, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 0],
        "segments": [1, 1, 1, 1, 2, 2, 2, 0],
        "branches": [0, 0, 1, 1, 0, 0, 2, 0],
        "target_positions": [1, 2, 5, 0, 0, 0, 0, 0],
        "target_labels": [1003, 1004, 1005, 0, 0, 0, 0, 0],
        "target_slots": [1, 1, 2, 3, 3, 3, 3, 3],
        "target_indices": [0, 1, 0, 0, 0, 0, 0, 0],
        "ends": [[3, 6]],
        "lengths": [[0, 2, 1]],
        "references": [[[0.0, 0.0]]],
        "labels": [1.0],
        "scores": [[2.0, 1.0]],
    }


def test_a_list_by_hand_with_its_prompt_scored() -> None:
    """Prompt 3, two answers of three there might be: the prompt's tokens after its first are targets of branch 0."""
    batch, _ = pack([example(2, 3, [1, 2, 0])], None, Packing(8, 1, score_prompt=True))
    row = by_hand(batch)
    assert {name: row[name] for name in list(row)[:10]} == {
        "tokens": [3001, 3002, 3003, 3004, 3005, 3006, 0, 0],
        "positions": [0, 1, 2, 3, 3, 4, 0, 0],
        "segments": [1, 1, 1, 1, 1, 1, 0, 0],
        "branches": [0, 0, 0, 1, 2, 2, 0, 0],
        "target_positions": [0, 1, 2, 2, 4, 0, 0, 0],
        "target_labels": [3002, 3003, 3004, 3005, 3006, 0, 0, 0],
        "target_slots": [0, 0, 1, 2, 2, 4, 4, 4],
        "target_indices": [0, 1, 0, 0, 1, 0, 0, 0],
        "ends": [[3, 5, 0]],
        "lengths": [[2, 1, 2, 0]],
    }
    assert batch.num_tokens.tolist() == [2, 1, 2, 0]


def test_size_counts_a_shared_prompt_once() -> None:
    prompts, completions = np.array([10, 3, 7]), np.array([[4, 5], [1, 2], [6, 0]])
    assert Packing(64, 1).size(prompts, completions).tolist() == [19, 6, 13]
    assert Packing(64, 1, share_prompt=False).size(prompts, completions).tolist() == [29, 9, 13]


def test_an_example_longer_than_a_row_is_named() -> None:
    rows = [example(0, 4, [3, 3]), example(1, 20, [8, 9]), example(2, 10, [3, 4])]
    with pytest.raises(UserError) as caught:
        pack(rows, None, Packing(16, 1))
    assert str(caught.value) == (
        "training.row_length is 16, but example rows.jsonl:2 takes 37 tokens (20 of prompt, 8 + 9 of completions), and "
        "2 of 3 examples are longer than a row. Expected a row_length of at least 37, or a smaller data.max_length."
    )


def test_an_example_may_fill_a_row() -> None:
    prompts, completions = np.array([4]), np.array([[6, 6]])
    check_fits(Packing(16, 1), prompts, completions, str)
    with pytest.raises(UserError, match="takes 20 tokens"):
        check_fits(Packing(16, 1, share_prompt=False), prompts, completions, str)
    batch, _ = pack([example(0, 4, [6, 6])], None, Packing(16, 1))
    assert padding(batch) == 0.0


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 1000)] == [1, 2, 4, 4, 8, 8, 16, 1024]


def test_batches_of_a_run_have_few_shapes() -> None:
    """200 batches of random lengths: the arrays come in at most three shapes, each a compiled program."""
    rng = np.random.default_rng(1)
    shapes = set()
    for _ in range(200):
        rows = [example(n, int(rng.integers(4, 60)), rng.integers(2, 40, 2).tolist()) for n in range(16)]
        batch, _ = pack(rows, None, Packing(256, 1, microbatches=8))
        shapes.add((batch.tokens.shape, batch.lengths.shape))
    assert len(shapes) <= 3
