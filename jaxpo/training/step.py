"""The train step and the evaluation step: pure functions of state and batch, one compiled program each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxpo.batch import Carry, DeviceBatch, Metrics, Objective
from jaxpo.models.decoder import Decoder
from jaxpo.objectives.score import Scorer, Scores, all_scores, completions_of, microbatch
from jaxpo.training.control import Control
from jaxpo.training.optimizer import norm

Gradients = Callable[[Decoder, DeviceBatch, Carry], tuple[tuple[jax.Array, Metrics], Any]]


class TrainState(NamedTuple):
    """All that a step changes: the number of updates done, the weights, the optimizer's state, and what is carried on.

    carry: scalars of the objective and of the run's self-control, float32.
    """

    step: jax.Array
    decoder: Decoder
    optimizer: optax.OptState
    carry: Carry


class StepResult(NamedTuple):
    """Metrics as sums and weights, the norms of the gradient before clipping and of the update, whether they and the
    loss are finite, and what is carried on, which the next step takes from the state.
    """

    metrics: Metrics
    grad_norm: jax.Array
    update_norm: jax.Array
    finite: jax.Array
    carry: Carry


def initial_carry(objective: Objective, control: Control) -> dict[str, float]:
    """What the first step gets: of the run's self-control, and of the objective."""
    return {**control.initial_carry(), **objective.initial_carry()}


def zeros_like_output(function: Callable, *args: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *args))


def as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def zero_gradients(decoder: Any) -> Any:
    # Sums of many small terms: in bfloat16 they would depend on the number of microbatches.
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), decoder)


def added_up(
    scorer: Scorer,
    decoder: Decoder,
    number: jax.Array,
    of_one: Callable[[jax.Array], tuple[Any, Any, Any]],
    zero: Any,
) -> tuple[Any, Any]:
    """Over so many microbatches, the sums of what each gives, from `zero` on, and of its gradient, in float32.

    of_one: the microbatch's index -> (what it gives, a `jax.vjp` of something with the decoder, how the loss changes
    with that something).

    A layer's gradient is added to the sum when the backward pass has come to it, so that those of all layers never
    stand beside the sums. A `jax.vjp` can do that in the weights' own precision, and not across a `jax.shard_map`: of
    bfloat16 weights, and on several devices, a microbatch's gradients are whole before they are added.
    """
    sums = jax.tree.map(jax.new_ref, zero_gradients(decoder))
    in_place = scorer.devices.number == 1 and all(p.dtype == jnp.float32 for p in jax.tree.leaves(decoder))

    def accumulate(i: jax.Array, so_far: Any) -> Any:
        given, of_microbatch, slopes = of_one(i)
        if in_place:
            of_microbatch.with_refs(sums)(slopes)
        else:
            (grads,) = of_microbatch(slopes)
            for total, grad in zip(jax.tree.leaves(sums), jax.tree.leaves(grads), strict=True):
                total[...] += grad.astype(jnp.float32)
        return jax.tree.map(jnp.add, so_far, given)

    return lax.fori_loop(0, number, accumulate, zero), jax.tree.map(jax.freeze, sums)


def pull_back(scorer: Scorer, decoder: Decoder, batch: DeviceBatch, slopes: Scores) -> Any:
    """The gradient of what changes by `slopes` with the scores of a whole batch, fields [M, R, X, ...]."""

    def of_one(i: jax.Array) -> tuple[None, Any, Scores]:
        _, of_microbatch = jax.vjp(lambda d: scorer(d, microbatch(batch, i)), decoder)
        return None, of_microbatch, jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, i, keepdims=False), slopes)

    return added_up(scorer, decoder, batch.num_microbatches, of_one, None)[1]


def sum_of_shares(objective: Objective, scorer: Scorer) -> Gradients:
    """Loss, metrics and gradient of a batch whose examples do not know of each other.

    Shares of the loss add up to the batch's loss, so the sum of the microbatches' gradients is the batch's, exactly.
    """

    def share(decoder: Decoder, batch: DeviceBatch, carry: Carry) -> tuple[jax.Array, Metrics]:
        loss, metrics = objective(completions_of(scorer(decoder, batch), batch, carry))
        return loss, as_float32(metrics)

    def gradients(decoder: Decoder, batch: DeviceBatch, carry: Carry) -> tuple[tuple[jax.Array, Metrics], Any]:
        def of_one(i: jax.Array) -> tuple[tuple[jax.Array, Metrics], Any, jax.Array]:
            loss, of_share, metrics = jax.vjp(lambda d: share(d, microbatch(batch, i), carry), decoder, has_aux=True)
            return (loss, metrics), of_share, jnp.ones_like(loss)

        if batch.lengths.shape[0] == 1:
            # Nothing to add up: no sums to fill and to read again.
            value, of_share, slope = of_one(jnp.int32(0))
            return value, of_share(slope)[0]
        zero = zeros_like_output(share, decoder, microbatch(batch, jnp.int32(0)), carry)
        return added_up(scorer, decoder, batch.num_microbatches, of_one, zero)

    return gradients


def whole_batch(objective: Objective, scorer: Scorer) -> Gradients:
    """Loss, metrics and gradient of a batch whose examples are coupled, by a mean or an order over all of them.

    First the scores of every microbatch, without gradients. The loss of them all, together, says how it changes with
    each score; that is carried back through each microbatch in a second pass. As exact as one pass over all at once,
    in the memory of one microbatch, for one forward pass more (Gao et al. 2021, arXiv 2101.06983, sec. 3.3).
    """

    def gradients(decoder: Decoder, batch: DeviceBatch, carry: Carry) -> tuple[tuple[jax.Array, Metrics], Any]:
        def of_scores(scores: Scores) -> tuple[jax.Array, Metrics]:
            loss, metrics = objective(completions_of(scores, batch, carry))
            return loss, as_float32(metrics)

        if batch.lengths.shape[0] == 1:
            # One microbatch is the whole batch: its scores need not be computed twice.
            one = microbatch(batch, jnp.int32(0))
            scores, of_microbatch = jax.vjp(lambda d: scorer(d, one), decoder)
            scores = jax.tree.map(lambda s: s[None], scores)
            value, slopes = jax.value_and_grad(of_scores, has_aux=True)(scores)
            (grads,) = of_microbatch(jax.tree.map(lambda s: s[0], slopes))
            return value, grads
        scores = all_scores(scorer, decoder, batch)
        value, slopes = jax.value_and_grad(of_scores, has_aux=True)(scores)
        return value, pull_back(scorer, decoder, batch, slopes)

    return gradients


def make_train_step(
    objective: Objective, scorer: Scorer, optimizer: optax.GradientTransformation, control: Control
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, StepResult]]:
    """The step: the gradient of a batch, then one update.

    The number of microbatches is a run-time value, so one program serves every batch of the same shapes.
    """
    gradients = (whole_batch if objective.couples_examples else sum_of_shares)(objective, scorer)

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepResult]:
        (loss, metrics), grads = gradients(state.decoder, batch, state.carry)
        grad_norm = norm(grads)
        params: Any = state.decoder
        updates, optimizer_state = optimizer.update(grads, state.optimizer, params)
        decoder: Any = optax.apply_updates(params, updates)
        carry = as_float32({**control.next_carry(state.carry, metrics), **objective.next_carry(state.carry, metrics)})
        update_norm = norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        result = StepResult(metrics, grad_norm, update_norm, finite, carry)
        return TrainState(state.step + 1, decoder, optimizer_state, carry), result

    return step


def make_evaluation_step(objective: Objective, scorer: Scorer) -> Callable[[Decoder, DeviceBatch, Carry], Metrics]:
    """The metrics of a batch, without gradients, with every beta as it is configured."""

    def step(decoder: Decoder, batch: DeviceBatch, carry: Carry) -> Metrics:
        scores = all_scores(scorer, decoder, batch)
        # An evaluation is to tell how the policy has changed, not how beta has.
        carry = {**carry, "beta_scale": jnp.float32(1.0)}
        return as_float32(objective(completions_of(scores, batch, carry))[1])

    return step
