"""What a run is told of its data before it begins: how desirable and undesirable answers weigh against each other."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxpo.config import DataConfig, ModelConfig, Run
from jaxpo.data.loader import Corpus
from jaxpo.objectives import DPO
from jaxpo.objectives.unpaired import BCO, KTO, APOZeroUnpaired
from jaxpo.prepare import advise_weights, warn_of_one_kind


class Labels:
    """A source of which nothing but its labels matters."""

    def __init__(self, desirable: int, undesirable: int, soft: tuple[float, ...] = ()):
        self.labels = np.array([*[1.0] * desirable, *[0.0] * undesirable, *soft], np.float32)

    def __len__(self) -> int:
        return len(self.labels)


def advice(
    capsys: pytest.CaptureFixture[str], objective: Any, *sources: Any, weights: tuple[float, ...] | None = None
) -> tuple[str, str]:
    """What is said and what is warned of."""
    run = Run(model=ModelConfig(path="m"), data=DataConfig(), objective=objective)
    advise_weights(run, Corpus(sources, weights))
    told = capsys.readouterr()
    return " ".join(told.out.split()), " ".join(told.err.split())


def one_kind(capsys: pytest.CaptureFixture[str], objective: Any, *sources: Any) -> str:
    """What is warned of in data.eval."""
    run = Run(model=ModelConfig(path="m"), data=DataConfig(), objective=objective)
    warn_of_one_kind(run, Corpus(sources), "data.eval")
    return " ".join(capsys.readouterr().err.split())


def test_a_balance_inside_the_advice_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for objective, desirable, undesirable, ratio in (
        (KTO(), 10, 10, "1"),
        (KTO(), 12, 9, "1.33"),
        (KTO(undesirable_weight=2.0), 24, 10, "1.2"),
        (APOZeroUnpaired(desirable_weight=3.0), 5, 15, "1"),
    ):
        said, warned = advice(capsys, objective, Labels(desirable, undesirable))
        counted = f"data.train has {desirable} desirable and {undesirable} undesirable answers"
        assert said == f"{counted}; with their weights they stand {ratio} to 1"
        assert warned == ""


def test_a_balance_outside_it_comes_with_weights_that_mend_it(capsys: pytest.CaptureFixture[str]) -> None:
    said, warned = advice(capsys, KTO(), Labels(100, 400))
    assert said == ""
    assert warned == (
        "warning: data.train has 100 desirable and 400 undesirable answers; with their weights they stand 0.25 to 1, "
        "where KTO's authors advise 1 to 4/3: an objective.desirable_weight of 4 to 5.33, or an "
        "objective.undesirable_weight of 0.188 to 0.25"
    )


@pytest.mark.parametrize("desirable", [1, 7, 99, 12_345])
@pytest.mark.parametrize("undesirable", [3, 64, 1_001])
@pytest.mark.parametrize("kind", [KTO, APOZeroUnpaired])
def test_the_weights_that_are_advised_are_inside(
    capsys: pytest.CaptureFixture[str], kind: type[KTO], desirable: int, undesirable: int
) -> None:
    source = Labels(desirable, undesirable)
    given = kind(desirable_weight=1.7, undesirable_weight=0.3)
    _, warned = advice(capsys, given, source)
    pattern = r"desirable_weight of (\S+) to (\S+), or an objective\.undesirable_weight of (\S+) to (\S+)"
    found = re.search(pattern, warned)
    assert found is not None
    for n, value in enumerate(map(float, found.groups())):
        mended = replace(given, desirable_weight=value) if n < 2 else replace(given, undesirable_weight=value)
        assert advice(capsys, mended, source)[1] == ""


def test_a_soft_label_counts_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    said, _ = advice(capsys, KTO(), Labels(4, 4, soft=(0.75, 0.5)))
    assert "5.25 desirable and 4.75 undesirable answers; with their weights they stand 1.11 to 1" in said


def test_sources_with_weights_count_by_their_share_of_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    """One half of each source: 9/10 and 1/10 desirable, though the second source is ten times as long."""
    sources = (Labels(9, 1), Labels(10, 90))
    said, _ = advice(capsys, KTO(), *sources, weights=(1.0, 1.0))
    assert "19 desirable and 91 undesirable answers, 50.0% of an epoch desirable" in said
    assert said.endswith("they stand 1 to 1")
    assert "they stand 0.209 to 1" in advice(capsys, KTO(), *sources)[1]


@pytest.mark.parametrize(("desirable", "undesirable"), [(5, 0), (0, 5)])
@pytest.mark.parametrize("objective", [KTO(), APOZeroUnpaired(), BCO()])
def test_one_kind_alone_is_told(
    capsys: pytest.CaptureFixture[str], objective: Any, desirable: int, undesirable: int
) -> None:
    source = Labels(desirable, undesirable)
    assert one_kind(capsys, objective, source) == (
        f"warning: data.eval has {desirable} desirable and {undesirable} undesirable answers: objective "
        f"{objective.name} has nothing to tell apart; expected answers of both kinds"
    )
    assert advice(capsys, objective, source) == ("", "")


def test_both_kinds_together_are_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_kind(capsys, BCO(), Labels(5, 0), Labels(0, 1)) == ""
    assert one_kind(capsys, BCO(), Labels(0, 0, soft=(0.25, 0.25))) == ""
    # Of pairs, every label may be 1.
    assert one_kind(capsys, DPO(), Labels(5, 0)) == ""


@pytest.mark.parametrize("objective", [DPO(), BCO()])
def test_objectives_without_such_weights_are_told_nothing(capsys: pytest.CaptureFixture[str], objective: Any) -> None:
    assert advice(capsys, objective, Labels(1, 99)) == ("", "")
