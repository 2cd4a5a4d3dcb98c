"""Every labelled answer beside one that was given to another prompt: what KTO estimates its KL term with."""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any, SupportsIndex

import numpy as np

from jaxpo.batch import Example, Feedback
from jaxpo.data.dataset import TokenizedDataset
from jaxpo.errors import UserError

# Not the run's seed: the reference table of these completions is shared by all runs on the same rows.
SEED = 2402_01306


class Mismatched:
    """A view of labelled answers (K = 1) as examples of K = 2: an answer, and the answer to another prompt.

    Ethayarajh et al. 2024 (arXiv 2402.01306), sec. 4.1, pair prompt i of a microbatch with answer i + 1 of it to
    estimate KL(policy || reference). Here the pairs are fixed over the whole dataset, `partners` [N], so that they have
    reference log-probs like any completion, and so that no batch is too small to have them. Every answer is a partner
    once, and never of an example with its own prompt.

    A partner's answer is cut to what its new prompt leaves of `max_length` tokens; `cut` counts those, and is the entry
    `mismatched` of `truncated`. All else is as in `TokenizedDataset`; fingerprint is of the partners' tokens too.
    """

    feedback: Feedback = "label"
    num_completions = 2
    scores: np.ndarray | None = None
    unrated = 0

    def __init__(self, source: TokenizedDataset, max_length: int):
        """`max_length` is that of the source. Raises UserError where there are too few different prompts."""
        assert source.feedback == "label" and source.num_completions == 1
        groups = source.prompt_groups()
        sizes = np.bincount(groups)
        if 2 * sizes.max() > len(groups):
            first = int(np.flatnonzero(groups == sizes.argmax())[0])
            raise UserError(
                f"{source.path}: {sizes.max()} of {len(groups)} examples have the prompt of {source.id(first)}, but "
                "the objective sets each prompt beside an answer to another one, to estimate the KL divergence. "
                "Expected at least two different prompts, and none in more than half of the examples."
            )
        self.source, self.max_length, self.partners = source, max_length, derangement(groups)
        own, room = source.completion_lengths[:, 0], max_length - source.prompt_lengths
        assert room.min() >= 1
        self.prompt_lengths = source.prompt_lengths
        self.completion_lengths = np.stack([own, np.minimum(own[self.partners], room)], axis=1)
        self.cut = int((own[self.partners] > room).sum())
        said = sha256(f"mismatched {source.fingerprint}".encode())
        said.update(self.partners.astype("<i8").tobytes())
        said.update(self.completion_lengths.astype("<i4").tobytes())
        self.fingerprint = said.hexdigest()
        self.truncated = {**source.truncated, "mismatched": self.cut}
        self.labels, self.soft, self.judgements = source.labels, source.soft, source.judgements
        self.path, self.split, self.format = source.path, source.split, source.format
        self.rows_read, self.dropped, self.dropped_path = source.rows_read, source.dropped, source.dropped_path
        self.pairs_parted, self.templated, self.unread = source.pairs_parted, source.templated, source.unread
        self.boundary_moved, self.without_end = source.boundary_moved, source.without_end

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> Example:
        own = self.source[index]
        i = index.__index__()
        partner = self.source[self.partners[i]].completions[0][: self.completion_lengths[i, 1]]
        return Example(own.id, own.prompt, (*own.completions, partner), own.label)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Mismatched, (self.source, self.max_length)

    def id(self, index: int) -> str:
        return self.source.id(index)

    def contradictions(self) -> int:
        return self.source.contradictions()


def derangement(groups: np.ndarray) -> np.ndarray:
    """A permutation [N] that takes every index to one of another group, the same whenever the groups [N] are the same.

    Groups lie end to end in random order, and each index goes to the one that is the largest group's size further on:
    beyond the end of its own group, and, from the beginning again, not as far as its begin, as no group may have more
    than half of all.
    """
    sizes = np.bincount(groups)
    assert 2 * sizes.max() <= len(groups)
    random = np.random.default_rng(SEED)
    order = np.lexsort((random.permutation(len(groups)), random.permutation(len(sizes))[groups]))
    partners = np.empty(len(groups), np.int64)
    partners[order] = np.roll(order, -sizes.max())
    return partners
