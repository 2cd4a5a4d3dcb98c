"""How fast a train step can be: a roofline of what its devices compute, move through memory, and send."""

from typing import NamedTuple

from jaxpo.planning.hardware import Topology
from jaxpo.planning.memory import alive, kept_for_backward
from jaxpo.planning.traffic import Collective, collectives, forward_passes, scored_places
from jaxpo.planning.work import ROWS, TOKENS, Step, bytes_of
from jaxpo.training.flops import Counts, forward, useful

ASSUMPTIONS = (
    "at best: compute, memory and links at their published peaks; what is reached is often half of that.",
    "Compute, memory, and what is gathered and scattered over fsdp go on at once: the slowest counts.",
    "Sums (all-reduce), the update, and moments that come from the host are waited for.",
)


class Times(NamedTuple):
    """Seconds of a train step.

    Of all microbatches together: products, memory, links that are used meanwhile (`overlapped`), host (activations that
    go there and back), and links that are waited for (`exposed`). Once a step: update, and moments from the host and
    back.
    """

    products: float
    memory: float
    overlapped: float
    host: float
    exposed: float
    update: float
    moments: float

    @property
    def total(self) -> float:
        return max(self.products, self.memory, self.overlapped, self.host) + self.exposed + self.update + self.moments

    @property
    def bound_by(self) -> str:
        """What takes the most of it."""
        names = {
            "compute": self.products,
            "memory's bandwidth": self.memory,
            "links along which weights are gathered": self.overlapped,
            "transfers to the host": self.host + self.moments,
            "sums between devices": self.exposed,
            "the optimizer's update": self.update,
        }
        return max(names, key=lambda name: names[name])


def useful_flops(step: Step) -> float:
    """The useful arithmetic of a step, as the trainer counts it for its `mfu`."""
    return useful(step.model, step.batches.counts)


def device_flops(step: Step) -> float:
    """Floating-point operations that a device does in a step: padding and what is computed again count."""
    model, run = step.model, step.run
    M, remat, passes = step.microbatches, run.model.remat, forward_passes(step)
    once = forward(model, Counts(M * step.places, _seen(step), M * scored_places(step)))
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    up = model.mlp_width * (2 if model.mlp == "gated" else 1)
    # Numbers that go out of a layer's products or into them, beside the model's width; of which divided, and which are
    # computed again.
    qkv, out, down = heads + 2 * kv_heads, heads, model.mlp_width
    each = {
        "qkv": heads / step.divided(model.num_heads) + 2 * kv_heads / step.divided(model.num_kv_heads),
        "out": heads / step.divided(model.num_heads),
        "up": up / step.divided(model.mlp_width),
        "down": model.mlp_width / step.divided(model.mlp_width),
    }
    again = {"none": (), "dots": (), "full": ("qkv", "out", "up")}.get(remat, ("out", "up"))
    share = (passes + 2) * sum(each.values()) + sum(each[name] for name in again)
    products = once.products * share / (qkv + out + up + down)
    # Backward computes scores again: five products for the forward pass's two.
    attends = passes + 2.5 + attends_again(step)
    attention = attends * once.attention / step.divided(model.num_kv_heads)
    # Of the head logits are computed again, then its gradient and that of the hidden states.
    head = (passes + 3) * once.head / step.divided(model.vocab_size)
    return products + attention + head


def attends_again(step: Step) -> int:
    """How often the backward pass computes the attention's output again."""
    match step.attention, step.run.model.remat:
        case "dense", _:
            return 1
        case "cudnn", remat:
            return int(remat != "none")
        case _, remat:
            return int(remat == "full")


def _seen(step: Step) -> float:
    """Keys that a device computes for the queries of a step."""
    T, batches = step.run.training.row_length, step.batches
    if step.attention in ("dense", "cudnn"):
        return step.microbatches * step.places * T
    tile = min(T, 128 if step.attention == "blocked" else 512)
    # Half of a tile at a segment's diagonal is out of sight.
    return (batches.counts.seen + batches.counts.tokens * tile / 2) / step.ways(*ROWS, *TOKENS)


def memory_bytes(step: Step) -> float:
    """Bytes that a device reads and writes in the microbatches of a step."""
    run, model = step.run, step.model
    stored, computed, passes = bytes_of(run.model.dtype), bytes_of(run.model.compute_dtype), forward_passes(step)
    again = run.model.remat != "none"
    kernels = sum(whole for _, whole in step.of_blocks().values())
    # Of each product its weights are read, cast or gathered, and read again; a gradient is written, and added up.
    weights = kernels * (passes + 2) * (stored + 2 * computed)
    added = (2 if step.adds_in_place else 3) if step.shape > 1 else 0
    gradients = kernels * 4 + added * 4 * step.kept()
    activations = step.places * model.num_layers * alive(step) * (2 * passes + 4 + 2 * again)
    tokens, (_, words) = scored_places(step), (0, model.vocab_size // step.divided(model.vocab_size))
    # Float32 logits: written, read for their maximum and their sum; again backward, and their gradients.
    logits = 0.0 if model.head == "score" else tokens * words * (12 * passes + 8 + 3 * computed)
    return step.microbatches * (weights + gradients + activations + logits)


def update_bytes(step: Step) -> float:
    """Bytes that a device reads and writes once a step, for the norm, the moments and the weights."""
    stored, state = bytes_of(step.run.model.dtype), bytes_of(step.run.optimizer.state_dtype or step.run.model.dtype)
    return step.kept() * (2 * stored + 4 * state + 4 * 4)


def seconds_of(one: Collective, step: Step, topology: Topology) -> float:
    """Time at least of a collective: along one axis after the other, the first of which has its share of the others."""
    links = topology.links(step.sizes)
    times = 2 if one.kind == "all-reduce" else 1
    shares = [step.ways(*one.axes[n + 1 :]) for n in range(len(one.axes))]
    return sum(times * links[axis].seconds(one.bytes / share) for axis, share in zip(one.axes, shares, strict=True))


def times(step: Step, topology: Topology) -> Times:
    """Of a step on these devices, at best."""
    chip, run, M = topology.chip, step.run, step.microbatches
    sent = [(one.waited_for, seconds_of(one, step, topology)) for one in collectives(step)]
    state = bytes_of(run.optimizer.state_dtype or run.model.dtype)
    activations = kept_for_backward(step).host if run.model.remat == "offload" else 0.0
    return Times(
        products=device_flops(step) / chip.peak(run.model.compute_dtype),
        memory=memory_bytes(step) / chip.bandwidth,
        overlapped=M * sum(seconds for waited_for, seconds in sent if not waited_for),
        host=M * 2 * activations / chip.host,
        exposed=M * sum(seconds for waited_for, seconds in sent if waited_for),
        update=update_bytes(step) / chip.bandwidth,
        moments=2 * 2 * state * step.kept() / chip.host if run.optimizer.offload else 0.0,
    )
