"""The train step as it is compiled for TPUs, which needs libtpu but no TPU.

    pip install --target DIR --no-deps libtpu && JAXPO_LIBTPU=DIR pytest tests/training/test_tpu_program.py

It is no part of the test environment: with it, every JAX process on the machine looks for a TPU first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("tpu_program.py")
LIBTPU = os.environ.get("JAXPO_LIBTPU")

needs_libtpu = pytest.mark.skipif(LIBTPU is None, reason="JAXPO_LIBTPU names no folder with libtpu")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Python with libtpu beside a CPU."""
    path = os.pathsep.join(filter(None, [LIBTPU, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def compiled(*arguments: Any) -> dict[str, Any]:
    done = run(str(PROGRAM), *map(str, arguments))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "sizes"),
    [("v5p:4x4x4", 1, (2, 32, 1, 1)), ("v6e:4x4", 1, (1, 8, 1, 2)), ("v5e:4x4", 2, (4, 2, 2, 2))],
)
def test_any_mesh_has_a_place_on_a_torus(topology: str, slices: int, sizes: tuple[int, ...]) -> None:
    """Also one of which an axis is no axis of the torus; slices lie along `data`."""
    code = f"""
from jax.experimental import topologies
from jaxpo.training.mesh import near_each_other
devices = topologies.get_topology_desc({topology!r}, platform="tpu", num_slices={slices}).devices
found = near_each_other({sizes}, devices)
assert found.shape == {sizes} and len(set(found.flat)) == len(devices)
if {slices} > 1:
    of_copies = [{{device.slice_index for device in copy.flat}} for copy in found]
    assert of_copies == [{{0}}, {{0}}, {{1}}, {{1}}], of_copies
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_libtpu
@pytest.mark.parametrize(("fsdp", "sequence", "tensor"), [(4, 1, 1), (2, 1, 2), (1, 1, 4), (1, 4, 1), (1, 2, 2)])
def test_a_step_on_four_chips(fsdp: int, sequence: int, tensor: int) -> None:
    found = compiled("v5e:2x2", fsdp, sequence, tensor)
    assert found["attention"] == "splash"
    # One kernel forward and two backward, also for the two chunks that a chip has of a row that several share: what the
    # forward pass made of the attention is kept, not made again.
    assert found["kernels"] == 3
    assert found["square"] == [], "no scores and no mask of numbers over a whole row"
    assert found["logits"] == found["block"] * 4096 // tensor, "each chip has the logits of one block, of its own words"


@needs_libtpu
def test_moments_on_the_host_take_no_room_on_the_chips() -> None:
    there, away = compiled("v5e:2x2", 4, 1, 1), compiled("v5e:2x2", 4, 1, 1, "offload")
    assert there["on_host"] == 0
    assert away["on_host"] > 0
    assert away["arguments"] + away["on_host"] == there["arguments"]
