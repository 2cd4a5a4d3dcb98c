"""What a train step has to do: its batch, its model, and how a mesh divides both."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jaxpo.config import Run
from jaxpo.data.pack import bucket, check_fits
from jaxpo.models.attention import Implementation
from jaxpo.models.decoder import LOGICAL_AXES, DecoderConfig, abstract_decoder, by_path
from jaxpo.objectives.score import head_blocks
from jaxpo.prepare import packing_of
from jaxpo.training.flops import Counts
from jaxpo.training.mesh import AXES, BATCH_AXES, RULES, SEQUENCE, Layout

# What an axis of the mesh divides besides weights, of which `mesh.RULES` tell: rows of a microbatch, the tokens of a
# row, or each product.
ROWS = BATCH_AXES
TOKENS = (SEQUENCE,)
PRODUCTS = tuple(axis for axis in AXES if axis not in (*ROWS, *TOKENS))
# What divides weights, and so is gathered; the first of these divides nothing else of them.
STATES = RULES["embed"]
FSDP = STATES[0]
# Batches of which the lengths are looked at.
BATCHES = 32


@dataclass(frozen=True)
class Batches:
    """What the batches of a run hold.

    counts: of a batch, on average. rows: that each of some batches fills. fill: the share of those rows' places that
    hold a token. origin: where the lengths come from, for people.
    """

    counts: Counts
    rows: tuple[int, ...]
    fill: float
    origin: str


def batches_of(prompts: np.ndarray, completions: np.ndarray, run: Run, window: int | None, origin: str) -> Batches:
    """Batches of examples of prompt [N] and completions [N, K] tokens; of few examples, each several times.

    Raises UserError where an example is longer than a row.
    """
    training = run.training
    packing = packing_of(run, 1)
    check_fits(packing, prompts, completions, lambda i: f"{i + 1} of {origin}")
    size, N = training.batch_size, len(prompts)
    order = np.random.default_rng(training.seed).permutation(N) if run.data.shuffle else np.arange(N)
    chosen = np.resize(order, size * min(BATCHES, max(1, -(-N // size))))
    prompts, completions = prompts[chosen], completions[chosen]
    sizes = packing.size(prompts, completions)
    rows = [len(packing.rows_of(part.tolist())[1]) for part in np.split(sizes, len(chosen) // size)]
    seen = packing.seen(prompts, completions, window)
    scored = completions.sum(axis=1) + (prompts - 1) * packing.score_prompt
    times = len(rows)
    return Batches(
        Counts(float(sizes.sum() / times), float(seen.sum() / times), float(scored.sum() / times)),
        tuple(rows),
        float(sizes.sum() / (sum(rows) * training.row_length)),
        origin,
    )


@dataclass(frozen=True)
class Step:
    """All that decides what a train step costs.

    run: its configuration, the mesh without -1. platform: cpu, gpu or tpu. attention: which implementation of it.
    """

    run: Run
    model: DecoderConfig
    batches: Batches
    platform: str
    attention: Implementation

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Of the axes of the mesh."""
        return {axis: getattr(self.run.mesh, axis) for axis in AXES}

    def ways(self, *axes: str) -> int:
        """Devices along some axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    @property
    def devices(self) -> int:
        return self.ways(*AXES)

    @property
    def row_part(self) -> int:
        """Places of a row that a device computes."""
        return -(-self.run.training.row_length // self.ways(*TOKENS))

    @property
    def places(self) -> int:
        """Places of a microbatch that a device computes."""
        return self.run.training.rows_per_device * self.row_part

    @property
    def microbatches(self) -> float:
        """Of a batch, on average."""
        rows = self.run.training.rows_per_device * self.ways(*ROWS)
        return float(np.mean([-(-n // rows) for n in self.batches.rows]))

    @property
    def shape(self) -> int:
        """Microbatches that the arrays of a batch have places for."""
        rows = self.run.training.rows_per_device * self.ways(*ROWS)
        return bucket(-(-max(self.batches.rows) // rows))

    @property
    def adds_in_place(self) -> bool:
        """Whether a layer's gradient is added to their sum as it is made, see `training.step.added_up`."""
        return self.shape > 1 and self.devices == 1 and self.run.model.dtype == "float32"

    @property
    def block(self) -> tuple[int, int]:
        """Tokens and words that meet the head at once on a device."""
        training = self.run.training
        blocks = head_blocks(self.row_part, training.rows_per_device, self.platform, self.devices)
        words = self.model.vocab_size // self.divided(self.model.vocab_size)
        return blocks.tokens[0] * training.rows_per_device, min(blocks.words or words, words)

    def divided(self, size: int) -> int:
        """Over how many devices a product's output of so many numbers, or heads, is divided."""
        ways = self.ways(*PRODUCTS)
        return ways if size % ways == 0 else 1

    @property
    def split(self) -> tuple[str, ...]:
        """The axes over which matrices are split along the width of the residual stream, and so are gathered."""
        return _layout(tuple(self.sizes.items())).along("embed", self.model.width)

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        """Of each parameter, the numbers that a device keeps, and those that it has once its part is gathered."""
        return _parts(self.model, tuple(self.sizes.items()))

    def kept(self) -> int:
        """Parameters that a device keeps."""
        return sum(kept for kept, _ in self.parts.values())

    def of_blocks(self) -> dict[str, tuple[int, int]]:
        """`parts` of the kernels of all layers."""
        return {path: part for path, part in self.parts.items() if path.startswith("blocks.") and is_kernel(path)}

    def of_ends(self) -> dict[str, tuple[int, int]]:
        """`parts` of the matrices outside the layers, which are gathered once for a microbatch."""
        return {
            path: part for path, part in self.parts.items() if LOGICAL_AXES[path][-1] == "embed" and "." not in path
        }

    def of_vectors(self) -> dict[str, tuple[int, int]]:
        """`parts` of norms and biases."""
        return {p: part for p, part in self.parts.items() if p not in self.of_blocks() and p not in self.of_ends()}

    def with_(self, **changes: Any) -> "Step":
        return dataclasses.replace(self, **changes)


def _layout(sizes: tuple[tuple[str, int], ...]) -> Layout:
    mesh: Any = AbstractMesh(tuple(size for _, size in sizes), tuple(axis for axis, _ in sizes))
    return Layout(mesh)


@cache
def _parts(model: DecoderConfig, sizes: tuple[tuple[str, int], ...]) -> dict[str, tuple[int, int]]:
    layout, found = _layout(sizes), {}
    for path, shape in shapes(model).items():
        axes = LOGICAL_AXES[path]
        kept = math.prod(layout.parameter(shape, axes).shard_shape(shape))
        over = layout.along("embed", shape[axes.index("embed")]) if "embed" in axes else ()
        found[path] = kept, kept * math.prod(dict(sizes)[axis] for axis in over)
    return found


def is_kernel(path: str) -> bool:
    return path.endswith(".kernel")


@cache
def shapes(model: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder's parameters by their paths."""
    return {path: leaf.shape for path, leaf in by_path(abstract_decoder(model, jnp.float32)).items()}


def parameters(model: DecoderConfig) -> int:
    """How many numbers a decoder's parameters hold."""
    return sum(math.prod(shape) for shape in shapes(model).values())


def bytes_of(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
