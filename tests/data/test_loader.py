"""The order of examples: a pure function of (seed, step), whole epochs, proportions, the last batch."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from jaxpo.batch import Example
from jaxpo.data.loader import Corpus, epoch_order, in_order, num_steps, steps
from jaxpo.data.pack import Packing
from jaxpo.errors import UserError

PACKING = Packing(row_length=64, rows=2)


@dataclass
class Source:
    """Stands in for a TokenizedDataset: `size` pairs whose tokens say which one they are."""

    size: int
    first: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        token = np.int32(self.first + i)
        return Example(f"rows:{token}", np.full(1 + i % 5, token), (np.full(2, token), np.full(1 + i % 3, token)))

    @property
    def prompt_lengths(self) -> np.ndarray:
        return np.array([len(self[i].prompt) for i in range(self.size)])

    @property
    def completion_lengths(self) -> np.ndarray:
        return np.array([[len(c) for c in self[i].completions] for i in range(self.size)])


def corpus(*sizes: int, weights: tuple[float, ...] | None = None) -> Corpus:
    starts = np.cumsum([0, *sizes]).tolist()
    sources: Any = tuple(Source(size, start) for size, start in zip(sizes, starts, strict=False))
    return Corpus(sources, weights)


def indices(data: Corpus, first: int, last: int, **changes: Any) -> list[list[int]]:
    settings = {"batch_size": 4, "num_epochs": 3, "shuffle": True, "seed": 0, **changes}
    return [step.examples for step in steps(data, None, PACKING, first=first, last=last, **settings)]


def epoch_of(data: Corpus, shuffle: bool) -> list[int]:
    order: Any = epoch_order(data, shuffle, 0)
    return [int(order[i]) for i in range(len(order))]


def test_an_epoch_is_a_permutation_and_each_one_another() -> None:
    seen = [i for batch in indices(corpus(12), 0, 9) for i in batch]
    epochs = [seen[0:12], seen[12:24], seen[24:36]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert list(range(12)) not in epochs


def test_batches_run_on_across_epochs_and_the_last_one_is_what_is_left() -> None:
    batches = indices(corpus(10), 0, 8)
    assert [len(b) for b in batches] == [4] * 7 + [2]
    seen = [i for batch in batches for i in batch]
    assert all(sorted(seen[start : start + 10]) == list(range(10)) for start in (0, 10, 20))


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_starting_at_any_step_gives_the_batches_of_the_whole_run(
    weights: tuple[float, ...] | None, shuffle: bool
) -> None:
    data = corpus(9, 5, weights=weights)
    last = num_steps(len(epoch_order(data, shuffle, 0)), 4, 3, None)
    whole = indices(data, 0, last, shuffle=shuffle)
    assert len(whole) == last
    for first in range(last + 1):
        assert indices(data, first, last, shuffle=shuffle) == whole[first:]


def test_the_packed_batches_are_the_same_too() -> None:
    table = np.arange(24, dtype=np.float32).reshape(12, 1, 2)
    settings: Any = {"batch_size": 5, "num_epochs": 2, "shuffle": True, "seed": 3}
    whole = list(steps(corpus(12), table, PACKING, first=0, last=5, **settings))
    late = list(steps(corpus(12), table, PACKING, first=3, last=5, **settings))
    for a, b in zip(whole[3:], late, strict=True):
        assert a.examples == b.examples
        for one, other in zip(a.batch, b.batch, strict=True):
            np.testing.assert_array_equal(one, other)


def test_references_travel_with_their_examples() -> None:
    table = np.arange(1, 25, dtype=np.float32).reshape(12, 1, 2)
    settings: Any = {"batch_size": 5, "num_epochs": 1, "shuffle": True, "seed": 3}
    for step in steps(corpus(12), table, PACKING, first=0, last=3, **settings):
        batch = step.batch
        found = batch.references[np.asarray(batch.lengths)[..., 1] > 0]
        assert sorted(found.tolist()) == sorted(table[step.examples].tolist())
        assert set(batch.tokens[batch.segments > 0].tolist()) == set(step.examples)


def test_the_seed_decides() -> None:
    first = indices(corpus(12), 0, 9, seed=1)
    assert first == indices(corpus(12), 0, 9, seed=1)
    assert first != indices(corpus(12), 0, 9, seed=2)


def test_the_number_of_examples_in_a_batch_does_not_change_the_order() -> None:
    by_four = [i for b in indices(corpus(12), 0, 9) for i in b]
    by_six = [i for b in indices(corpus(12), 0, 6, batch_size=6) for i in b]
    assert by_four == by_six


def test_without_shuffle_the_order_is_that_of_the_files() -> None:
    seen = [i for b in indices(corpus(7, 3), 0, 8, shuffle=False) for i in b]
    assert seen == list(range(10)) * 3


def test_weights_are_shares_and_no_example_comes_twice_in_an_epoch() -> None:
    data = corpus(40, 100, weights=(1.0, 3.0))
    epoch = epoch_of(data, True)
    large = sum(i >= 40 for i in epoch)
    assert large == pytest.approx(3 * (len(epoch) - large), abs=3)
    assert max(Counter(epoch).values()) == 1
    # 100 rows of the second source last for 133 examples: there the epoch ends.
    assert len(epoch) == pytest.approx(133, abs=2)


def test_weights_interleave_all_along() -> None:
    epoch = np.array(epoch_of(corpus(40, 100, weights=(1.0, 3.0)), False))
    shares = [(epoch[start : start + 20] >= 40).mean() for start in range(0, 120, 20)]
    assert all(0.65 <= share <= 0.85 for share in shares)


def test_with_weights_the_next_epoch_goes_on_in_the_other_source() -> None:
    data = corpus(4, 12, weights=(1.0, 1.0))
    seen = [i for b in indices(data, 0, 6, num_epochs=3) for i in b]
    assert Counter(i for i in seen if i < 4) == dict.fromkeys(range(4), 3)
    assert sorted(i for i in seen if i >= 4) == list(range(4, 16))


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "max_steps", "expected"),
    [
        (10, 4, 1, None, 3),
        (10, 5, 1, None, 2),
        (10, 4, 3, None, 8),
        (10, 4, 3, 5, 5),
        (10, 4, 1, 50, 3),
        (3, 8, 1, None, 1),
    ],
)
def test_num_steps(examples: int, batch_size: int, epochs: int, max_steps: int | None, expected: int) -> None:
    assert num_steps(examples, batch_size, epochs, max_steps) == expected


def test_evaluation_takes_every_example_once_in_file_order() -> None:
    table = np.arange(20, dtype=np.float32).reshape(10, 1, 2)
    taken = list(in_order(corpus(7, 3), table, PACKING, 4))
    assert [step.examples for step in taken] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [int(step.batch.num_examples) for step in taken] == [4, 4, 2]
    last = taken[-1].batch
    assert last.references[np.asarray(last.lengths)[..., 1] > 0].tolist() == table[8:].tolist()


def test_a_corpus_is_its_sources_end_to_end() -> None:
    data = corpus(3, 4)
    assert len(data) == 7
    assert [example.id for example in data] == [f"rows:{i}" for i in range(7)]
    with pytest.raises(IndexError):
        data[7]
    assert data.prompt_lengths.tolist() == [len(e.prompt) for e in data]
    assert data.completion_lengths.tolist() == [[len(c) for c in e.completions] for e in data]


def test_an_example_that_fits_no_row_is_named() -> None:
    with pytest.raises(UserError, match="row_length is 8, but example rows:7 takes 9 tokens"):
        corpus(3, 5).check_fits(Packing(8, 1))
    corpus(3, 5).check_fits(Packing(9, 1))


def test_no_two_steps_in_a_row_repeat_an_example_within_an_epoch() -> None:
    batches = indices(corpus(12), 0, 3)
    assert all(not set(a) & set(b) for a, b in pairwise(batches))
