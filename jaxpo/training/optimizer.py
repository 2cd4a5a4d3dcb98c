"""The optimizer, from its settings to an optax transformation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpo.config import Dtype, OptimizerConfig
from jaxpo.models.decoder import Decoder, DecoderConfig, abstract_decoder, map_params
from jaxpo.training.low_precision import low_precision
from jaxpo.training.offload import offloaded


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step -> learning rate: a linear warmup from 0 (its first step is not 0), then the schedule to the last step.

    As in transformers, the warmup of `warmup_ratio` is rounded up to whole steps.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * num_steps)
    peak, floor = config.learning_rate, config.learning_rate * config.min_learning_rate_ratio
    rest = max(1, num_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, floor, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.min_learning_rate_ratio),
    }[config.schedule]()
    if not warmup:
        return after
    # The first update is step 0: (step + 1) / (warmup + 1) makes it a real one, and reaches the peak right after.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def decays(config: DecoderConfig) -> Decoder:
    """Shaped like the decoder: whether weight decay applies, which is to matrices, not to biases and norms."""
    return map_params(lambda path, _: not path.endswith((".bias", ".scale")), abstract_decoder(config, "float32"))


def make_optimizer(
    config: OptimizerConfig,
    model: DecoderConfig,
    num_steps: int,
    max_grad_norm: float | None,
    dtype: Dtype = "float32",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) after clipping by the global norm; dtype: of the weights."""
    b1, b2 = config.betas
    optimizer = optax.adamw(
        learning_rate(config, num_steps),
        b1=b1,
        b2=b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays(model),
    )
    if max_grad_norm is not None:
        optimizer = optax.chain(clip(max_grad_norm), optimizer)
    state_dtype = config.state_dtype or dtype
    if "bfloat16" in (dtype, state_dtype):
        optimizer = low_precision(optimizer, state_dtype, config.rounding)
    return offloaded(optimizer) if config.offload else optimizer


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, float32 [].

    By products: XLA's sum over an array of many axes is exact to 1e-4 only on a CPU.
    """

    def squares(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.float32)
        return jnp.tensordot(leaf, leaf, leaf.ndim, precision=jax.lax.Precision.HIGHEST)

    return jnp.sqrt(jnp.stack([squares(leaf) for leaf in jax.tree.leaves(tree)]).sum())


def clip(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, by the norm of `norm`."""

    def clipped(updates: Any, params: Any) -> Any:
        del params
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm(updates), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)

    return optax.stateless(clipped)
