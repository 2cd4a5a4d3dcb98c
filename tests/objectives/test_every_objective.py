"""What holds of every objective, whatever its loss: shares, empty slots, order, extremes, betas, metrics."""

from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import (
    ALL_CASES,
    CASES,
    COUPLED,
    DIFFERENTIABLE,
    DIVERGENCES,
    MEMBERS,
    MODIFIERS,
    TOTALS,
    UNCOUPLED,
    combined,
    completions,
    value_and_gradient,
)
from pydantic import TypeAdapter

from jaxpo.batch import Completions, Metrics, Objective
from jaxpo.objectives import AnyObjective
from jaxpo.objectives.base import in_order
from jaxpo.objectives.divergences import AnyDivergence, ReverseKL
from jaxpo.objectives.mixture import Mixture
from jaxpo.objectives.modifiers import AnyModifier
from jaxpo.objectives.pairwise import Pairwise
from jaxpo.objectives.ranked import AllPairs
from jaxpo.objectives.reference_free import ReferenceFreePairwise

SLOTS = (True, True, False, True, True, True)
# Fields that may hold anything in the slot of no example.
GARBAGE = (*DIFFERENTIABLE, "reference_logps", "shared_reference_logps", "confidence", "correct", "scores")


def case(cases: dict[str, Objective]) -> Any:
    return pytest.mark.parametrize("objective", cases.values(), ids=cases)


def test_there_is_a_case_of_everything() -> None:
    assert {type(objective) for objective in CASES.values()} == set(MEMBERS)
    assert {type(modifier) for modifier in MODIFIERS.values()} == set(get_args(get_args(AnyModifier)[0]))
    assert {type(divergence) for divergence in DIVERGENCES.values()} == (
        set(get_args(get_args(AnyDivergence)[0])) - {ReverseKL}
    )
    for name in MODIFIERS:
        assert any(key.endswith(f" with {name}") for key in ALL_CASES), name


def means(metrics: Metrics) -> dict[str, float]:
    return {name: float(metric.sum) / float(metric.weight) for name, metric in metrics.items() if float(metric.weight)}


def assert_same_metrics(found: Metrics, wanted: Metrics) -> None:
    assert found.keys() == wanted.keys()
    for name, metric in wanted.items():
        scale = 1e-5 * (1.0 + abs(float(metric.sum)))
        np.testing.assert_allclose(found[name], metric, rtol=1e-5, atol=scale, err_msg=name)


def assert_same_gradient(found: dict[str, jax.Array], wanted: dict[str, jax.Array]) -> None:
    for name in DIFFERENTIABLE:
        largest = float(jnp.abs(wanted[name]).max())
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6 * largest, err_msg=name)


def with_slots(c: Completions, change: Any) -> Completions:
    """`change` applied to each field of slots."""
    return c._replace(**{name: change(value) for name, value in c._asdict().items() if name not in TOTALS})


def microbatches(c: Completions, groups: list[int]) -> Completions:
    """The slots of each group as a microbatch [3, E, ...]: the others' are empty there."""
    mine = jnp.asarray(groups) == jnp.arange(3)[:, None]

    def split(values: jax.Array) -> jax.Array:
        keep = mine.reshape(*mine.shape, *[1] * (values.ndim - 1))
        return jnp.where(keep, values, jnp.zeros_like(values))

    return with_slots(c, split)


def check_shares(objective: Objective, c: Completions, groups: list[int]) -> None:
    """Value, gradient and metrics of the parts add up to those of the whole."""
    loss, metrics, gradient = value_and_gradient(objective, c)
    parts = microbatches(c, groups)
    mapped: dict[str, Any] = {name: None if name in TOTALS else 0 for name in Completions._fields}
    axes = Completions(**mapped)
    each = jax.vmap(lambda part: value_and_gradient(objective, part), in_axes=(axes,))
    losses, more_metrics, gradients = jax.tree.map(lambda x: x.sum(axis=0), each(parts))
    assert float(losses) == pytest.approx(float(loss), rel=2e-6, abs=1e-7)
    assert_same_gradient(gradients, gradient)
    assert_same_metrics(more_metrics, metrics)


@case({name: objective for name, objective in CASES.items() if name in UNCOUPLED})
@settings(deadline=None, max_examples=2)
@given(groups=st.lists(st.integers(0, 2), min_size=6, max_size=6), seed=st.integers(0, 100))
def test_shares_of_any_microbatches_add_up(objective: Objective, groups: list[int], seed: int) -> None:
    check_shares(objective, completions(objective, SLOTS, seed=seed), groups)


@case({name: objective for name, objective in combined() if name in UNCOUPLED})
def test_shares_add_up_with_every_modifier_and_divergence(objective: Objective) -> None:
    check_shares(objective, completions(objective, SLOTS), [1, 0, 1, 2, 0, 1])


@case({name: objective for name, objective in CASES.items() if name in COUPLED})
def test_the_check_of_shares_sees_examples_that_are_coupled(objective: Objective) -> None:
    """And what says of itself that it couples examples does."""
    with pytest.raises(AssertionError):
        check_shares(objective, completions(objective, SLOTS), [0, 1, 0, 1, 0, 1])


@case(CASES)
def test_a_microbatch_without_examples_adds_nothing(objective: Objective) -> None:
    c = completions(objective, SLOTS)
    empty = microbatches(c, [0] * 6)
    loss, metrics, gradient = value_and_gradient(objective, with_slots(empty, lambda values: values[1]))
    assert float(loss) == 0.0
    assert not any(np.any(g) for g in gradient.values())
    for name, metric in metrics.items():
        assert (float(metric.sum), float(metric.weight)) == (0.0, 0.0), name


@case(CASES)
def test_examples_lie_in_any_slots_and_what_is_in_the_others_does_not_matter(objective: Objective) -> None:
    """In any order, with anything in empty slots, lengths among it: it is `present` that decides."""
    dense = completions(objective, seed=3)
    loss, metrics, gradient = value_and_gradient(objective, dense)
    assert means(metrics)["loss"] == pytest.approx(float(loss), rel=1e-5)
    at = np.array([6, 1, 2, 8, 5, 4])
    here = np.isin(np.arange(9), at)

    def spread(values: jax.Array) -> jax.Array:
        return jnp.zeros((9, *values.shape[1:]), values.dtype).at[at].set(values)

    sparse = with_slots(dense, spread)
    for rubbish in ([0.0, 0.0, 0.0], [3e4, -3e4, 500.0], [np.nan, np.inf, -np.inf]):

        def fill(values: jax.Array, rubbish: list[float] = rubbish) -> jax.Array:
            return values.at[~here].set(jnp.reshape(jnp.float32(rubbish), (3, *[1] * (values.ndim - 1))))

        floats = {name: fill(value) for name, value in sparse._asdict().items() if name in GARBAGE}
        lengths = jnp.where(here[:, None], sparse.lengths, 3 if any(rubbish) else 0)
        found, found_metrics, found_gradient = value_and_gradient(objective, sparse._replace(**floats, lengths=lengths))
        assert float(found) == pytest.approx(float(loss), rel=1e-6), rubbish
        assert_same_metrics(found_metrics, metrics)
        assert_same_gradient({name: g[at] for name, g in found_gradient.items()}, gradient)
        if np.all(np.isfinite(rubbish)):
            assert not any(np.any(g[~here]) for g in found_gradient.values()), rubbish


@case(CASES)
def test_every_answer_is_learnt_from(objective: Objective) -> None:
    """But for mismatched ones, and those that the loss leaves flat."""
    c = completions(objective, SLOTS, seed=2)
    _, metrics, gradient = value_and_gradient(objective, c)
    moved = sum(np.abs(g) for name, g in gradient.items() if name != "prompt_logps")
    moved = np.asarray(moved)[np.asarray(c.lengths) > 0]
    assert np.count_nonzero(moved) >= len(moved) / 2
    assert all(np.isfinite(value) for value in means(metrics).values())


def extreme(objective: Objective) -> Completions:
    """Log-ratios, or rewards, of -500, 0 and 500 in every combination, of single tokens and, again, of 7 to one."""
    K = objective.num_completions
    rows = [(*row, 0.0, -500.0, 500.0)[:K] for row in product((-500.0, 0.0, 500.0), repeat=min(K, 2))]
    ratio = np.array([*rows, *rows], np.float32)
    E = len(ratio)
    c = completions(objective, (True,) * E)
    lengths = np.ones((E, K), np.int32)
    lengths[E // 2 :, 0] = 7
    # A token of probability 1 is the other end: its log-prob is 0.
    logps, reference = np.minimum(ratio, 0.0), np.minimum(-ratio, 0.0) * objective.uses_reference
    nothing = np.zeros_like(logps)
    rewards = "rewards" in objective.statistics
    arrays = {
        "lengths": lengths,
        "logps": nothing if rewards else logps,
        "shared_logps": logps,
        "reference_logps": nothing if rewards else reference,
        "shared_reference_logps": reference,
        # log p - log sum p^2 of a token against a vocabulary of 150,000.
        "confidence": np.where(ratio < 0, -500.0, 11.9),
        "rewards": ratio if rewards else nothing,
        "scores": np.tile(np.arange(K, 0, -1) * 10.0, (E, 1)),
        "label": np.arange(E) % 2 if objective.feedback == "label" else np.ones(E),
    }
    return c._replace(**{name: jnp.asarray(a, getattr(c, name).dtype) for name, a in arrays.items()})


@case(ALL_CASES)
def test_values_and_gradients_are_finite_at_extremes(objective: Objective) -> None:
    c = extreme(objective)
    assert objective.uses_reference is False or float(jnp.abs(c.logps - c.reference_logps).max()) == 500.0
    loss, metrics, gradient = value_and_gradient(objective, c)
    assert np.isfinite(float(loss))
    for name, g in gradient.items():
        assert np.all(np.isfinite(g)), name
    assert all(np.isfinite(value) for value in means(metrics).values())


def scaled(objective: Any, factor: float) -> Any:
    """The objective, and those it is made of, with every beta that holds on to a reference times a factor."""
    changes: dict[str, Any] = {}
    if isinstance(objective, ReferenceFreePairwise):
        return objective
    for field in fields(objective):
        value = getattr(objective, field.name)
        if field.name == "beta":
            changes["beta"] = value * factor
        elif is_dataclass(value):
            changes[field.name] = scaled(value, factor)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(scaled(item, factor) for item in value)
    return replace(objective, **changes)


@case(CASES)
def test_beta_scale_scales_every_beta(objective: Objective) -> None:
    def at(c: Completions, scale: float) -> Completions:
        return c._replace(carry={**c.carry, "beta_scale": jnp.float32(scale)})

    c = completions(objective, SLOTS)
    other = scaled(objective, 1.6)
    loss, metrics = objective(at(c, 1.6))
    wanted, wanted_metrics = other(at(c, 1.0))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert_same_metrics(metrics, wanted_metrics)
    if other != objective:
        assert float(loss) != pytest.approx(float(objective(at(c, 1.0))[0]), rel=1e-4)


@case(CASES)
def test_what_an_objective_does_not_ask_for_it_does_not_use(objective: Objective) -> None:
    """Reference, ratings, labels, prompts and the rest change nothing where it says that it has no use for them."""
    c = completions(objective, SLOTS)
    unused = {
        "reference_logps": not objective.uses_reference,
        "shared_reference_logps": not (objective.uses_reference and "shared" in objective.statistics),
        "shared_logps": "shared" not in objective.statistics,
        "confidence": "confidence" not in objective.statistics,
        "prompt_logps": "prompt" not in objective.statistics,
        "rewards": "rewards" not in objective.statistics,
        "scores": not objective.uses_scores,
        # Of mixtures and lists the data has hard labels only, and their parts may use them.
        "label": not objective.uses_labels and not isinstance(objective, Mixture | AllPairs),
    }
    other = c._replace(**{name: getattr(c, name) - 0.25 for name, free in unused.items() if free})
    loss, metrics = objective(c)
    found, found_metrics = objective(other)
    assert float(found) == float(loss)
    assert_same_metrics(found_metrics, metrics)
    for name, free in unused.items():
        if not free and name != "label" and not (isinstance(objective, Pairwise) and objective.modifiers):
            changed = c._replace(**{name: 0.6 * getattr(c, name) - 0.3})
            assert float(objective(changed)[0]) != float(loss), name


def test_rounding_is_a_tie() -> None:
    """Else a policy equal to its reference would be right or wrong by how rows were packed."""
    better = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, -jnp.inf])
    worse = jnp.array([0.5, 1.5, 1.0, 1.0 + 4e-6, 1.0 - 4e-6, 0.0])
    np.testing.assert_array_equal(in_order(better, worse), [1.0, 0.0, 0.5, 0.5, 0.5, 0.0])


@pytest.mark.parametrize("name", ["dpo", "kto", "plackett_luce"])
@pytest.mark.parametrize("beta", [0.0, -0.1, 1e-7, 1e7, 1e300])
def test_a_beta_that_float32_does_not_hold_is_refused(name: str, beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        TypeAdapter(AnyObjective).validate_python({"name": name, "beta": beta})


def test_lists_are_of_a_length_that_people_rank() -> None:
    with pytest.raises(ValueError, match="max_completions"):
        TypeAdapter(AnyObjective).validate_python({"name": "plackett_luce", "max_completions": 65})
