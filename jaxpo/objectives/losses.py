"""Preference losses as pure functions of small float32 arrays; nothing of a model, a mesh or a config enters.

Legend: [E] examples. Log-ratios are log pi(y|x) - log pi_ref(y|x), summed over the tokens of completion y, in nats.
"""

import jax
import jax.numpy as jnp


def dpo(
    chosen_logratio: jax.Array, rejected_logratio: jax.Array, beta: float, label_smoothing: float = 0.0
) -> jax.Array:
    """Loss [E] of direct preference optimisation from log-ratios [E].

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigmoid(beta * margin). With label_smoothing e it is the
    conservative DPO of Mitchell 2023, -(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin): the labels
    are taken to be flipped with probability e.
    """
    scaled = beta * (chosen_logratio - rejected_logratio)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(scaled) - label_smoothing * jax.nn.log_sigmoid(-scaled)


def ipo(chosen_logratio: jax.Array, rejected_logratio: jax.Array, beta: float) -> jax.Array:
    """Loss [E] of identity preference optimisation from log-ratios [E], sums or means over a completion's tokens.

    Azar et al. 2023 (arXiv 2310.12036), eq. 17 with tau = beta: (margin - 1 / (2 beta))^2.
    """
    return jnp.square(chosen_logratio - rejected_logratio - 1.0 / (2.0 * beta))
