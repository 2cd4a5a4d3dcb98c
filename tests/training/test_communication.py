"""What a train step sends between devices, read from its compiled program, against what it has to send at least, and
what the plan of a run says.

Along `fsdp` and `sequence` every weight is gathered for the forward and again for the backward pass, and every
gradient is summed to where its part lies. A sum over all devices instead would send twice as much, and hold gradients
whole.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxpo.batch import Example
from jaxpo.config import DataConfig, DataSource, MeshConfig, ModelConfig, OptimizerConfig, Run, TrainingConfig
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder, DecoderConfig, by_path
from jaxpo.objectives import DPO
from jaxpo.objectives.score import Scorer, head_blocks
from jaxpo.planning.traffic import collectives
from jaxpo.planning.work import Step, batches_of
from jaxpo.training.control import Control
from jaxpo.training.mesh import Layout, make_mesh
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState, initial_carry, make_train_step

SIZES = {"f32": 4, "bf16": 2, "u16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Sent(NamedTuple):
    """A collective of a program: what it is, the bytes of what it is about, whole, and over how many devices."""

    kind: str
    bytes: int
    devices: int


def bytes_of(shape: str) -> int:
    """Of `f32[2,3]{1,0}`, or of a tuple of such."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(SIZES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def sent(program: str) -> Iterator[Sent]:
    """The collectives of a program, each as often as it runs: those of a loop's body once for each time around."""
    blocks = {}
    for block in program.split("\n\n"):
        if named := re.match(r"\s*(ENTRY )?%?([\w.\-]+) \(", block):
            blocks[named[2]] = block
    entry = next(name for name, block in blocks.items() if block.lstrip().startswith("ENTRY"))

    def of(name: str) -> Iterator[Sent]:
        for line in blocks[name].splitlines():
            found = re.match(r"\s*(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+?)(?:-start)?\(", line)
            if found and found[2] in COLLECTIVES:
                groups = re.search(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]+)\})", line)
                mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", line)
                if mesh:
                    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
                    devices = math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
                else:
                    assert groups, line
                    devices = int(groups[2]) if groups[2] else len(groups[3].split(","))
                size = bytes_of(found[1]) * (devices if found[2] == "reduce-scatter" else 1)
                yield Sent(found[2], size, devices)
            times = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", line):
                for one in of(called) if called in blocks else ():
                    yield from [one] * (int(times[1]) if times and " while(" in line else 1)

    return of(entry)


def program(decoder: Decoder, mesh: MeshConfig) -> str:
    """The compiled train step of one microbatch on a mesh."""
    layout = Layout(make_mesh(mesh))
    scorer = Scorer(
        "float32", "full", head_blocks(64 // layout.row_devices, 1, "cpu", layout.mesh.size), devices=layout
    )
    optimizer = make_optimizer(OptimizerConfig(), decoder.config, 10, 1.0)
    carry = jax.tree.map(np.float32, initial_carry(DPO(), Control()))
    begin: Any = np.int32(0)
    weights = jax.device_put(decoder, layout.decoder(decoder.config, decoder))
    state = TrainState(begin, weights, optimizer.init(weights), carry)
    tokens = np.ones(20, np.int32)
    examples = [Example(str(n), tokens, (tokens, tokens)) for n in range(layout.batch_devices)]
    packing = Packing(64, layout.batch_devices, devices=layout.batch_devices)
    batch = layout.put(pack(examples, np.zeros((len(examples), 1, 2), np.float32), packing)[0])
    placed = jax.tree.map(lambda leaf: leaf.sharding, layout.place(decoder.config, jax.eval_shape(lambda: state)))
    step = jax.jit(make_train_step(DPO(), scorer, optimizer, Control()), out_shardings=(placed, None))
    return step.lower(state, batch).compile().as_text() or ""


def planned(config: DecoderConfig, mesh: MeshConfig, batch_size: int) -> Step:
    """The step of `program`: examples of 3 x 20 tokens, each in a row of 64."""
    run = Run(
        model=ModelConfig(path="none", compute_dtype="float32", remat="full"),
        data=DataConfig(train=(DataSource(path="none.jsonl"),)),
        training=TrainingConfig(batch_size=batch_size, row_length=64),
        mesh=mesh,
    )
    batches = batches_of(np.array([20]), np.array([[20, 20]]), run, None, "a test")
    return Step(run, config, batches, "cpu", "dense")


# Sums of scalars, of metrics and norms, are in no plan.
SCALARS = 512


def assert_as_planned(found: list[Sent], step: Step) -> None:
    sums: Counter[tuple[str, int]] = Counter()
    for one in found:
        if one.devices > 1:
            sums[one.kind, one.devices] += one.bytes
    said: Counter[tuple[str, int]] = Counter()
    for one in collectives(step):
        said[one.kind, step.ways(*one.axes)] += int(one.bytes)
    assert {kind for kind, _ in sums} <= {"all-gather", "reduce-scatter", "all-reduce"}
    for kind, devices in {*said, *sums}:
        slack = SCALARS if kind == "all-reduce" else 0
        assert said[kind, devices] <= sums[kind, devices] <= said[kind, devices] + slack, (kind, devices)


MESHES = {
    "fsdp 8": MeshConfig(data=1, fsdp=8, tensor=1),
    "tensor 4": MeshConfig(data=2, fsdp=1, tensor=4),
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
    "fsdp 2, sequence 4": MeshConfig(data=1, fsdp=2, sequence=4),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_step_sends_what_it_has_to(name: str, small_decoder: Decoder, capfd: pytest.CaptureFixture[str]) -> None:
    mesh = MESHES[name]
    found = list(sent(program(small_decoder, mesh)))
    assert "rematerialization" not in capfd.readouterr().err
    assert_as_planned(found, planned(small_decoder.config, mesh, mesh.data * mesh.fsdp))
    states = mesh.fsdp * mesh.sequence
    along_states = [one for one in found if one.devices == states > 1]
    total = Counter()
    for one in along_states:
        total[one.kind] += one.bytes
    leaves = by_path(small_decoder)
    # What a device of `tensor` has of a matrix.
    split = {
        path: leaf.size * 4 // mesh.tensor for path, leaf in leaves.items() if leaf.ndim > 1 and "norm" not in path
    }
    blocks = sum(size for path, size in split.items() if path.startswith("blocks."))
    if states > 1:
        assert total["all-gather"] <= 1.1 * (2 * blocks + split["embedding"])
        assert total["reduce-scatter"] <= 1.1 * (blocks + split["embedding"])
        assert total["all-gather"] >= 2 * blocks
    # Along `sequence` keys and values, and their gradients; what tokens belong to, and scores.
    config = small_decoder.config
    keys_and_values = 2 * 64 * config.num_kv_heads * config.head_dim * 4 * config.num_layers
    along_sequence = Counter()
    for one in found:
        if one.devices == mesh.sequence > 1:
            along_sequence[one.kind] += one.bytes
    if mesh.sequence > 1:
        # With everything recomputed they are gathered for the forward pass, and again for the backward pass.
        assert 2 * keys_and_values <= along_sequence["all-gather"] <= 1.1 * 2 * keys_and_values
        assert keys_and_values <= along_sequence["reduce-scatter"] <= 1.1 * keys_and_values
        assert set(along_sequence) <= {"all-gather", "reduce-scatter", "all-reduce"}
    # What is left to be summed over all: the gradients of norms, and counts.
    norms = sum(leaf.size * 4 for path, leaf in leaves.items() if "norm" in path)
    assert total["all-reduce"] <= norms + 512
    # Along `tensor` activations are summed: twice in a layer's forward pass, which runs twice here, and once for the
    # gradient of each product's input; neither logits nor an embedding are gathered.
    along_tensor = [one for one in found if one.devices == mesh.tensor and mesh.tensor > 1]
    assert {one.kind for one in along_tensor} <= {"all-reduce"}
    activations = 64 * leaves["embedding"].shape[1] * 4
    assert sum(one.bytes for one in along_tensor) <= 1.1 * (2 + 2 + 5) * config.num_layers * activations


def test_every_microbatch_sends_what_one_does(small_decoder: Decoder) -> None:
    mesh = MESHES["fsdp 4, tensor 2"]
    one, four = (planned(small_decoder.config, mesh, size) for size in (4, 16))
    assert (one.microbatches, four.microbatches) == (1, 4)
    assert collectives(one) == collectives(four)
