"""Damages checkpoints and reads them, then fills the disk; prints what came of it as JSON, for test_checkpoint.py.

A process of its own: readers and writers that Orbax leaves behind when one of them fails end at any later time, with
warnings that would fail whichever test is running then.
"""

import json
import resource
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo.config import TrainingConfig
from jaxpo.errors import UserError
from jaxpo.training.checkpoint import FOLDER, Checkpoints, latest_step
from jaxpo.training.loop import Progress

STATE = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32), "n": jnp.int32(3)}


def save(folder: Path, steps: list[int]) -> None:
    with Checkpoints(folder, TrainingConfig()) as checkpoints:
        for step in steps:
            checkpoints.save(step, STATE, asdict(Progress(examples=step)), {})


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = int(len(content) * float(how))
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])


def is_whole(restored: tuple[Any, Any], step: int) -> bool:
    state, progress = restored
    same = all(np.asarray(state[name]).tobytes() == np.asarray(STATE[name]).tobytes() for name in STATE)
    return same and progress == asdict(Progress(examples=step))


def read_damaged(folder: Path, how: str) -> dict[str, Any]:
    """Every file of step 2 in turn, each in a copy: what reading said, or None where it gave the state as it was."""
    save(folder / "good", [1, 2])
    source = folder / "good" / FOLDER / "2"
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)
    told: dict[str, Any] = {}
    for n, path in enumerate(sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())):
        run = folder / str(n)
        shutil.copytree(folder / "good", run)
        damage(run / FOLDER / "2" / path, how)
        with Checkpoints(run, TrainingConfig()) as checkpoints:
            try:
                whole = is_whole(checkpoints.restore(2, wanted), 2)
                text = None if whole else "not the state that was saved"
            except UserError as error:
                text = str(error).replace(str(run), "RUN")
            before = is_whole(checkpoints.restore(1, wanted), 1)
        told[str(path)] = text if before else "the checkpoint before it is damaged too"
    return told


def fill_disk(folder: Path) -> dict[str, Any]:
    """Files that cannot grow beyond 100 kB fail as those on a full disk do."""
    large = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    text = None
    try:
        with Checkpoints(folder, TrainingConfig()) as checkpoints:
            checkpoints.save(1, large, {}, {})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            checkpoints.save(2, large, {}, {})
    except UserError as error:
        text = str(error).replace(str(folder), "RUN")
    return {"text": text, "latest": latest_step(folder)}


def main(folder: Path) -> None:
    ways = ["missing", "cut", "0.2", "0.5", "0.8"]
    found = {how: read_damaged(folder / how, how) for how in ways}
    json.dump({**found, "full disk": fill_disk(folder / "full")}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
