"""Supervised fine-tuning: the one completion of an example is to be imitated."""

from typing import ClassVar, Literal

import jax
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from jaxpo.batch import Completions, Metric


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class SFT:
    """Mean negative log-likelihood per completion token of the whole batch, however it is split into microbatches."""

    name: Literal["sft"] = "sft"

    num_completions: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False

    def __call__(self, c: Completions) -> tuple[jax.Array, dict[str, Metric]]:
        nll, tokens = -c.logps.sum(), c.lengths.sum()
        return nll / c.num_tokens, {
            "loss": Metric(nll, tokens),
            "mean_token_accuracy": Metric(c.correct.sum(), tokens),
        }
