"""Labelled answers beside answers to other prompts."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxpo.data.dataset import TokenizedDataset
from jaxpo.data.loader import Corpus, Source, epoch_order
from jaxpo.data.mismatch import Mismatched, derangement
from jaxpo.errors import UserError

MAX_LENGTH = 40


@st.composite
def grouped(draw: st.DrawFn) -> np.ndarray:
    """Groups [N] of which none has more than half."""
    drawn = draw(st.lists(st.integers(0, 12), min_size=2, max_size=60))
    _, groups = np.unique(drawn, return_inverse=True)
    assume(2 * np.bincount(groups).max() <= len(groups))
    return groups


@given(grouped())
def test_a_derangement_takes_every_index_once_and_to_another_group(groups: np.ndarray) -> None:
    partners = derangement(groups)
    assert sorted(partners.tolist()) == list(range(len(groups)))
    assert (groups[partners] != groups).all()
    assert partners.tolist() == derangement(groups.copy()).tolist()


@pytest.mark.parametrize("groups", [[0, 1], [0, 0, 1, 1], [0, 1, 0, 1, 0, 2], [0, 1, 1, 1, 2, 3], list(range(9))])
def test_groups_of_up_to_a_half(groups: list[int]) -> None:
    partners = derangement(np.array(groups))
    assert sorted(partners.tolist()) == list(range(len(groups)))
    assert all(groups[i] != groups[p] for i, p in enumerate(partners.tolist()))


def test_a_derangement_is_not_a_mere_shift() -> None:
    offsets = (derangement(np.arange(1000)) - np.arange(1000)) % 1000
    assert len(np.unique(offsets)) > 500


def row(prompt: str, completion: str, label: Any = True) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt}], "completion": completion, "label": label}


ROWS = [
    row("the cat", "sat on the mat"),
    row("the dog", "said hello there, said the dog, and sat on the mat", False),
    row("the mat", "sat", 0.25),
    row("the cat", "said"),
    row("there and there and there, the dog", "hello", False),
]


@pytest.fixture
def source(write, tokenised) -> TokenizedDataset:
    return tokenised(write(ROWS), 1, "label", max_length=MAX_LENGTH)


def test_an_example_has_its_own_answer_and_its_partners(source: TokenizedDataset) -> None:
    view = Mismatched(source, MAX_LENGTH)
    assert len(view) == len(source) == 5
    for i, example in enumerate(view):
        own, partner = source[i], source[int(view.partners[i])]
        assert (example.id, example.label, example.scores) == (own.id, own.label, None)
        assert view.id(i) == own.id
        assert example.prompt.tolist() == own.prompt.tolist() != partner.prompt.tolist()
        first, second = example.completions
        assert first.tolist() == own.completions[0].tolist()
        whole = partner.completions[0].tolist()
        assert second.tolist() == whole[: MAX_LENGTH - len(own.prompt)] != []
        assert len(example.prompt) + max(len(first), len(second)) <= MAX_LENGTH
        assert view.completion_lengths[i].tolist() == [len(first), len(second)]
    assert view.completion_lengths.dtype == view.prompt_lengths.dtype == np.int32
    cut = sum(
        len(source[int(p)].completions[0]) > len(example.completions[1])
        for p, example in zip(view.partners, view, strict=True)
    )
    assert view.cut == view.truncated["mismatched"] == cut
    with pytest.raises(IndexError):
        view[5]


def test_answers_to_another_prompt_are_cut_and_counted(write, tokenised) -> None:
    rows = [row("the cat", "sat on the mat " * 4), row("said the cat to the dog", "a"), row("b", "c")]
    lengths = tokenised(write(rows), 1, "label")
    most = int((lengths.prompt_lengths + lengths.completion_lengths[:, 0]).max())
    view = Mismatched(tokenised(write(rows), 1, "label", max_length=most), most)
    whole = lengths.completion_lengths[view.partners, 0]
    long = view.prompt_lengths + whole > most
    # The long answer fits no longer prompt than its own.
    assert view.cut == long.sum() == (view.prompt_lengths[view.partners == 0] > view.prompt_lengths[0]).sum()
    assert (view.prompt_lengths + view.completion_lengths[:, 1] <= most).all()


def test_the_view_has_the_contradictions_of_its_source(write, tokenised) -> None:
    twice = tokenised(write([*ROWS, row("the cat", "said", False)]), 1, "label", max_length=MAX_LENGTH)
    assert Mismatched(twice, MAX_LENGTH).contradictions() == twice.contradictions() == 1


def test_the_view_is_a_source(source: TokenizedDataset) -> None:
    view = Mismatched(source, MAX_LENGTH)
    seen: Source = view
    assert (seen.feedback, seen.num_completions, seen.scores, seen.unrated) == ("label", 2, None, 0)
    same = ("path", "split", "format", "rows_read", "dropped", "dropped_path", "judgements", "soft", "templated")
    for name in (*same, "boundary_moved", "without_end", "pairs_parted", "unread"):
        assert getattr(view, name) == getattr(source, name)
    assert view.labels.tolist() == source.labels.tolist() == [1.0, 0.0, 0.25, 1.0, 0.0]
    corpus = Corpus((view, view))
    assert corpus.completion_lengths.shape == (10, 2)
    order = epoch_order(corpus, True, 0)
    assert {order[i] for i in range(10)} == set(range(10))
    assert corpus[7].completions[1].tolist() == view[2].completions[1].tolist()


def test_every_run_has_the_same_partners(source: TokenizedDataset) -> None:
    view, again = Mismatched(source, MAX_LENGTH), Mismatched(source, MAX_LENGTH)
    copy: Mismatched = pickle.loads(pickle.dumps(view))
    for other in (again, copy):
        assert other.fingerprint == view.fingerprint
        assert other.partners.tolist() == view.partners.tolist()
    assert copy[3].completions[1].tolist() == view[3].completions[1].tolist()


def test_the_fingerprint_is_of_all_tokens_the_partners_too_and_not_of_labels(write, tokenised) -> None:
    def fingerprint(rows: list[dict[str, Any]], max_length: int = 1000) -> str:
        source = tokenised(write(rows), 1, "label", max_length=max_length)
        view = Mismatched(source, max_length)
        assert view.fingerprint != source.fingerprint
        return view.fingerprint

    rows = [row("the cat", "sat on the mat " * 3), row("the longer dog", "b"), row("c", "d"), row("e", "f")]
    first = fingerprint(rows)
    assert fingerprint([{**one, "label": not one["label"]} for one in rows]) == first
    assert fingerprint(rows, 999) == first, "nothing is cut"
    assert fingerprint(rows[::-1]) != first
    assert fingerprint([*rows[:3], row("e", "F")]) != first


def test_a_cut_partner_changes_the_fingerprint(write, tokenised) -> None:
    rows = [row("the cat", "sat on the mat"), row("the cat and the dog", "b")]
    source = tokenised(write(rows), 1, "label")
    room = int(source.prompt_lengths[1] + source.completion_lengths[0, 0])
    whole, cut = Mismatched(source, room), Mismatched(source, room - 1)
    assert (whole.cut, cut.cut) == (0, 1)
    assert whole.fingerprint != cut.fingerprint


def test_two_answers_of_a_pair_are_never_partners(write, tokenised) -> None:
    pairs = [{"prompt": f"the cat {i} ", "chosen": f"sat {i}", "rejected": f"said {i}"} for i in range(20)]
    source = tokenised(write(pairs), 1, "label")
    view = Mismatched(source, 1000)
    rows = np.arange(40) // 2
    assert (rows[view.partners] != rows).all()


@pytest.mark.parametrize(("prompts", "most", "of"), [("aaab", 3, 4), ("a", 1, 1), ("bab", 2, 3), ("aaaa", 4, 4)])
def test_too_few_different_prompts(write, tokenised, prompts: str, most: int, of: int) -> None:
    path = write([row(prompt, f"answer {i}") for i, prompt in enumerate(prompts)])
    source = tokenised(path, 1, "label")
    with pytest.raises(UserError, match=rf"rows\.jsonl: {most} of {of} examples have the prompt of .*rows\.jsonl:1, "):
        Mismatched(source, 1000)
