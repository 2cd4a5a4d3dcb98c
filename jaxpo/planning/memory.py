"""What a train step holds in memory at once, on each device, by kind."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxpo.planning.work import Step, bytes_of

# The splash kernel fills heads up to its registers' width; the tiles of `blocked` reach beyond a row's end.
LANES, TILE = 128, 128
# Bytes of a score while `dense` makes its gradient, in float32.
DENSE = 14
# How often a CPU has a number of keys and values of whole rows at once.
ROWS_ON_CPU = 3

HEAD, LAYER, UPDATE = "in the head", "in the backward pass of a layer", "in the optimizer's update"


@dataclass(frozen=True)
class Memory:
    """Bytes on a device: weights, moments and batch, which are there from step to step; in each phase of a step all
    that is held, by kind. host: bytes in the host's memory for each device.
    """

    weights: float
    moments: float
    batch: float
    phases: Mapping[str, Mapping[str, float]]
    host: float

    @property
    def phase(self) -> str:
        """In which most is held."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.phase].values())


class Kept(NamedTuple):
    """Bytes of activations that the backward pass finds: on the device, and in the host's memory."""

    device: float
    host: float


def memory(step: Step) -> Memory:
    """Of a train step."""
    run, kept = step.run, kept_for_backward(step)
    stored, state = bytes_of(run.model.dtype), bytes_of(run.optimizer.state_dtype or run.model.dtype)
    weights, moments = step.kept() * stored, 2 * step.kept() * state
    averaged = run.reference.sync_steps is not None and run.reference.mixup_alpha < 1.0
    offloaded = run.optimizer.offload
    always = {
        "weights": weights,
        "reference": weights if averaged else 0.0,
        "moments": 0.0 if offloaded else moments,
        "batch": batch_bytes(step),
    }
    # Sums over microbatches are in float32. A microbatch's gradients stand beside them, if not added as they are made.
    sums = 4.0 * step.kept() if step.shape > 1 else 0.0
    gradients = 0.0 if step.adds_in_place else float(step.kept() * gradient_size(step))
    ends = sum(whole for _, whole in step.of_ends().values())
    whole_ends = ends * stored if step.split else 0.0
    phases = {
        HEAD: {
            **always,
            "gradients": sums,
            "activations": kept.device,
            "gathered weights": whole_ends,
            "head": head_bytes(step),
        },
        LAYER: {
            **always,
            "gradients": sums + gradients,
            "activations": kept.device,
            "gathered weights": whole_ends + gathered_bytes(step),
            "gradients of embedding and head": 4.0 * ends,
            "a layer": layer_bytes(step),
            "scores of attention": score_bytes(step),
            "keys and values of whole rows": row_bytes(step),
        },
        UPDATE: {**always, "moments": moments, "gradients": sums or weights, "update": update_bytes(step)},
    }
    return Memory(weights, moments, batch_bytes(step), phases, kept.host + (moments if offloaded else 0.0))


def gradient_size(step: Step) -> int:
    """Bytes of a number of a microbatch's gradients while they are made.

    They have the weights' dtype; a CPU's compiler makes a stack of bfloat16 in float32, and rounds it beside.
    """
    stored = bytes_of(step.run.model.dtype)
    return stored + 4 + stored if step.platform == "cpu" and stored == 2 else stored


def batch_bytes(step: Step) -> float:
    """The packed batch: eight numbers of 4 bytes for each place, and those of slots, one for 32 places of a row."""
    training, K = step.run.training, step.run.objective.num_completions
    rows = step.shape * training.rows_per_device
    slots = rows * training.row_length / 32
    return 4.0 * (8 * rows * step.row_part + slots * (4 * K + 2))


class Widths(NamedTuple):
    """Numbers that a device has of each place of a layer: the residual stream, queries, keys, within the MLP."""

    stream: int
    heads: float
    kv_heads: float
    up: float
    down: float
    lse: float


def widths(step: Step) -> Widths:
    model = step.model
    down = model.mlp_width / step.divided(model.mlp_width)
    return Widths(
        stream=model.width,
        heads=model.num_heads * model.head_dim / step.divided(model.num_heads),
        kv_heads=model.num_kv_heads * model.head_dim / step.divided(model.num_kv_heads),
        up=down * (2 if model.mlp == "gated" else 1),
        down=down,
        lse=model.num_heads / step.divided(model.num_heads),
    )


def out_bytes(step: Step) -> float:
    """Of a place: what the attention puts out, as its kernel keeps it, and the log of its sums."""
    w, model, training = widths(step), step.model, step.run.training
    filled = -(-model.head_dim // LANES) * LANES / model.head_dim if step.attention == "splash" else 1.0
    beyond = 1 + TILE / training.row_length if step.attention == "blocked" else 1.0
    return bytes_of(step.run.model.compute_dtype) * w.heads * filled * beyond + 4 * w.lse


def alive(step: Step) -> float:
    """Bytes of a place that the backward pass of a layer needs, if nothing is computed again."""
    w, s = widths(step), bytes_of(step.run.model.compute_dtype)
    normed = w.heads + w.kv_heads if step.model.qk_norm else 0.0
    qkv = w.heads + 2 * w.kv_heads
    return s * (4 * w.stream + qkv + normed + w.heads + w.up + w.down) + out_bytes(step)


def kept_for_backward(step: Step) -> Kept:
    """Of all layers, by the policy."""
    w, s, places = widths(step), bytes_of(step.run.model.compute_dtype), step.places * step.model.num_layers
    stream, qkv, out = s * w.stream, s * (w.heads + 2 * w.kv_heads), out_bytes(step)
    if step.attention == "cudnn":
        out = 0.0
    products = s * (w.stream + w.up + (w.heads + w.kv_heads if step.model.qk_norm else 0))
    match step.run.model.remat:
        case "none":
            return Kept(places * alive(step) + step.model.num_layers * whole_rows(step) * s, 0.0)
        case "full":
            return Kept(places * stream, 0.0)
        case "dots":
            return Kept(places * (stream + qkv + out + products), 0.0)
        case "attention":
            return Kept(places * (stream + qkv + out), 0.0)
        case "offload":
            return Kept(places * stream, places * (qkv + out))


def layer_bytes(step: Step) -> float:
    """What the backward pass of a layer makes while it runs: all of a layer again, and gradients of its widest part.

    On an accelerator the activation's gradients become part of the products, and take the place of what they are of.
    """
    w, s = widths(step), bytes_of(step.run.model.compute_dtype)
    again = alive(step) if step.run.model.remat != "none" else 0.0
    gradients = s * (2 * w.stream + w.up + w.down)
    return step.places * (again + gradients if step.platform == "cpu" else max(again, gradients))


def score_bytes(step: Step) -> float:
    """What attention makes of all pairs of a query and a key of a row: nothing, where tiles are all that it makes.

    `dense` makes scores and probabilities, forward and backward, and a mask; cudnn's kernels take the mask as numbers
    that are added; splash has the mask of a row at a time.
    """
    training, model = step.run.training, step.model
    pairs = step.row_part * training.row_length
    match step.attention:
        case "dense":
            heads = model.num_heads / step.divided(model.num_heads)
            return training.rows_per_device * pairs * (heads * DENSE + 1)
        case "cudnn":
            return training.rows_per_device * pairs * (1 + bytes_of(step.run.model.compute_dtype))
        case "splash":
            return pairs
        case "blocked":
            return 0.0


def whole_rows(step: Step) -> float:
    """Numbers of the keys and values of one layer, of rows that several devices share; 0 where each has its own."""
    training = step.run.training
    if step.row_part == training.row_length:
        return 0.0
    return training.rows_per_device * training.row_length * 2 * widths(step).kv_heads


def row_bytes(step: Step) -> float:
    """Keys and values of whole rows: gathered, put in order, and their gradients; a CPU has them turned besides."""
    s = bytes_of(step.run.model.compute_dtype)
    return whole_rows(step) * (ROWS_ON_CPU * s if step.platform == "cpu" else 4 * s + 4)


def gathered_bytes(step: Step) -> float:
    """A layer's kernels as products take them, and the gradients of its widest ones, before they are summed."""
    parts = [whole / step.model.num_layers for _, whole in step.of_blocks().values()]
    if not step.split and step.run.model.compute_dtype == step.run.model.dtype:
        return 0.0
    return sum(parts) * bytes_of(step.run.model.compute_dtype) + 4 * max(parts)


def head_bytes(step: Step) -> float:
    """Hidden states of scored places and their gradient, logits of a block, and the gradient of the head."""
    model, s = step.model, bytes_of(step.run.model.compute_dtype)
    if model.head == "score":
        return 0.0
    tokens, words = step.block
    columns = math.ceil(step.places / tokens) * tokens
    head = model.vocab_size / step.divided(model.vocab_size) * model.width
    logits = tokens * words * (4 + 4 + s)
    return columns * model.width * (s + 4) + logits + 4 * head


def update_bytes(step: Step) -> float:
    """Updates in float32, whose norm is taken before they are applied; and what is rounded anew, beside the old."""
    run = step.run
    dtypes = (run.model.dtype, run.optimizer.state_dtype or run.model.dtype)
    return step.kept() * (4.0 + 2.0 * dtypes.count("bfloat16"))
