"""The train step, compiled for devices that need not be here, and what XLA says of its memory.

`measured` starts a process of its own for it, `python -m jaxpo.planning.compiled FILE`: what jax takes for its devices
is settled once in a process.
"""

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxpo.errors import UserError
from jaxpo.models.attention import why_not
from jaxpo.planning.hardware import Topology
from jaxpo.planning.work import Step

# A folder with libtpu in it, which is best kept out of an environment: with it each process looks for a TPU first.
LIBTPU = "JAXPO_LIBTPU"
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Compiled:
    """What XLA says of a step on one device, in bytes.

    arguments: state and batch. peak: at most in use at once; None where the compiler gave up for want of memory, and
    `message` says what it said then. host: arguments in the host's memory.
    """

    platform: str
    arguments: int
    peak: int | None
    host: int
    message: str = ""


def measured(step: Step, topology: Topology) -> tuple[Step, Compiled]:
    """The step that was compiled, and its memory.

    For TPUs by libtpu, where it is installed or JAXPO_LIBTPU names its folder. Else, and for GPUs, whose compiler needs
    one, the same step is compiled for as many simulated CPU devices.
    """
    there = topology.chip.platform == "tpu" and topology.islands == 1 and libtpu_path() is not None
    if not there:
        step = step.with_(platform="cpu", attention=_on_cpu(step))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.pickle"
        file.write_bytes(pickle.dumps((step, str(topology) if there else None)))
        path = os.pathsep.join(filter(None, [libtpu_path() if there else None, *sys.path]))
        environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        environment["JAX_NUM_CPU_DEVICES"] = "1" if there else str(step.devices)
        # libtpu is a compiler here: it keeps no other process from its TPUs.
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        command = [sys.executable, "-m", __name__, str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--compile: the step does not compile: {_last(done.stderr)}")
    return step, Compiled(**json.loads(done.stdout.splitlines()[-1]))


def libtpu_path() -> str | None:
    """The folder that libtpu is in, "" where it is installed, None where it is not."""
    if folder := os.environ.get(LIBTPU):
        if not (Path(folder) / "libtpu").is_dir():
            raise UserError(f"{LIBTPU} is {folder}, which holds no libtpu; expected a folder that pip installed it to.")
        return folder
    return "" if importlib.util.find_spec("libtpu") else None


def _on_cpu(step: Step) -> Any:
    run = step.run
    return "blocked" if why_not(step.attention, "cpu", run.model.compute_dtype, step.model.head_dim) else step.attention


def _last(text: str) -> str:
    """The last line of what a process wrote."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"


class Program(NamedTuple):
    """The train step of a run, to be compiled: the function, shapes of its state and batch, and where they lie."""

    train: Any
    state: Any
    batch: Any
    layout: Any


def program(step: Step, devices: Sequence[Any]) -> Program:
    """The step as the trainer makes it, over these devices."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from jaxpo.prepare import scorer_of
    from jaxpo.run import abstract_state
    from jaxpo.training.control import Control
    from jaxpo.training.mesh import AXES, Layout
    from jaxpo.training.optimizer import make_optimizer
    from jaxpo.training.step import make_train_step

    run, sizes = step.run, tuple(step.sizes.values())
    layout = Layout(Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    scorer = scorer_of(run, layout, step.attention)
    control = Control(run.control.adaptive_beta)
    optimizer = make_optimizer(run.optimizer, step.model, 1000, run.training.max_grad_norm, run.model.dtype)
    return Program(
        jax.jit(make_train_step(run.objective, scorer, optimizer, control), donate_argnums=0),
        abstract_state(run, step.model, layout, optimizer, control),
        _abstract_batch(step, layout),
        layout,
    )


def compile_step(step: Step, topology: str | None) -> Compiled:
    """The step compiled in this process: for a TPU topology, or for the devices here."""
    import jax
    from jax.experimental import topologies

    from jaxpo import compiler
    from jaxpo.models import kept

    compiler.set_up(step.run.model.compute_dtype)
    described = None if topology is None else topologies.get_topology_desc(topology, platform="tpu")
    of = program(step, jax.devices() if described is None else described.devices)
    with kept.made_for(step.platform):
        lowered = of.train.lower(of.state, of.batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        return Compiled(step.platform, 0, None, 0, " ".join(str(error).split())[:400])
    memory: Any = compiled.memory_analysis()
    # A CPU's compiler names no peak: its arguments, of which the state is given back in place, and what else it needs.
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        step.platform,
        memory.argument_size_in_bytes,
        memory.peak_memory_in_bytes if topology is not None else peak,
        memory.host_argument_size_in_bytes,
    )


def _abstract_batch(step: Step, layout: Any) -> Any:
    """Shapes, dtypes and shardings of a packed batch of the run's size."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from jaxpo.batch import DeviceBatch, Example
    from jaxpo.data.pack import pack
    from jaxpo.prepare import packing_of

    word = np.ones(1, np.int32)
    packing = dataclasses.replace(packing_of(step.run, layout.batch_devices), microbatches=step.shape)
    packed, _ = pack([Example("", word, (word,) * step.run.objective.num_completions)], None, packing)
    batch = layout.arranged(packed)

    def abstract(field: Any, spec: Any) -> Any:
        at = NamedSharding(layout.mesh, spec)
        return jax.ShapeDtypeStruct(np.shape(field), np.asarray(field).dtype, sharding=at)

    return DeviceBatch(*map(abstract, batch, layout.fields(batch)))


if __name__ == "__main__":
    given, where = pickle.loads(Path(sys.argv[1]).read_bytes())
    print(json.dumps(dataclasses.asdict(compile_step(given, where))))
