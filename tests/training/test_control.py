"""A run's control of itself: beta in its band, and when to stop."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Metric, direction
from jaxpo.config import AdaptiveBeta, ControlConfig, EarlyStop
from jaxpo.training.control import Control, Stop, Watch, logged
from jaxpo.training.metrics import JsonLines, Known, Record, read

BAND = AdaptiveBeta(kl_low=1.0, kl_high=2.0, rate=0.1, limit=1.5)


def distance(mean: float, weight: float = 4.0) -> dict[str, Metric]:
    return {"kl/abs": Metric(jnp.float32(mean * weight), jnp.float32(weight))}


def course(control: Control, distances: Sequence[float], **start: float) -> list[dict[str, float]]:
    """The carried scalars after each batch, from where a run starts or from `start`."""
    carry = {name: jnp.float32(value) for name, value in {**control.initial_carry(), **start}.items()}
    step, out = jax.jit(control.next_carry), []
    for mean in distances:
        carry = step(carry, distance(mean))
        out.append({name: float(value) for name, value in carry.items()})
    return out


def test_the_distance_is_smoothed() -> None:
    found = [carry["kl"] for carry in course(Control(), [3.0] * 30)]
    np.testing.assert_allclose(found, [3.0 * (1 - 0.9**n) for n in range(1, 31)], rtol=1e-5)


@pytest.mark.parametrize(("kl", "scales"), [(5.0, [1.1, 1.21]), (0.2, [1 / 1.1, 1 / 1.21]), (1.5, [1.0, 1.0])])
def test_beta_rises_above_the_band_falls_below_it_and_stays_inside(kl: float, scales: list[float]) -> None:
    found = course(Control(BAND), [kl, kl], kl=kl)
    np.testing.assert_allclose([carry["beta_scale"] for carry in found], scales, rtol=1e-6)


@pytest.mark.parametrize(("kl", "limit"), [(5.0, 1.5), (0.0, 1 / 1.5)])
def test_beta_stays_within_its_limit(kl: float, limit: float) -> None:
    found = [carry["beta_scale"] for carry in course(Control(BAND), [kl] * 8, kl=kl)]
    assert found[-1] == found[-2] == pytest.approx(limit)
    assert abs(found[2] - 1.0) < abs(limit - 1.0)


def test_without_a_band_beta_stays_as_it_is() -> None:
    assert {carry["beta_scale"] for carry in course(Control(), [0.0, 50.0, 5.0])} == {1.0}


def test_a_course_that_is_interrupted_goes_on_exactly() -> None:
    distances = np.random.default_rng(0).uniform(0.0, 4.0, 40).tolist()
    whole = course(Control(BAND), distances)
    assert {carry["beta_scale"] > 1.0 for carry in whole} == {True, False}
    assert whole[:17] + course(Control(BAND), distances[17:], **whole[16]) == whole


def test_without_a_distance_nothing_changes() -> None:
    carry = {"beta_scale": jnp.float32(1.2), "kl": jnp.float32(0.5)}
    assert Control(BAND).next_carry(carry, {}) == carry


def test_what_is_logged_is_what_the_config_makes_use_of() -> None:
    carry = {"beta_scale": jnp.float32(1.25), "kl": jnp.float32(0.5), "reward_shift/chosen/mean": jnp.float32(1.0)}
    assert logged(ControlConfig(), carry) == {}
    assert logged(ControlConfig(max_kl=1.0), carry) == {"kl/smoothed": 0.5}
    assert logged(ControlConfig(adaptive_beta=BAND), carry) == {"kl/smoothed": 0.5, "beta_scale": 1.25}


def seen(config: ControlConfig, lines: list[tuple[int, Record]]) -> Stop | None:
    watch = Watch(config)
    for step, line in lines:
        watch.see(step, line)
    return watch.stop


def evaluations(*values: float | None) -> list[tuple[int, Record]]:
    """One every ten steps, from before the first."""
    return [(10 * n, {"eval_loss": value}) for n, value in enumerate(values)]


def stop_step(rule: dict[str, Any], *values: float | None) -> int | None:
    stop = seen(ControlConfig(early_stop=EarlyStop(metric="eval_loss", **rule)), evaluations(*values))
    return None if stop is None else stop.step


def test_max_kl_is_the_first_line_beyond_it() -> None:
    lines: list[tuple[int, Record]] = [(n, {"kl/smoothed": kl}) for n, kl in enumerate((0.1, 2.0, 2.1, 1.0, 9.0), 1)]
    assert seen(ControlConfig(max_kl=2.0), lines) == Stop("kl/smoothed is 2.1, more than control.max_kl, 2", 3)
    assert seen(ControlConfig(max_kl=9.0), lines) is None
    assert seen(ControlConfig(), lines) is None
    assert seen(ControlConfig(max_kl=2.0), [(1, {"kl/smoothed": None}), (2, {"loss": 5.0})]) is None


def test_early_stop_waits_as_long_as_it_is_told() -> None:
    falling = {"mode": "min", "patience": 2}
    assert stop_step(falling, 5, 4, 3, 2, 1) is None
    assert stop_step(falling, 5, 4, 4, 4) == 30
    assert stop_step(falling, 5, 6, 7) == 20
    assert stop_step(falling, 5, 6, 4, 6, 3.9, 6) is None
    assert stop_step(falling, 5, 6, 4, 4.5, 4.2, 1) == 40
    assert stop_step({"mode": "min", "patience": 1}, 5, 4, 4) == 20


def test_early_stop_goes_either_way() -> None:
    rising = {"mode": "max", "patience": 2}
    assert stop_step(rising, 1, 2, 3, 4) is None
    assert stop_step(rising, 4, 3, 2) == 20
    # Of a loss the name says that less is better.
    assert stop_step({"patience": 2}, 4, 3, 2) is None
    assert stop_step({"patience": 2}, 1, 2, 3, 4) == 20


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("loss", "nll_loss", "loss/dpo", "loss/sft", "kl", "kl/abs", "calibration_error"), -1),
        (("accuracy", "rewards/accuracies", "logps/accuracies", "rewards/top1", "mean_token_accuracy"), 1),
        (("margin", "rewards/margins", "log_odds_chosen", "log_odds_ratio"), 1),
        (("rewards/chosen", "rewards/rejected", "logps/chosen", "kl/chosen", "kl/rejected", "confidence"), 0),
        (("mean_reward", "reward_shift", "lossy", "klaxon", "acuracy"), 0),
    ],
)
def test_which_way_a_metric_is_better(names: tuple[str, ...], expected: int) -> None:
    for name in names:
        assert direction(name) == direction(f"eval_{name}") == expected
        assert (direction(name, "min"), direction(name, "max")) == (-1, 1)


def test_early_stop_takes_small_gains_for_none() -> None:
    """Each is measured from the last value that counted, so that many small ones make a large one."""
    rule = {"mode": "min", "patience": 2, "min_delta": 0.5}
    assert stop_step(rule, 5, 4.6, 4.5, 4) == 20
    assert stop_step(rule, 5, 4.8, 4.4, 4.2, 3.8) is None
    assert stop_step({**rule, "mode": "max"}, 5, 5.5, 5.4) == 20


def test_values_that_are_no_numbers_are_no_better() -> None:
    assert stop_step({"patience": 2}, 1, None, float("nan")) == 20
    assert stop_step({"patience": 2}, None, None, None) == 20
    # Before the first step there is nothing that could get no better.
    assert stop_step({"patience": 1}, None, 0.6, 0.5) is None


def test_the_reason_names_metric_patience_and_best() -> None:
    config = ControlConfig(early_stop=EarlyStop(metric="eval_loss", mode="min", patience=2))
    assert seen(config, evaluations(5.0, 4.25, 6.0, 4.5)) == Stop(
        "eval_loss was no better for 2 evaluations in a row; its best is 4.25, of step 10", 30
    )
    config = ControlConfig(early_stop=EarlyStop(metric="eval_loss", patience=1))
    assert seen(config, evaluations(None, None)) == Stop(
        "eval_loss was no better for 1 evaluation in a row; its best was never a finite number", 10
    )


def test_the_first_reason_stays() -> None:
    both = ControlConfig(max_kl=1.0, early_stop=EarlyStop(metric="eval_loss", mode="min", patience=1))
    lines: list[tuple[int, Record]] = [(0, {"eval_loss": 1.0}), (5, {"kl/smoothed": 2.0}), (5, {"eval_loss": 3.0})]
    stop = seen(both, [*lines, (6, {"kl/smoothed": 7.0})])
    assert stop is not None
    assert stop.reason.startswith("kl/smoothed is 2,")


@pytest.mark.parametrize("at", range(7))
def test_what_was_seen_follows_from_the_file_alone(tmp_path: Path, at: int) -> None:
    """Resumed after any line, with a value that JSON has no number for among them."""
    config = ControlConfig(early_stop=EarlyStop(metric="eval_loss", mode="min", patience=2))
    values = (0.1 + 0.2, 0.3, float("nan"), 1 / 3, 0.1, 0.1, 0.2)
    sink = JsonLines(tmp_path, 0, Known(0, {}, 0))
    for step, line in evaluations(*values)[: at + 1]:
        sink.write(step, line)
    sink.close()
    watch = Watch(config)
    for record in read(tmp_path):
        assert json.loads(json.dumps(record)) == record
        watch.see(int(record["step"] or 0), record)
    for step, line in evaluations(*values)[at + 1 :]:
        watch.see(step, line)
    whole = seen(config, evaluations(*values))
    assert whole is not None
    assert watch.stop == whole
    assert whole.step == 30
