"""DPO steps of models of 0.5B, 1.5B and 8B on an accelerator: share of its peak, tokens/s, memory. Random weights.

    python tests/benchmarks/accelerator.py --json OUT.json [--shapes 0.5b,1.5b,8b] [--steps 8]

Needs a GPU or a TPU, and says so where there is none; the shape `tiny` runs anywhere. Pairs are of HH-RLHF's lengths,
or of 2,048 tokens each (`--pair-tokens 2048`). The ceiling is the fastest matrix product measured in the same run.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import compiler
from jaxpo.batch import Example
from jaxpo.config import Dtype, MeshConfig, OptimizerConfig
from jaxpo.data.pack import Packing, pack
from jaxpo.models import attention
from jaxpo.models.decoder import Decoder, DecoderConfig, Llama3Scaling, Remat, Rotary, abstract_decoder
from jaxpo.objectives import DPO
from jaxpo.objectives.score import Scorer, head_blocks
from jaxpo.training.control import Control
from jaxpo.training.flops import step_flops
from jaxpo.training.mesh import Layout, make_mesh
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState, initial_carry, make_train_step

QWEN = DecoderConfig(
    vocab_size=151_936,
    width=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=4864,
    mlp="gated",
    activation="silu",
    norm="rms",
    norm_eps=1e-6,
    positions=Rotary(1e6),
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    head="tied",
)
LLAMA = replace(
    QWEN,
    vocab_size=128_256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14_336,
    norm_eps=1e-5,
    positions=Rotary(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    qkv_bias=False,
    head="own",
)


@dataclass(frozen=True)
class Shape:
    """A model, what its weights and moments are kept in, what a backward pass recomputes, and rows at once."""

    model: DecoderConfig
    dtype: Dtype
    remat: Remat
    row_length: int
    rows: int


SHAPES = {
    "tiny": Shape(
        replace(QWEN, vocab_size=512, width=64, num_layers=2, num_heads=4, head_dim=16, mlp_width=128),
        "float32",
        "none",
        1024,
        1,
    ),
    "0.5b": Shape(QWEN, "float32", "attention", 4096, 4),
    "1.5b": Shape(
        replace(QWEN, width=1536, num_layers=28, num_heads=12, head_dim=128, mlp_width=8960),
        "float32",
        "attention",
        4096,
        2,
    ),
    # 8 bytes for each weight, as long as a batch is one microbatch: itself, its gradient and its moments in bfloat16.
    "8b": Shape(LLAMA, "bfloat16", "full", 4096, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shapes", default="0.5b,1.5b,8b")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pair-tokens", type=int, help="tokens of each pair; of HH-RLHF's lengths unless told")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", help="in place of each shape's own")
    parser.add_argument("--rows", type=int, help="rows at once, in place of each shape's own")
    arguments = parser.parse_args()
    shapes = arguments.shapes.split(",")
    if jax.default_backend() == "cpu" and shapes != ["tiny"]:
        sys.exit("there is neither a GPU nor a TPU here; --shapes tiny runs on a CPU")
    compute_dtype = "float32" if shapes == ["tiny"] else "bfloat16"
    compiler.set_up(compute_dtype)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "ceiling_flops": ceiling(compute_dtype) * jax.device_count(),
    }
    for name in shapes:
        changes = {key: value for key in ("remat", "rows") if (value := getattr(arguments, key)) is not None}
        try:
            found = measured(replace(SHAPES[name], **changes), compute_dtype, arguments)
        except jax.errors.JaxRuntimeError as error:
            found = {"error": str(error).splitlines()[0]}
        if "useful_flops" in found:
            found["mfu"] = found["useful_flops"] / report["ceiling_flops"]
        report[name] = found
        print(name, json.dumps(found), file=sys.stderr)
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def ceiling(dtype: str) -> float:
    """FLOP/s of the fastest matrix product on one device."""
    size, best = 1024 if jax.default_backend() == "cpu" else 8192, 0.0
    a = jnp.ones((size, size), dtype)
    # A CPU multiplies bfloat16 at its full speed only if asked for a float32 result.
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    for _ in range(12):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def examples_of(tokens: int, pair_tokens: int | None, vocabulary: int) -> list[Example]:
    """Pairs that fill about so many places, with the prompt stored once."""
    random = np.random.default_rng(0)

    def drawn(mean: float, deviation: float, most: int) -> int:
        return int(min(random.lognormal(mean, deviation), most)) + 4

    def ids(length: int) -> np.ndarray:
        return random.integers(5, vocabulary, length).astype(np.int32)

    found: list[Example] = []
    room = tokens
    while True:
        if pair_tokens is None:
            lengths = (drawn(4.75, 0.85, 600), drawn(3.7, 0.8, 250), drawn(3.7, 0.8, 250))
        else:
            lengths = (pair_tokens // 2, pair_tokens // 4, pair_tokens // 4)
        room -= sum(lengths)
        if room < 0:
            return found
        prompt, *completions = map(ids, lengths)
        found.append(Example(str(len(found)), prompt, tuple(completions)))


def measured(shape: Shape, compute_dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    config, layout = shape.model, Layout(make_mesh(MeshConfig()))
    fastest = attention.choose(layout.platform, compute_dtype, config.head_dim)
    scorer = Scorer(
        compute_dtype=compute_dtype,
        remat=shape.remat,
        blocks=head_blocks(shape.row_length, shape.rows, layout.platform, layout.mesh.size),
        attention=fastest if arguments.attention == "auto" else arguments.attention,
        devices=layout,
    )
    devices = layout.batch_devices
    packing = Packing(shape.row_length, shape.rows * devices, devices=devices)
    # A few places stay empty: pairs are not cut to fill a row.
    room = int(0.97 * shape.row_length * packing.rows)
    examples = examples_of(room, arguments.pair_tokens, config.vocab_size)
    batch, _ = pack(examples, np.full((len(examples), 1, 2), -50.0, np.float32), packing)
    flops = step_flops(config, batch)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), config, 1000, 1.0, shape.dtype)
    at = layout.decoder(config, abstract_decoder(config, shape.dtype))
    decoder = jax.jit(lambda: Decoder(config, jax.random.key(0), shape.dtype), out_shardings=at)()
    moments = layout.place(config, jax.eval_shape(optimizer.init, decoder))
    state = TrainState(
        jax.device_put(np.int32(0), layout.replicated),
        decoder,
        jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, moments))(decoder),
        {name: jax.device_put(np.float32(v), layout.replicated) for name, v in initial_carry(DPO(), Control()).items()},
    )
    del decoder
    step = jax.jit(make_train_step(DPO(), scorer, optimizer, Control()), donate_argnums=0)
    on_device = layout.put(batch)
    start = time.perf_counter()
    state, result = step(state, on_device)
    jax.block_until_ready(result)
    compiling = time.perf_counter() - start
    times = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        state, result = step(state, on_device)
        jax.block_until_ready(result)
        times.append(time.perf_counter() - start)
    seconds, tokens = median(times), int(np.count_nonzero(batch.segments))
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "attention": scorer.attention,
        "remat": shape.remat,
        "weights": shape.dtype,
        "pairs": len(examples),
        "tokens": tokens,
        "fill": tokens / batch.segments.size,
        "microbatches": int(batch.num_microbatches),
        "finite": bool(result.finite),
        "compile_s": compiling,
        "step_s": seconds,
        "pairs_per_s": len(examples) / seconds,
        "tokens_per_s": tokens / seconds,
        "useful_flops": flops / seconds,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


if __name__ == "__main__":
    main()
