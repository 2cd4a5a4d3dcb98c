"""Rows to arrays of token ids, a chunk at a time, by several processes where there is enough to do.

Worker processes import this module; it needs neither jax nor torch.
"""

import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from multiprocessing import get_context, parent_process

import numpy as np

from jaxpo.data.chat import Encoded, Encoder, Limits, Refused, fit
from jaxpo.data.files import Row, Where
from jaxpo.data.formats import Drop, Reading, excerpt, parse
from jaxpo.data.readers import Preference
from jaxpo.data.record import Record
from jaxpo.errors import UserError

CHUNK_ROWS = 256
# Fewer rows than this are done sooner by the threads of tokenizers than by processes, which take a second to start.
POOL_ROWS = 8192
# A completion ends its turn if a special token is among its last few: `<|im_end|>` and a newline, say.
END_TOKENS = 4


@dataclass
class Chunk:
    """What became of some rows, in their order.

    rows: how many. tokens: int32, all examples one after the other, each as its prompt and then its completions.
    lengths [n, K+1]: of the prompt and the completions, 0 for those that a list of fewer than K answers lacks. labels
    [n], scores [n, K]: as in `Example`. counts: `prompt_cut` (examples), `completion_cut` (completions),
    `boundary_moved` (examples), `templated` (examples rendered by the chat template), `without_end` (completions whose
    own end, uncut, is no special token), `rated` (examples with scores), `pairs_parted` (rows that became two labelled
    answers, or one where the other is dropped). columns: those of any row that are not null. lost: text at the end of a
    prompt that the boundary moved over, from the first such example.
    """

    rows: int
    lengths: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    wheres: list[Where] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    lost: str | None = None


class Tokeniser:
    """Makes a chunk of rows; picklable."""

    def __init__(self, encoder: Encoder, reading: Reading, num_completions: int, limits: Limits):
        self.encoder, self.reading, self.num_completions, self.limits = encoder, reading, num_completions, limits

    def __call__(self, rows: list[tuple[Where, Row]]) -> Chunk:
        K = self.num_completions
        records = [Record(*row) for row in rows]
        parsed = [(i, part) for i, record in enumerate(records) for part in parse(record, self.reading, K)]
        usable = [(rows[i][0], part) for i, part in parsed if isinstance(part, Preference)]
        encoded = iter(self.encoder(usable))

        most = len(usable)
        chunk = Chunk(
            rows=len(rows),
            lengths=np.zeros((most, K + 1), np.int32),
            labels=np.ones(most, np.float32),
            scores=np.zeros((most, K), np.float32),
            columns={column for record in records for column in record.columns()},
        )
        flat: list[int] = []
        parted: set[int] = set()
        for i, part in parsed:
            if isinstance(part, Drop):
                chunk.drops.append(part)
                continue
            where, row = rows[i][0]._replace(part=part.part), rows[i][1]
            example = self._example(next(encoded), chunk)
            if isinstance(example, Refused):
                detail = f"{example.detail}: " if example.detail else ""
                chunk.drops.append(Drop(where, example.reason, detail + excerpt(row)))
                continue
            n = len(chunk.wheres)
            chunk.wheres.append(where)
            chunk.lengths[n, : len(example)] = [len(ids) for ids in example]
            chunk.labels[n] = part.label
            if part.scores is not None:
                chunk.scores[n, : len(part.scores)] = part.scores
                chunk.counts["rated"] += 1
            chunk.counts["templated"] += not isinstance(part.prompt, str)
            for ids in example:
                flat += ids
            if self.reading.parts_pairs:
                parted.add(i)
        n = len(chunk.wheres)
        chunk.tokens = np.asarray(flat, np.int32)
        chunk.lengths, chunk.labels, chunk.scores = chunk.lengths[:n], chunk.labels[:n], chunk.scores[:n]
        chunk.counts["pairs_parted"] += len(parted)
        return chunk

    def _example(self, encoded: Encoded | Refused, chunk: Chunk) -> list[list[int]] | Refused:
        """Prompt and completions within the limits; counts what was cut of those that are kept."""
        if isinstance(encoded, Refused):
            return encoded
        if not all(encoded.completions):
            return Refused("empty_answer", "the chat template renders nothing for an answer")
        if self._has_equal(encoded.completions):
            return Refused("equal_answers", "")
        fitted = fit(encoded, self.limits)
        if not all(fitted.completions):
            return Refused("no_completion_left", f"the prompt alone has {len(fitted.prompt)} tokens")
        if self._has_equal(fitted.completions):
            return Refused("equal_after_truncation", "")
        whole = [c for c, kept in zip(encoded.completions, fitted.completions, strict=True) if len(c) == len(kept)]
        chunk.counts["prompt_cut"] += fitted.prompt_cut
        chunk.counts["completion_cut"] += fitted.completions_cut
        chunk.counts["boundary_moved"] += bool(encoded.lost)
        chunk.counts["without_end"] += sum(self._special.isdisjoint(c[-END_TOKENS:]) for c in whole)
        if encoded.lost and chunk.lost is None:
            chunk.lost = self.encoder.tokenizer.backend_tokenizer.decode(encoded.lost, skip_special_tokens=False)
        return [fitted.prompt, *fitted.completions]

    def _has_equal(self, completions: tuple[list[int], ...]) -> bool:
        return len(set(map(tuple, completions))) < len(completions)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.encoder.tokenizer.added_tokens_decoder
        return frozenset(i for i, token in added.items() if token.special)


def tokenise(rows: Iterator[tuple[Where, Row]], tokeniser: Tokeniser, workers: int) -> Iterator[Chunk]:
    """Chunks in the order of the rows, by `workers` processes; by this one if 1."""
    chunks = _chunks(rows)
    if workers == 1:
        yield from map(tokeniser, chunks)
        return
    # Not forked: the parent has threads of jax's, which a fork would leave half-way through whatever they hold.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(tokeniser,)) as pool:
        pending: deque[Future[Chunk]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"data.workers: one of the {workers} processes that tokenise was killed, for want of memory perhaps. "
                "Expected memory for all of them; with fewer data.workers they take less. The same command begins "
                "this source anew."
            ) from error
        finally:
            for future in pending:
                future.cancel()


def available_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _chunks(rows: Iterator[tuple[Where, Row]]) -> Iterator[list[tuple[Where, Row]]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


_tokeniser: Tokeniser | None = None


def _start(tokeniser: Tokeniser) -> None:
    global _tokeniser
    # One process a core is enough; threads in each would only contend.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokeniser = tokeniser
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells its workers nothing, and they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(rows: list[tuple[Where, Row]]) -> Chunk:
    assert _tokeniser is not None
    return _tokeniser(rows)
