"""The train step and the evaluation step: pure functions of state and batch, one compiled program each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxpo.batch import Completions, DeviceBatch, Metric, Objective
from jaxpo.models.decoder import Decoder
from jaxpo.objectives.score import Scorer, microbatch

Metrics = dict[str, Metric]


class TrainState(NamedTuple):
    """All that a step changes: the number of updates done, the weights, the optimizer's state."""

    step: jax.Array
    decoder: Decoder
    optimizer: optax.OptState


class StepResult(NamedTuple):
    """Metrics as sums and weights, the gradient's norm before clipping, and whether loss and gradient are finite."""

    metrics: Metrics
    grad_norm: jax.Array
    finite: jax.Array


def microbatch_loss(
    decoder: Decoder, batch: DeviceBatch, objective: Objective, scorer: Scorer
) -> tuple[jax.Array, Metrics]:
    """A microbatch's share of the batch's loss, and its metrics."""
    scores = scorer(decoder, batch)
    R, X, K = batch.lengths.shape
    completions = Completions(
        logps=scores.logps.reshape(R * X, K),
        reference_logps=jnp.reshape(batch.reference_logps, (R * X, K)),
        lengths=jnp.reshape(batch.lengths, (R * X, K)),
        correct=scores.correct.reshape(R * X, K),
        present=jnp.reshape(batch.lengths[:, :, 0] > 0, R * X),
        num_examples=jnp.asarray(batch.num_examples, jnp.float32),
        num_tokens=jnp.asarray(batch.num_tokens, jnp.float32),
    )
    loss, metrics = objective(completions)
    return loss, jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)


def add(a: Metrics, b: Metrics) -> Metrics:
    return jax.tree.map(jnp.add, a, b)


def zeros_like_output(function: Callable, *args: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *args))


def make_train_step(
    objective: Objective, scorer: Scorer, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, StepResult]]:
    """The step: gradients of all microbatches added up, then one update.

    The number of microbatches is a run-time value, so one program serves every batch of the same shapes. Shares of the
    loss add up to the batch's loss, so the sum of the gradients is the batch's gradient, exactly.
    """
    gradient = jax.value_and_grad(lambda d, b: microbatch_loss(d, b, objective, scorer), has_aux=True)

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepResult]:
        def accumulate(i: jax.Array, carry):
            loss, metrics, grads = carry
            (share, more), grad = gradient(state.decoder, microbatch(batch, i))
            return loss + share, add(metrics, more), jax.tree.map(jnp.add, grads, grad)

        (loss, metrics), grads = zeros_like_output(gradient, state.decoder, microbatch(batch, jnp.int32(0)))
        # Sums of many small terms: in bfloat16 they would depend on the number of microbatches.
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        loss, metrics, grads = lax.fori_loop(0, batch.num_microbatches, accumulate, (loss, metrics, grads))
        grad_norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.decoder)
        params: Any = state.decoder
        updates, optimizer_state = optimizer.update(grads, state.optimizer, params)
        decoder: Any = optax.apply_updates(params, updates)
        result = StepResult(metrics, grad_norm, jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        return TrainState(state.step + 1, decoder, optimizer_state), result

    return step


def make_evaluation_step(objective: Objective, scorer: Scorer) -> Callable[[Decoder, DeviceBatch], Metrics]:
    """The metrics of a batch, without gradients."""

    def step(decoder: Decoder, batch: DeviceBatch) -> Metrics:
        def one(i: jax.Array) -> Metrics:
            return microbatch_loss(decoder, microbatch(batch, i), objective, scorer)[1]

        zero = zeros_like_output(one, jnp.int32(0))
        return lax.fori_loop(0, batch.num_microbatches, lambda i, total: add(total, one(i)), zero)

    return step
