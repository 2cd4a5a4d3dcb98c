"""The batches of a run through grain: which examples each step sees is a pure function of (seed, step)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, SupportsIndex

import grain
import numpy as np

from jaxpo.batch import Example, Feedback, HostBatch
from jaxpo.data.pack import Packing, check_fits, pack


class Source(Protocol):
    """Examples of K completions from one source: a `TokenizedDataset`, or a view of one. See there for the fields."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: SupportsIndex, /) -> Example: ...
    def id(self, index: int, /) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def feedback(self) -> Feedback: ...
    @property
    def num_completions(self) -> int: ...
    @property
    def prompt_lengths(self) -> np.ndarray: ...
    @property
    def completion_lengths(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def scores(self) -> np.ndarray | None: ...
    @property
    def soft(self) -> bool: ...
    @property
    def unrated(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def judgements(self) -> str: ...
    @property
    def rows_read(self) -> int: ...
    @property
    def dropped(self) -> dict[str, int]: ...
    @property
    def dropped_path(self) -> Path: ...
    @property
    def pairs_parted(self) -> int: ...
    def contradictions(self) -> int: ...
    @property
    def unread(self) -> list[str]: ...
    @property
    def truncated(self) -> dict[str, int]: ...
    @property
    def boundary_moved(self) -> int: ...
    @property
    def templated(self) -> int: ...
    @property
    def without_end(self) -> int: ...


@dataclass(frozen=True)
class Corpus(Sequence[Example]):
    """Tokenised sources end to end; `weights` are their shares of an epoch, None for every example once."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        for source in self.sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens [N] of each prompt."""
        return np.concatenate([s.prompt_lengths for s in self.sources])

    @property
    def completion_lengths(self) -> np.ndarray:
        """Tokens [N, K] of each completion."""
        return np.concatenate([s.completion_lengths for s in self.sources])

    def check_fits(self, packing: Packing) -> None:
        """Raise UserError unless every example fits into a row."""
        check_fits(packing, self.prompt_lengths, self.completion_lengths, lambda i: self[i].id)


class Step(NamedTuple):
    """What a step trains on: the examples' indices in the corpus, and the packed batch."""

    examples: list[int]
    batch: HostBatch


def epoch_order(corpus: Corpus, shuffle: bool, seed: int) -> grain.MapDataset:
    """Example indices of an epoch, without end when indexed past it: each epoch is shuffled anew.

    With weights, sources are interleaved in proportion, an epoch ends with the source that ends first, and the next one
    goes on in the others where this one stopped.
    """
    starts = np.cumsum([0, *map(len, corpus.sources)])
    if corpus.weights is None:
        order = grain.MapDataset.range(len(corpus)).seed(seed)
        return order.shuffle() if shuffle else order
    parts = []
    for n, (start, stop) in enumerate(pairwise(starts)):
        part = grain.MapDataset.range(int(start), int(stop)).seed(seed + n)
        parts.append(part.shuffle() if shuffle else part)
    return grain.MapDataset.mix(parts, corpus.weights)


def num_steps(examples_per_epoch: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Steps of a run. Batches run on across epochs; only the last one may hold fewer than batch_size examples."""
    steps = math.ceil(examples_per_epoch * num_epochs / batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def batches(corpus: Corpus, batch_size: int, num_epochs: int, shuffle: bool, seed: int) -> grain.MapDataset:
    """The indices of the examples that each step of a run sees."""
    return epoch_order(corpus, shuffle, seed).repeat(num_epochs).batch(batch_size, batch_fn=list)


def steps(
    corpus: Corpus,
    references: np.ndarray | None,
    packing: Packing,
    *,
    batch_size: int,
    num_epochs: int,
    shuffle: bool,
    seed: int,
    first: int,
    last: int,
) -> Iterator[Step]:
    """Steps first (inclusive) to last (exclusive), packed ahead of time on threads.

    references [N, Q, K] are the reference's statistics of the corpus, None for objectives without a reference.
    """

    def build(indices: Sequence[int]) -> Step:
        chosen = [int(i) for i in indices]
        known = None if references is None else references[chosen]
        batch, _ = pack([corpus[i] for i in chosen], known, packing)
        return Step(chosen, batch)

    order = batches(corpus, batch_size, num_epochs, shuffle, seed)
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(order.slice(slice(first, last)).map(build).to_iter_dataset(read))


def in_order(corpus: Corpus, references: np.ndarray | None, packing: Packing, batch_size: int) -> Iterator[Step]:
    """Every example once, in file order: for evaluation."""
    for start in range(0, len(corpus), batch_size):
        chosen = list(range(start, min(start + batch_size, len(corpus))))
        known = None if references is None else references[chosen]
        yield Step(chosen, pack([corpus[i] for i in chosen], known, packing)[0])
