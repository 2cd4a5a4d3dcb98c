"""What a train step sends between devices, as `mesh.Layout.over_rows` and `models.product` write it down."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxpo.planning.work import PRODUCTS, ROWS, TOKENS, Step, bytes_of

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]


@dataclass(frozen=True)
class Collective:
    """Arrays of so many bytes, whole, that a device gathers, or whose sum it takes part in, in one microbatch.

    axes: of the mesh, over which. waited_for: whether nothing else can be computed meanwhile.
    """

    kind: Kind
    axes: tuple[str, ...]
    what: str
    bytes: float
    waited_for: bool = False


def collectives(step: Step) -> list[Collective]:
    """Of one microbatch. A few scalars, of metrics and norms, are left out."""
    return [one for one in (*_of_weights(step), *_of_rows(step), *_of_activations(step)) if one.bytes]


def forward_passes(step: Step) -> int:
    """How often a batch is scored before its gradient is computed: once more where examples are coupled."""
    return 2 if step.run.objective.couples_examples and step.shape > 1 else 1


def _of_weights(step: Step) -> Iterator[Collective]:
    """Weights are gathered for each product, forward and backward, and gradients summed to where their parts lie."""
    model, blocks, ends = step.run.model, step.of_blocks(), step.of_ends()
    passes = forward_passes(step)
    stored, computed = bytes_of(model.dtype), bytes_of(model.compute_dtype)
    whole_blocks, whole_ends = (sum(whole for _, whole in parts.values()) for parts in (blocks, ends))
    copies = tuple(axis for axis in (*ROWS, *TOKENS) if step.sizes[axis] > 1)
    if step.split:
        yield Collective("all-gather", step.split, "layers' kernels", (1 + passes) * whole_blocks * computed)
        yield Collective("all-gather", step.split, "embedding and head", passes * whole_ends * stored)
        yield Collective("reduce-scatter", step.split, "layers' gradients", whole_blocks * 4)
        yield Collective("reduce-scatter", step.split, "embedding's and head's gradients", whole_ends * stored)
    without = tuple(axis for axis in copies if axis not in step.split)
    if without:
        kept = sum(kept for kept, _ in (*blocks.values(), *ends.values()))
        yield Collective("all-reduce", without, "gradients", kept * stored, waited_for=True)
    if copies:
        kept = sum(kept for kept, _ in step.of_vectors().values())
        yield Collective("all-reduce", copies, "gradients of norms and biases", kept * stored, waited_for=True)


def _of_rows(step: Step) -> Iterator[Collective]:
    """Devices that share a row gather its keys and values, layer by layer, and sum their gradients up."""
    if step.ways(*TOKENS) == 1:
        return
    model, run = step.model, step.run
    places = run.training.rows_per_device * run.training.row_length
    numbers = 2 * model.num_kv_heads * model.head_dim / step.divided(model.num_kv_heads)
    size = model.num_layers * places * numbers * bytes_of(run.model.compute_dtype)
    passes = forward_passes(step) + (run.model.remat != "none")
    yield Collective("all-gather", TOKENS, "keys and values", passes * size, waited_for=True)
    yield Collective("reduce-scatter", TOKENS, "their gradients", size, waited_for=True)
    # Segments and branches, and positions for a window of them.
    fields = 2 if model.window is None else 3
    yield Collective("all-gather", TOKENS, "what tokens belong to", forward_passes(step) * fields * 4 * places)


def _of_activations(step: Step) -> Iterator[Collective]:
    """Where a product's inputs are divided, its outputs are parts of a sum."""
    model, remat = step.model, step.run.model.remat
    if step.ways(*PRODUCTS) == 1:
        return
    # A CPU's products come out in float32.
    size = 4 if step.platform == "cpu" else bytes_of(step.run.model.compute_dtype)
    heads, kv_heads, mlp = (step.divided(n) > 1 for n in (model.num_heads, model.num_kv_heads, model.mlp_width))
    forward, again = heads + mlp, heads * (remat in ("full", "attention", "offload"))
    backward = heads + 2 * kv_heads + mlp * (2 if model.mlp == "gated" else 1)
    per_layer = forward_passes(step) * forward + again + backward
    activations = step.places * model.width
    yield Collective(
        "all-reduce", PRODUCTS, "activations", model.num_layers * per_layer * activations * size, waited_for=True
    )
    if step.divided(model.vocab_size) == 1:
        return
    embedded = forward_passes(step) * activations * bytes_of(step.run.model.dtype)
    yield Collective("all-reduce", PRODUCTS, "embedded tokens", embedded, waited_for=True)
    if model.head != "score":
        sums = 3 + ("confidence" in step.run.objective.statistics)
        each = 4 * (forward_passes(step) * sums + model.width)
        yield Collective("all-reduce", PRODUCTS, "head", each * scored_places(step), waited_for=True)


def scored_places(step: Step) -> float:
    """Places that meet the head in a microbatch on a device: scored tokens, in whole blocks."""
    tokens, _ = step.block
    scored = step.batches.counts.scored / step.ways(*ROWS, *TOKENS) / step.microbatches
    return min(-(-scored // tokens) * tokens, -(-step.places // tokens) * tokens)
