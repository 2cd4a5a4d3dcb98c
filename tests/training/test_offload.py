"""The optimizer's state in the hosts' memory: the same training, and it does lie there."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxpo.config import MeshConfig, OptimizerConfig, TrainingConfig
from jaxpo.models.decoder import Decoder
from jaxpo.training.checkpoint import Checkpoints
from jaxpo.training.mesh import Layout, make_mesh
from jaxpo.training.offload import in_host_memory
from jaxpo.training.optimizer import make_optimizer

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def memories(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def trained(decoder: Decoder, **settings: Any) -> tuple[Any, Any, Any]:
    """Weights and state after three updates on a mesh, and the shapes and shardings of the state."""
    config = OptimizerConfig(learning_rate=1e-2, **settings)
    layout = Layout(make_mesh(MESH))
    optimizer = make_optimizer(config, decoder.config, 10, 1.0)
    weights: Any = jax.device_put(decoder, layout.decoder(decoder.config, decoder))
    abstract = layout.place(decoder.config, jax.eval_shape(optimizer.init, weights))
    if config.offload:
        abstract = in_host_memory(abstract)
    at = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(optimizer.init, out_shardings=at)(weights)

    def step(weights: Any, state: Any, n: jax.Array) -> Any:
        gradients = jax.tree.map(lambda w: w * (n - 0.9), weights)
        updates, state = optimizer.update(gradients, state, weights)
        return jax.tree.map(lambda w, u: w + u, weights, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    for n in range(3):
        weights, state = compiled(weights, state, np.float32(n))
    return weights, state, abstract


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_training_is_the_same_and_the_moments_are_on_the_host(state_dtype: str, small_decoder: Decoder) -> None:
    weights, state, abstract = trained(small_decoder, state_dtype=state_dtype)
    moved_weights, moved_state, moved_abstract = trained(small_decoder, state_dtype=state_dtype, offload=True)
    assert memories(weights) == memories(moved_weights) == memories(state) == memories(abstract) == {"device"}
    assert memories(moved_state) == memories(moved_abstract) == {"pinned_host"}
    for found, wanted in zip(*map(jax.tree.leaves, ((moved_weights, moved_state), (weights, state))), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    for leaf, shape in zip(*map(jax.tree.leaves, (moved_state, moved_abstract)), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


def test_a_checkpoint_goes_back_to_the_memory_that_is_asked_for(small_decoder: Decoder, tmp_path: Any) -> None:
    """Saved by a run with its moments on the host, restored by one without, and the other way round."""
    _, state, abstract = trained(small_decoder)
    _, moved, moved_abstract = trained(small_decoder, offload=True)
    for name, saved, wanted in (("a", moved, abstract), ("b", state, moved_abstract)):
        with Checkpoints(tmp_path / name, TrainingConfig()) as checkpoints:
            checkpoints.save(1, saved, {}, {})
            checkpoints.wait()
            restored, _ = checkpoints.restore(1, wanted)
        assert memories(restored) == memories(wanted)
        for found, leaf in zip(*map(jax.tree.leaves, (restored, saved)), strict=True):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(leaf))
