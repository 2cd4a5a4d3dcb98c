"""Train one step of a model of 40 million random weights, and print as JSON how much memory it took at most.

python host_peak.py COMPUTE_DTYPE REMAT ROWS MICROBATCHES [KEY=VALUE ...]

Of the process: its peak, less what it holds before the first array is made. Beside it what the plan says.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import compiler, config_file
from jaxpo.batch import Example
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder, DecoderConfig, Rotary
from jaxpo.planning.compiled import program
from jaxpo.planning.memory import memory
from jaxpo.planning.work import Step, batches_of
from jaxpo.training.control import Control
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState, initial_carry

MODEL = DecoderConfig(
    vocab_size=16_384,
    width=512,
    num_layers=10,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=1536,
    mlp="gated",
    activation="silu",
    norm="rms",
    norm_eps=1e-5,
    positions=Rotary(10_000.0),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    head="tied",
)
ROW = 1024
LENGTHS = (128, 64, 64)


def step_of(compute_dtype: str, remat: str, rows: int, microbatches: int, *overrides: str) -> Step:
    config = Path(__file__).with_name("host_peak.yaml")
    size = rows * microbatches * (ROW // sum(LENGTHS))
    settings = [f"model.compute_dtype={compute_dtype}", f"model.remat={remat}", f"training.rows_per_device={rows}"]
    run = config_file.load(config, [*settings, f"training.batch_size={size}", *overrides])
    prompt, *completions = LENGTHS
    batches = batches_of(np.array([prompt]), np.array([completions]), run, None, "a test")
    return Step(run, MODEL, batches, "cpu", "blocked")


def main() -> None:
    compute_dtype, remat, rows, microbatches, *overrides = sys.argv[1:]
    compiler.set_up(compute_dtype)
    step = step_of(compute_dtype, remat, int(rows), int(microbatches), *overrides)
    run, of = step.run, program(step, jax.devices()[:1])
    compiled = of.train.lower(of.state, of.batch).compile()
    analysis: Any = compiled.memory_analysis()
    optimizer = make_optimizer(run.optimizer, MODEL, 1000, run.training.max_grad_norm, run.model.dtype)
    prompt, *completions = (np.ones(length, np.int32) for length in LENGTHS)
    examples = [Example(str(n), prompt, tuple(completions)) for n in range(run.training.batch_size)]
    packing = Packing(ROW, run.training.rows_per_device)
    packed, _ = pack(examples, np.zeros((len(examples), 1, 2), np.float32), packing)

    start_counting()
    before = of_status("VmRSS")
    decoder = jax.jit(lambda: Decoder(MODEL, jax.random.key(0), run.model.dtype))()
    moments = jax.jit(optimizer.init)(decoder)
    carry = {name: jnp.float32(value) for name, value in initial_carry(run.objective, Control()).items()}
    state = TrainState(jnp.int32(0), decoder, moments, carry)
    del decoder, moments
    # What drawing the weights took is no part of a step.
    start_counting()
    state, result = compiled(state, of.layout.put(packed))
    assert bool(jax.block_until_ready(result).finite)
    planned = memory(step)
    arguments = analysis.argument_size_in_bytes
    report = {
        "measured": of_status("VmHWM") - before,
        "planned": planned.peak,
        "xla": arguments + analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "arguments": arguments,
        "phase": planned.phase,
    }
    print(json.dumps(report))


def start_counting() -> None:
    """Give free memory back to the system, and have the system's count of the most that was held begin anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def of_status(name: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
