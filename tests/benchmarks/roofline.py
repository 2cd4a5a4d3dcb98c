"""Where a step's pieces stand under the roofline of this machine: a picture, and the figures behind it as JSON.

    python tests/benchmarks/roofline.py --png OUT.png [--json OUT.json] [--dtype float32] [--tokens 2304]

The roof is what the machine can do, measured in the same run: the fastest matrix product, and the fastest way through
memory. Each piece of a DPO step of SmolLM2-135M, forward and backward, stands at the arithmetic that it takes for each
byte that it must read or write at least, and at the useful arithmetic that it does in a second.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import examples_of

from jaxpo import allocator, compiler
from jaxpo.data.pack import Packing, pack
from jaxpo.models.attention import Context, choose, packed_attention
from jaxpo.models.product import linears
from jaxpo.objectives.logprobs import token_scores
from jaxpo.objectives.score import head_blocks

WIDTH, HEADS, KV_HEADS, HEAD, MLP, LAYERS, VOCABULARY = 576, 9, 3, 64, 1536, 30, 49_152


class Piece(NamedTuple):
    """A part of a step: what is timed, how often a step does it, its arithmetic and the bytes it has to move, once."""

    call: Callable[[], Any]
    times: int
    flops: float
    bytes: float


def seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The shortest time of a call, compiled before."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return min(found)


def gradients(function: Callable[..., jax.Array], *arguments: Any) -> Callable[[], Any]:
    """A function and its gradients, compiled, for a gradient of its value that no compiler can foresee."""

    @jax.jit
    def both(slope: jax.Array, *arguments: Any) -> Any:
        value, pull = jax.vjp(function, *arguments)
        return value, pull(slope)

    shape = jax.eval_shape(function, *arguments)
    slope = normal(9, *shape.shape, dtype=shape.dtype)
    return lambda: both(slope, *arguments)


def normal(seed: int, *shape: int, dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(seed), shape, dtype)


def products(N: int, dtype: Any, inputs: int, *outputs: int) -> Piece:
    x, kernels = (
        normal(0, N, inputs, dtype=dtype),
        [normal(n, inputs, output, dtype=jnp.float32) for n, output in enumerate(outputs)],
    )
    size = jnp.dtype(dtype).itemsize
    activations, weights = N * (inputs + sum(outputs)), inputs * sum(outputs)
    call = gradients(lambda x, k: jnp.concatenate(linears(x, k, 1), -1), x, kernels)
    # Forward reads x and the weights and writes y; backward reads x, the weights and y's gradient and writes two.
    return Piece(call, LAYERS, 6.0 * N * weights, size * (2 * activations + N * inputs) + 4 * 3 * weights)


def rows(tokens: int) -> Any:
    """One row of pairs of HH-RLHF's lengths."""
    return pack(examples_of(tokens, None, VOCABULARY), None, Packing(tokens, 1))[0]


def attention(batch: Any, dtype: Any) -> Piece:
    N = batch.tokens.shape[-1]
    context = Context(*(jnp.asarray(field[0]) for field in (batch.segments, batch.branches, batch.positions)))
    q, k, v = (normal(n, 1, N, heads, HEAD, dtype=dtype) for n, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    how = choose(jax.default_backend(), str(jnp.dtype(dtype)), HEAD)
    seen = np.where(batch.segments > 0, batch.positions.astype(np.int64) + 1, 0).sum()
    moved = N * HEAD * (4 * HEADS + 6 * KV_HEADS)
    call = gradients(lambda q, k, v: packed_attention(q, k, v, context, None, implementation=how), q, k, v)
    return Piece(call, LAYERS, 12.0 * seen * HEADS * HEAD, jnp.dtype(dtype).itemsize * moved)


def head(batch: Any, dtype: Any) -> Piece:
    used, N = int(batch.lengths.sum()), batch.tokens.shape[-1]
    blocks = head_blocks(N, 1, jax.default_backend(), 1)
    S = -(-N // blocks.tokens[-1]) * blocks.tokens[-1]
    hidden, matrix = normal(0, 1, S, WIDTH, dtype=dtype), normal(1, VOCABULARY, WIDTH, dtype=jnp.float32)
    labels = jnp.ones((1, S), jnp.int32)

    def logps(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return token_scores(hidden, matrix, labels, jnp.int32(used), blocks).logps

    moved = 4 * 3 * VOCABULARY * WIDTH + jnp.dtype(dtype).itemsize * 3 * used * WIDTH
    return Piece(gradients(logps, hidden, matrix), 1, 6.0 * used * WIDTH * VOCABULARY, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=2304, help="tokens of a row")
    arguments = parser.parse_args()
    allocator.start_again_with_huge_pages()
    compiler.set_up(arguments.dtype)
    N, dtype = arguments.tokens, jnp.dtype(arguments.dtype)
    batch = rows(N)
    square, line = jnp.ones((2048, 2048), dtype), jnp.ones(1 << 26, jnp.float32)
    # A CPU multiplies bfloat16 at its full speed only if asked for a float32 result.
    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    add = jax.jit(lambda a: a + 1)
    peak = 2 * 2048**3 / seconds(lambda: multiply(square))
    bandwidth = 8 * line.size / seconds(lambda: add(line))
    pieces = {
        "q, k, v": products(N, dtype, WIDTH, WIDTH, KV_HEADS * HEAD, KV_HEADS * HEAD),
        "attention": attention(batch, dtype),
        "out": products(N, dtype, WIDTH, WIDTH),
        "gate, up": products(N, dtype, WIDTH, MLP, MLP),
        "down": products(N, dtype, MLP, WIDTH),
        "head": head(batch, dtype),
    }
    report: dict[str, Any] = {"peak_flops": peak, "bytes_per_s": bandwidth, "dtype": arguments.dtype, "tokens": N}
    for name, piece in pieces.items():
        took = seconds(piece.call)
        report[name] = {
            "seconds_per_step": took * piece.times,
            "flops_per_s": piece.flops / took,
            "flops_per_byte": piece.flops / piece.bytes,
            "of_the_roof": piece.flops / took / min(peak, bandwidth * piece.flops / piece.bytes),
        }
        print(name, {key: round(float(value), 3) for key, value in report[name].items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    draw(report, list(pieces), arguments.png)


def draw(report: dict[str, Any], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peak, bandwidth = report["peak_flops"] / 1e9, report["bytes_per_s"] / 1e9
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    x = np.geomspace(1, 3000, 200)
    axes.loglog(x, np.minimum(peak, bandwidth * x), color="0.3")
    axes.annotate(
        f"{peak:.0f} GFLOP/s", (3000, peak), ha="right", va="bottom", xytext=(0, 3), textcoords="offset points"
    )
    axes.annotate(
        f"{bandwidth:.0f} GB/s", (2, 2 * bandwidth), ha="left", va="top", xytext=(6, 0), textcoords="offset points"
    )
    longest = max(report[name]["seconds_per_step"] for name in names)
    for name in names:
        one = report[name]
        at = (one["flops_per_byte"], one["flops_per_s"] / 1e9)
        label = f"{name}: {100 * one['of_the_roof']:.0f} % of the roof, {one['seconds_per_step']:.2f} s"
        size = 30 + 300 * one["seconds_per_step"] / longest
        axes.scatter(*at, s=size, alpha=0.6, edgecolors="none", label=label)
    axes.set_xlabel("useful arithmetic for each byte that must be moved (FLOP / byte)")
    axes.set_ylabel("useful GFLOP/s")
    axes.set_ylim(peak / 60, 1.7 * peak)
    axes.set_title(
        f"SmolLM2-135M, DPO, a row of {report['tokens']} tokens, {report['dtype']}: share of the roof, seconds a step",
        fontsize=9,
    )
    for handle in axes.legend(frameon=False, fontsize=8, loc="lower right").legend_handles:
        handle.set_sizes([40])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
