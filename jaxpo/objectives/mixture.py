"""A weighted sum of objectives over the same pairs."""

from typing import Annotated, Any, Literal

import jax
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from jaxpo.batch import Carry, Completions, Metrics, Statistic
from jaxpo.objectives.base import STRICT, Plain, Positive
from jaxpo.objectives.pairwise import merged
from jaxpo.objectives.reference_free import AnyPair
from jaxpo.objectives.supervised import SFT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Term:
    """One objective of a sum and its weight; sft imitates the chosen answers."""

    weight: Positive = 1.0
    objective: Annotated[AnyPair | SFT, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mixture(Plain):
    """The weighted sum of several objectives over pairs; each keeps its own beta and modifiers.

    Mixed preference optimisation, Wang et al. 2024 (arXiv 2411.10442), the MPO loss: dpo 0.8, bco_pair with its
    reward_shift 0.2, sft 1. Metrics are those of the first term over pairs, and the loss of each term as `loss/NAME`.
    """

    name: Literal["mixture"] = "mixture"
    terms: Annotated[tuple[Term, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _check_terms(self) -> Any:
        names = [term.objective.name for term in self.terms]
        if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
            raise ValueError(f"terms has {twice} {names.count(twice)} times; expected each objective once")
        return self

    @property
    def uses_reference(self) -> bool:
        return any(term.objective.uses_reference for term in self.terms)

    @property
    def uses_labels(self) -> bool:
        return all(term.objective.uses_labels or isinstance(term.objective, SFT) for term in self.terms)

    @property
    def uses_scores(self) -> bool:
        return any(term.objective.uses_scores for term in self.terms)

    @property
    def couples_examples(self) -> bool:
        return any(term.objective.couples_examples for term in self.terms)

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset().union(*(term.objective.statistics for term in self.terms))

    def initial_carry(self) -> dict[str, float]:
        return {name: value for term in self.terms for name, value in term.objective.initial_carry().items()}

    def next_carry(self, carry: Carry, metrics: Metrics) -> dict[str, jax.Array]:
        return {n: v for term in self.terms for n, v in term.objective.next_carry(carry, metrics).items()}

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        results = [(term, *term.objective(c)) for term in self.terms]
        total = sum((term.weight * share for term, share, _ in results), start=c.num_examples * 0.0)
        # Reversed, so that of metrics that several terms have the first one's stay.
        metrics = merged(more for term, _, more in reversed(results))
        each = {f"loss/{term.objective.name}": more["loss"] for term, _, more in results}
        return total, {**metrics, **each, "loss": c.total(total)}
