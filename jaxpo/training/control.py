"""A run's control of itself: how hard it holds on to the reference, and when it stops."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpo.batch import Carry, Metrics, direction
from jaxpo.config import AdaptiveBeta, ControlConfig
from jaxpo.training.metrics import Record

KL = "kl/abs"
# Of the smoothed distance to the reference, what is kept from one step to the next.
DECAY = 0.9
# Under these names the carried scalars are logged.
SMOOTHED_KL, BETA_SCALE = "kl/smoothed", "beta_scale"


@dataclass(frozen=True)
class Control:
    """What each step does to the carried scalars `beta_scale` and `kl`, the smoothed distance to the reference."""

    adaptive_beta: AdaptiveBeta | None = None

    def initial_carry(self) -> dict[str, float]:
        """Every beta as it is configured, and a policy that is where its reference is."""
        return {"beta_scale": 1.0, "kl": 0.0}

    def next_carry(self, carry: Carry, metrics: Metrics) -> dict[str, jax.Array]:
        """The carried scalars after a batch with these metrics; without `kl/abs` among them they stay."""
        if KL not in metrics:
            return {"beta_scale": carry["beta_scale"], "kl": carry["kl"]}
        kl = DECAY * carry["kl"] + (1.0 - DECAY) * metrics[KL].sum / jnp.maximum(metrics[KL].weight, 1.0)
        scale = carry["beta_scale"]
        if (band := self.adaptive_beta) is not None:
            faster = 1.0 + band.rate
            scale = jnp.where(kl > band.kl_high, scale * faster, jnp.where(kl < band.kl_low, scale / faster, scale))
            scale = jnp.clip(scale, 1.0 / band.limit, band.limit)
        return {"beta_scale": scale, "kl": kl}


def logged(config: ControlConfig, carry: Carry) -> Record:
    """What a logged line says of the carried scalars, as they are after its step: what the config makes use of."""
    named = {}
    if config.adaptive_beta is not None or config.max_kl is not None:
        named[SMOOTHED_KL] = carry["kl"]
    if config.adaptive_beta is not None:
        named[BETA_SCALE] = carry["beta_scale"]
    return {name: float(value) for name, value in jax.device_get(named).items()}


class Stop(NamedTuple):
    """Why a run ends before its last step, and after which step."""

    reason: str
    step: int


@dataclass
class Watch:
    """Whether a run is to stop: a function of its records, which it sees one after the other, and of nothing else.

    stop: the first reason to. A resumed run that shows it the lines of metrics.jsonl is where it was.
    """

    config: ControlConfig
    stop: Stop | None = None
    _best: float | None = field(default=None, init=False)
    _best_step: int = field(default=0, init=False)
    _waited: int = field(default=0, init=False)

    def see(self, step: int, record: Record) -> None:
        """The metrics of a step, or a part of them: a line's evaluation may come later than the rest of it."""
        reason = self._too_far(record) or self._no_better(step, record)
        if reason is not None and self.stop is None:
            self.stop = Stop(reason, step)

    def _too_far(self, record: Record) -> str | None:
        kl, most = record.get(SMOOTHED_KL), self.config.max_kl
        if kl is None or most is None or kl <= most:
            return None
        return f"{SMOOTHED_KL} is {kl:.4g}, more than control.max_kl, {most:g}"

    def _no_better(self, step: int, record: Record) -> str | None:
        rule = self.config.early_stop
        if rule is None or rule.metric not in record:
            return None
        value = record[rule.metric]
        if value is not None and math.isfinite(value) and self._is_better(value):
            self._best, self._best_step, self._waited = value, step, 0
            return None
        # Before the first step there is nothing yet that could get no better.
        self._waited += step > 0
        if self._waited < rule.patience:
            return None
        best = "was never a finite number" if self._best is None else f"is {self._best:.6g}, of step {self._best_step}"
        evaluations = f"{rule.patience} evaluation{'s' if rule.patience > 1 else ''} in a row"
        return f"{rule.metric} was no better for {evaluations}; its best {best}"

    def _is_better(self, value: float) -> bool:
        rule = self.config.early_stop
        assert rule is not None
        if self._best is None:
            return True
        return direction(rule.metric, rule.mode) * (value - self._best) > rule.min_delta
