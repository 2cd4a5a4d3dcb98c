"""Planned bytes against real arrays, against XLA's own count, and against what a process really took."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from host_peak import step_of

from jaxpo.config import DataConfig, DataSource, Dtype, MeshConfig, ModelConfig, OptimizerConfig, Run, TrainingConfig
from jaxpo.models.decoder import Decoder
from jaxpo.planning.memory import LAYER, memory
from jaxpo.planning.search import MARGIN
from jaxpo.planning.work import Step, batches_of
from jaxpo.training.mesh import AXES, Layout, make_mesh
from jaxpo.training.offload import in_host_memory
from jaxpo.training.optimizer import make_optimizer

PEAK = Path(__file__).with_name("host_peak.py")


def step(decoder: Decoder, mesh: MeshConfig, dtype: Any, optimizer: OptimizerConfig) -> Step:
    run = Run(
        model=ModelConfig(path="none", dtype=dtype),
        data=DataConfig(train=(DataSource(path="none.jsonl"),)),
        training=TrainingConfig(batch_size=8, row_length=64),
        optimizer=optimizer,
        mesh=mesh,
    )
    batches = batches_of(np.array([20]), np.array([[20, 20]]), run, None, "a test")
    return Step(run, decoder.config, batches, "cpu", "dense")


MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (1, 4, 1, 2), (2, 1, 1, 4)]
STATES: dict[str, tuple[Dtype, OptimizerConfig]] = {
    "float32": ("float32", OptimizerConfig()),
    "bfloat16 moments": ("float32", OptimizerConfig(state_dtype="bfloat16")),
    "all bfloat16": ("bfloat16", OptimizerConfig()),
    "float32 moments of bfloat16 weights": ("bfloat16", OptimizerConfig(state_dtype="float32")),
    "moments on the host": ("float32", OptimizerConfig(offload=True)),
}


@pytest.mark.parametrize("sizes", MESHES)
def test_weights_and_moments_are_the_bytes_of_the_real_arrays(sizes: tuple[int, ...], small_decoder: Decoder) -> None:
    mesh = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    layout = Layout(make_mesh(mesh))
    for name, (dtype, config) in STATES.items():
        weights = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), small_decoder)
        weights = jax.device_put(weights, layout.decoder(small_decoder.config, small_decoder))
        optimizer = make_optimizer(config, small_decoder.config, 10, 1.0, dtype)
        abstract = layout.place(small_decoder.config, jax.eval_shape(optimizer.init, weights))
        abstract = in_host_memory(abstract) if config.offload else abstract
        at = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        moments = jax.jit(optimizer.init, out_shardings=at)(weights)
        found = Counter()
        for leaf in jax.tree.leaves((weights, moments)):
            kind = leaf.sharding.memory_kind
            found[kind] += sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.device.id == 3)
        planned = memory(step(small_decoder, mesh, dtype, config))
        on_device = planned.phases[LAYER]
        assert on_device["weights"] + on_device["moments"] == pytest.approx(found["device"], rel=0.01), name
        assert planned.host == pytest.approx(found["pinned_host"], rel=0.01), name


@pytest.mark.parametrize(
    "settings",
    [
        "float32 full 2 1",
        "float32 none 2 1",
        "bfloat16 dots 2 2",
        "bfloat16 full 4 1 model.dtype=bfloat16",
    ],
)
def test_a_process_takes_as_much_as_planned(settings: str) -> None:
    """Of a real step on this machine: by the system's count of the process, within the plan's margin."""
    done = subprocess.run([sys.executable, str(PEAK), *settings.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=MARGIN), found


def test_settings_that_save_memory_do() -> None:
    """The order of the policies, from what keeps most to what keeps least; and fewer rows take less."""
    peaks = [memory(step_of("bfloat16", remat, 4, 1)).peak for remat in ("none", "dots", "attention", "full")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    fewer, more = (memory(step_of("bfloat16", "none", rows, 1)).peak for rows in (2, 4))
    assert fewer < more


@pytest.mark.parametrize(("dtype", "times"), [("float32", 1.0), ("bfloat16", 1.5)])
def test_gradients_of_float32_weights_are_there_once(dtype: Dtype, times: float) -> None:
    """Added up over microbatches or not; those of bfloat16 are summed up beside a microbatch's."""
    accumulated, at_once = (
        memory(step_of("bfloat16", "full", *rows, f"model.dtype={dtype}")).phases[LAYER]["gradients"]
        for rows in ((1, 4), (4, 1))
    )
    assert accumulated == times * at_once
