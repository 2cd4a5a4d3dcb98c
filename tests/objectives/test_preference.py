"""Objectives: what they make of a microbatch's completions, empty slots and shares included."""

import math
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Completions, Objective
from jaxpo.objectives import DPO, IPO, SFT

BETA = 0.1
LENGTHS = np.array([[3, 5], [1, 2], [8, 4], [6, 6], [2, 9]])


def completions(num_examples: int = 5, slots: int = 7, K: int = 2) -> Completions:
    """Five examples in the first of seven slots, two of them with equal rewards; the last slots are empty."""
    rng = np.random.default_rng(3)
    lengths = np.zeros((slots, K), np.int32)
    lengths[:5] = LENGTHS[:, :K]

    def noise() -> np.ndarray:
        # Sixty-fourths, so that sums and differences are exact and a tie is one.
        return np.round(64 * rng.normal(size=(slots, K))) / 64

    logps = np.where(lengths > 0, -2.0 * lengths + noise(), 0.0)
    references = np.where(lengths > 0, logps + noise(), 0.0)
    references[1:3] = logps[1:3] + 0.5
    return Completions(
        logps=jnp.float32(logps),
        reference_logps=jnp.float32(references),
        lengths=jnp.asarray(lengths),
        correct=jnp.float32(np.minimum(lengths, 2)),
        present=jnp.asarray(lengths[:, 0] > 0),
        num_examples=jnp.float32(num_examples),
        num_tokens=jnp.float32(lengths.sum()),
    )


def float64(c: Completions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Policy and reference log-probs and lengths of the examples that are there."""
    return tuple(np.asarray(x, np.float64)[:5] for x in (c.logps, c.reference_logps, c.lengths))  # pyright: ignore[reportReturnType]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def test_dpo_is_the_mean_over_examples() -> None:
    c = completions()
    logps, references, _ = float64(c)
    margin = BETA * ((logps - references)[:, 0] - (logps - references)[:, 1])
    loss, metrics = DPO(beta=BETA)(c)
    assert float(loss) == pytest.approx(-log_sigmoid(margin).mean(), rel=1e-6)
    assert float(metrics["loss"].sum / metrics["loss"].weight) == pytest.approx(float(loss), rel=1e-6)
    smoothed, _ = DPO(beta=BETA, label_smoothing=0.2)(c)
    expected = -(0.8 * log_sigmoid(margin) + 0.2 * log_sigmoid(-margin)).mean()
    assert float(smoothed) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_ipo_is_on_means_per_token_or_on_sums(normalize: bool) -> None:
    c = completions()
    logps, references, lengths = float64(c)
    ratio = (logps - references) / (lengths if normalize else 1.0)
    loss, metrics = IPO(beta=BETA, normalize=normalize)(c)
    assert float(loss) == pytest.approx(((ratio[:, 0] - ratio[:, 1] - 1 / (2 * BETA)) ** 2).mean(), rel=1e-6)
    rewards = BETA * (logps - references)
    assert float(metrics["rewards/chosen"].sum) == pytest.approx(rewards[:, 0].sum(), rel=1e-5)


def test_sft_is_the_mean_over_completion_tokens() -> None:
    """Over all tokens of the batch: a long answer weighs more than a short one."""
    c = completions(K=1)
    logps, _, lengths = float64(c)
    loss, metrics = SFT()(c)
    assert float(loss) == pytest.approx(-logps.sum() / lengths.sum(), rel=1e-6)
    assert float(loss) != pytest.approx(-(logps / lengths).mean(), rel=1e-2)
    accuracy = metrics["mean_token_accuracy"]
    assert float(accuracy.sum / accuracy.weight) == pytest.approx(np.minimum(lengths, 2).sum() / lengths.sum())


def test_metrics_of_pairs_are_their_means() -> None:
    c = completions()
    logps, references, lengths = float64(c)
    ratio = logps - references
    _, metrics = DPO(beta=BETA)(c)
    means = {name: float(m.sum / m.weight) for name, m in metrics.items()}
    assert means.pop("loss") > 0
    assert means == pytest.approx(
        {
            "rewards/chosen": BETA * ratio[:, 0].mean(),
            "rewards/rejected": BETA * ratio[:, 1].mean(),
            "rewards/margins": BETA * (ratio[:, 0] - ratio[:, 1]).mean(),
            "rewards/accuracies": (0.5 + 0.5 * np.sign(ratio[:, 0] - ratio[:, 1])).mean(),
            "logps/chosen": logps[:, 0].mean(),
            "logps/rejected": logps[:, 1].mean(),
            "logps/accuracies": (logps[:, 0] > logps[:, 1]).mean(),
            "kl/chosen": ratio[:, 0].sum() / lengths[:, 0].sum(),
            "kl/rejected": ratio[:, 1].sum() / lengths[:, 1].sum(),
            "mean_token_accuracy": np.minimum(lengths[:, 0], 2).sum() / lengths[:, 0].sum(),
        },
        rel=1e-4,
        abs=1e-6,
    )


def test_a_tie_counts_one_half() -> None:
    c = completions()
    tied = c._replace(reference_logps=c.logps)
    loss, metrics = DPO()(tied)
    accuracy = metrics["rewards/accuracies"]
    assert (float(accuracy.sum), float(accuracy.weight)) == (2.5, 5.0)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)


def test_metric_names_are_trls() -> None:
    """Those that both have are spelt alike, so that dashboards carry over; only these are our own."""
    try:
        trl = files("trl") or []
    except PackageNotFoundError:
        pytest.skip("needs trl, whose source says the names")
    source = next(f for f in trl if str(f).endswith("trainer/dpo_trainer.py"))
    text = Path(str(source.locate())).read_text(encoding="utf-8")
    _, metrics = DPO()(completions())
    # The loss is logged by transformers' trainer, which TRL's derives from.
    ours = {name for name in metrics if f'["{name}"]' not in text} - {"loss"}
    assert ours == {"logps/accuracies", "kl/chosen", "kl/rejected"}
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= metrics.keys()


@pytest.mark.parametrize("objective", [SFT(), DPO(label_smoothing=0.1), IPO(), IPO(normalize=False)])
def test_shares_of_microbatches_add_up(objective: Any) -> None:
    """Losses, gradients and metrics of any split of the slots sum to those of the whole."""
    whole = completions(K=objective.num_completions)
    cut = 2

    def share(logps: jax.Array, part: slice) -> tuple[jax.Array, Any]:
        slots = {name: value[part] for name, value in whole._asdict().items() if value.ndim}
        return objective(whole._replace(**{**slots, "logps": logps[part]}))

    gradient = jax.value_and_grad(share, has_aux=True)
    (loss, metrics), grad = gradient(whole.logps, slice(None))
    (loss1, metrics1), grad1 = gradient(whole.logps, slice(None, cut))
    (loss2, metrics2), grad2 = gradient(whole.logps, slice(cut, None))
    assert float(loss1 + loss2) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(grad1 + grad2, grad, rtol=1e-6)
    assert np.count_nonzero(grad[:5]) == 5 * objective.num_completions
    for name, metric in metrics.items():
        summed = np.add(metrics1[name], metrics2[name])
        np.testing.assert_allclose(summed, metric, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("objective", [SFT(), DPO(), IPO()])
def test_a_microbatch_without_examples_adds_nothing(objective: Objective) -> None:
    c = completions(K=objective.num_completions)
    empty = c._replace(**{name: jnp.zeros_like(value) for name, value in c._asdict().items() if value.ndim})

    def share(logps: jax.Array) -> tuple[jax.Array, Any]:
        return objective(empty._replace(logps=logps))

    (loss, metrics), grad = jax.value_and_grad(share, has_aux=True)(empty.logps)
    assert float(loss) == 0.0
    assert np.all(np.isfinite(grad))
    assert all(float(m.sum) == 0.0 and float(m.weight) == 0.0 for m in metrics.values())
