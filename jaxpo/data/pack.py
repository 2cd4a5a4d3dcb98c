"""Packing: examples into rows of tokens, the prompt stored once. Pure NumPy, deterministic, exact.

Legend (see `jaxpo.batch`): M microbatches of R rows of T tokens, S = T scored tokens, X example slots, K completions,
B = 1 + K branches, Q statistics of the reference.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxpo.batch import Example, HostBatch
from jaxpo.errors import UserError


@dataclass(frozen=True)
class Packing:
    """The layout of rows: their tokens, rows in a microbatch, one example a row or several, the prompt once or K times.

    shorter: lengths below row_length that the rows of a batch may have instead, where that leaves fewer places empty.
    Arrays have places for at least `microbatches` of the longest rows, or of as many shorter ones as hold no more
    tokens: smaller batches then keep the shape of the others, and no further program is compiled for them.
    score_prompt: whether a prompt's tokens are scored too, once, all but its first.
    devices: that the rows of a microbatch are split over, as many to each; each microbatch waits for the slowest.
    """

    row_length: int
    rows: int
    packed: bool = True
    share_prompt: bool = True
    microbatches: int = 1
    score_prompt: bool = False
    shorter: tuple[int, ...] = ()
    devices: int = 1

    def size(self, prompt: np.ndarray, completions: np.ndarray) -> np.ndarray:
        """Tokens [N] that examples take in a row, from prompt lengths [N] and completion lengths [N, K]."""
        return prompt * self._copies(completions) + completions.sum(axis=1)

    def seen(self, prompt: np.ndarray, completions: np.ndarray, window: int | None = None) -> np.ndarray:
        """Keys [N] that the tokens of examples see, all together: what attention by segments costs."""
        prompt, completions = prompt.astype(np.int64), completions.astype(np.int64)
        of_prompt, of_both = _seen_in_turn(prompt, window), _seen_in_turn(prompt[:, None] + completions, window)
        return self._copies(completions) * of_prompt + (of_both - of_prompt[:, None]).sum(axis=1)

    def _copies(self, completions: np.ndarray) -> np.ndarray | int:
        """How often a row holds each prompt."""
        return 1 if self.share_prompt else np.count_nonzero(completions, axis=1)

    def rows_of(self, sizes: Sequence[int]) -> tuple[int, list[list[int]]]:
        """The length of a batch's rows and the examples in each, from the examples' sizes.

        Of all lengths the one that leaves the fewest places empty in whole microbatches; the longest of those.
        """
        layouts: list[tuple[int, int, list[list[int]]]] = []
        for T in (*self.shorter, self.row_length):
            if max(sizes) <= T:
                rows = assign_rows(sizes, T) if self.packed else [[i] for i in range(len(sizes))]
                layouts.append((-(-len(rows) // self.rows) * T, -T, rows))
        _, minus_T, rows = min(layouts, key=lambda layout: layout[:2])
        return -minus_T, rows

    def places(self, sizes: Sequence[int]) -> int:
        """Places that a batch of examples of these sizes takes up, in whole microbatches."""
        T, rows = self.rows_of(sizes)
        return -(-len(rows) // self.rows) * self.rows * T

    def shape_of(self, T: int, num_microbatches: int) -> int:
        """Microbatches that arrays of rows of T tokens have places for."""
        return max(bucket(num_microbatches), bucket(self.microbatches * self.row_length // T))


def _seen_in_turn(n: np.ndarray, window: int | None) -> np.ndarray:
    """Keys that n tokens see, each those before it and itself, but no more than `window`."""
    full = n if window is None else np.minimum(n, window)
    return full * (full + 1) // 2 + (n - full) * full


class Place(NamedTuple):
    """Where an example lies: microbatch, row, slot."""

    microbatch: int
    row: int
    slot: int


def assign_rows(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of item indices by best-fit decreasing: each item goes where it leaves the least room.

    Ties go to the older row. Every size is at most row_length. Items keep their order within a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(room, (sizes[item], -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(item)
        else:
            left, row = row_length, len(rows)
            rows.append([item])
        insort(room, (left - sizes[item], row))
    return [sorted(row) for row in rows]


def balanced(rows: list[list[int]], costs: Sequence[int], packing: Packing) -> list[list[int]]:
    """The rows of a batch in whole microbatches, with empty rows between, such that devices wait little for each other.

    Rows of like cost, which is the sum of their items', go into one microbatch; there each, the costliest first, goes
    to the device that has the least to do so far (longest processing time first, Graham 1969).
    """
    of_row = [sum(costs[i] for i in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda r: -of_row[r])
    each = packing.rows // packing.devices
    laid: list[list[int]] = []
    for first in range(0, len(order), packing.rows):
        devices: list[list[int]] = [[] for _ in range(packing.devices)]
        for r in order[first : first + packing.rows]:
            free = [device for device in devices if len(device) < each]
            min(free, key=lambda device: sum(of_row[r] for r in device)).append(r)
        for device in devices:
            laid += [rows[r] for r in device] + [[]] * (each - len(device))
    return laid


def check_fits(packing: Packing, prompt: np.ndarray, completions: np.ndarray, name: Callable[[int], str]) -> None:
    """Raise UserError unless every example, of prompt [N] and completions [N, K] tokens, fits into a row."""
    sizes = packing.size(prompt, completions)
    largest = int(sizes.argmax())
    if sizes[largest] > packing.row_length:
        raise UserError(
            f"training.row_length is {packing.row_length}, but example {name(largest)} takes {sizes[largest]} tokens "
            f"({prompt[largest]} of prompt, {' + '.join(map(str, completions[largest]))} of completions), and "
            f"{int((sizes > packing.row_length).sum())} of {len(sizes)} examples are longer than a row. "
            f"Expected a row_length of at least {sizes[largest]}, or a smaller data.max_length."
        )


def shorter_rows(packing: Packing, batches: Sequence[Sequence[int]], shapes: int) -> tuple[int, ...]:
    """Up to shapes - 1 row lengths below row_length, with which `batches` of example sizes leave few places empty.

    Multiples of 64 are tried, or of more where rows are long; one is taken after the other, each the one that saves
    most. A length that saves less than one place in a thousand is not worth another program.
    """
    step = 64 * -(-packing.row_length // 4096)
    lengths = range(step, packing.row_length, step)
    places = [
        [replace(packing, row_length=T, shorter=()).places(sizes) if max(sizes) <= T else None for sizes in batches]
        for T in lengths
    ]
    best, taken = [packing.places(sizes) for sizes in batches], []
    while len(taken) < shapes - 1:
        with_each = [[min(b, p) if p is not None else b for b, p in zip(best, of_T, strict=True)] for of_T in places]
        sums = [sum(one) for one in with_each]
        if not sums or min(sums) > 0.999 * sum(best):
            break
        least = sums.index(min(sums))
        best = with_each[least]
        taken.append(lengths[least])
    return tuple(sorted(taken))


def bucket(n: int) -> int:
    """The next power of two: array shapes come in few sizes, so that few programs are compiled."""
    return 1 << max(0, n - 1).bit_length()


def pack(examples: Sequence[Example], references: np.ndarray | None, packing: Packing) -> tuple[HostBatch, list[Place]]:
    """Pack a batch of examples, all of K completions; references [N, Q, K] (zeros where None, Q = 1) travel along.

    Returns the batch and the place of each example. Shapes are a function of the examples and the packing alone, so a
    resumed run sees the same ones.
    """
    R = packing.rows
    K = len(examples[0].completions)
    B = 1 + K
    Q = 1 if references is None else references.shape[1]
    prompt_lengths = np.array([len(e.prompt) for e in examples])
    completion_lengths = np.array([[len(c) for c in e.completions] for e in examples])
    check_fits(packing, prompt_lengths, completion_lengths, lambda i: examples[i].id)
    T, rows = packing.rows_of(packing.size(prompt_lengths, completion_lengths).tolist())
    if packing.devices > 1:
        rows = balanced(rows, packing.seen(prompt_lengths, completion_lengths).tolist(), packing)
    num_microbatches = -(-len(rows) // R)
    M = packing.shape_of(T, num_microbatches)
    X = max(bucket(max(map(len, rows))), T // 32)
    scored_lengths = np.column_stack([(prompt_lengths - 1) * packing.score_prompt, completion_lengths])

    tokens, positions, segments, branches = np.zeros((4, M * R, T), np.int32)
    target_positions, target_labels, target_indices = np.zeros((3, M * R, T), np.int32)
    target_slots = np.full((M * R, T), X * B, np.int32)
    ends = np.zeros((M * R, X, K), np.int32)
    lengths = np.zeros((M * R, X, B), np.int32)
    packed_references = np.zeros((M * R, X, Q, K), np.float32)
    labels = np.zeros((M * R, X), np.float32)
    scores = np.zeros((M * R, X, K), np.float32)
    places = [Place(0, 0, 0)] * len(examples)
    for r, row in enumerate(rows):
        start, target, segment, last_prompt_token = 0, 0, 0, 0
        for x, i in enumerate(row):
            prompt, completions = examples[i].prompt, examples[i].completions
            P = len(prompt)
            for k, completion in enumerate(completions):
                C = len(completion)
                if C == 0:  # a list with fewer answers than K
                    continue
                if k == 0 or not packing.share_prompt:
                    segment += 1
                    span = slice(start, start + P)
                    tokens[r, span] = prompt
                    positions[r, span] = np.arange(P)
                    segments[r, span] = segment
                    if k == 0 and packing.score_prompt:
                        scored = slice(target, target + P - 1)
                        target_positions[r, scored] = np.arange(start, start + P - 1)
                        target_labels[r, scored] = prompt[1:]
                        target_slots[r, scored] = x * B
                        target_indices[r, scored] = np.arange(P - 1)
                        target += P - 1
                    start += P
                    last_prompt_token = start - 1
                span = slice(start, start + C)
                tokens[r, span] = completion
                positions[r, span] = np.arange(P, P + C)
                segments[r, span] = segment
                branches[r, span] = k + 1
                # The last prompt token predicts the first completion token, each completion token the next one.
                scored = slice(target, target + C)
                target_positions[r, scored] = np.arange(start - 1, start - 1 + C)
                target_positions[r, target] = last_prompt_token
                target_labels[r, scored] = completion
                target_slots[r, scored] = x * B + k + 1
                target_indices[r, scored] = np.arange(C)
                start += C
                target += C
                ends[r, x, k] = start - 1
            lengths[r, x] = scored_lengths[i]
            labels[r, x] = examples[i].label
            places[i] = Place(r // R, r % R, x)
            if (ratings := examples[i].scores) is not None:
                scores[r, x] = ratings
            if references is not None:
                packed_references[r, x] = references[i]

    def split(array: np.ndarray) -> np.ndarray:
        return array.reshape(M, R, *array.shape[1:])

    batch = HostBatch(
        tokens=split(tokens),
        positions=split(positions),
        segments=split(segments),
        branches=split(branches),
        target_positions=split(target_positions),
        target_labels=split(target_labels),
        target_slots=split(target_slots),
        target_indices=split(target_indices),
        ends=split(ends),
        lengths=split(lengths),
        references=split(packed_references),
        labels=split(labels),
        scores=split(scores),
        num_microbatches=np.array(num_microbatches, np.int32),
        num_examples=np.array(len(examples), np.int32),
        num_tokens=scored_lengths.sum(axis=0, dtype=np.int32),
    )
    return batch, places
