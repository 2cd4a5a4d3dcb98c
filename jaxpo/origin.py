"""Where a run begins: with what its folder holds, with nothing, or with what another run has saved."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from jaxpo import atomic, config_file
from jaxpo.config import Run
from jaxpo.config_checks import path_problem
from jaxpo.errors import UserError
from jaxpo.prepare import INIT, STAGES
from jaxpo.run_folder import CONFIG, INPUTS, SAMPLES, SUMMARY, changes, read_object
from jaxpo.training import metrics
from jaxpo.training.checkpoint import FOLDER as CHECKPOINTS
from jaxpo.training.checkpoint import latest_step, steps_of

# Where a run keeps the weights that it begins with, if they are of another run.
START = "start"
# What of another run a folder has been given, and whether all of it is there.
NOTE = "resumed_from.json"


class Origin(NamedTuple):
    """A checkpoint of another run to go on from."""

    run: Path
    step: int


def chosen(folder: Path, run: Run, resume: str) -> Origin | None:
    """What a run in `folder` is to be given of another one; None if it begins with what is there, if anything.

    resume: `auto` goes on with what the folder holds. `never` refuses to. Anything else is a run, or a checkpoint in
    one (RUN/checkpoints/STEP), of the same config but for what a resumed run may change. Once it is in the folder, the
    same command goes on there, whatever has become of its origin. Raises UserError where that cannot be.
    """
    if resume == "auto":
        return None
    saved = latest_step(folder)
    held = f"a run of its own at step {saved}" if saved is not None else "a finished run"
    if resume == "never":
        begun = [name for name in run.stages if has_begun(folder / STAGES / name)]
        if has_begun(folder) or begun:
            found = held if has_begun(folder) else f"the stage {begun[0]}"
            raise UserError(
                f"--resume is never, but output_dir {folder} holds {found}; expected a new folder, or --resume auto to "
                "go on with what is there."
            )
        return None
    if not resume:
        raise UserError("--resume is empty; expected auto, never, a run or a checkpoint in one.")
    if problem := path_problem(resume):
        raise UserError(f"--resume {problem}.")
    note = read_object(folder / NOTE)
    if note is not None and note["resume"] == resume:
        return None if note["complete"] else Origin(Path(note["run"]), note["step"])
    if has_begun(folder):
        raise UserError(
            f"--resume is {resume}, but output_dir {folder} holds {held}; expected a new folder, or --resume auto to "
            "go on with what is there."
        )
    source, step = find_step(Path(resume).expanduser(), "--resume")
    if changed := changes(config_file.load(source / CONFIG), run):
        raise UserError(
            f"--resume {resume} is of a run with another config: {'; '.join(changed)}. Expected the same config, to go "
            f"on with that run; model.path={source / CHECKPOINTS / str(step)} begins a new one with its weights."
        )
    return Origin(source.absolute(), step)


def has_begun(folder: Path) -> bool:
    """Whether a run has come to something in its folder."""
    return latest_step(folder) is not None or (folder / SUMMARY).exists()


def adopt(origin: Origin, resume: str, folder: Path) -> None:
    """Bring what a run holds up to a step into the folder of another one: linked where that can be, else copied.

    Killed in the middle it is done again by the same command. Raises UserError where the step is gone meanwhile.
    """
    note = {"resume": resume, "run": str(origin.run), "step": origin.step}
    atomic.write_text(folder / NOTE, json.dumps({**note, "complete": False}))
    for name in (SAMPLES, INPUTS, metrics.FILE):
        if (origin.run / name).exists():
            atomic.write_text(folder / name, (origin.run / name).read_text(encoding="utf-8"))
    for name in (INIT, START, STAGES):
        _bring(origin.run / name, folder / name)
    if not _bring(origin.run / CHECKPOINTS / str(origin.step), folder / CHECKPOINTS / str(origin.step)):
        raise UserError(
            f"--resume {resume}: the checkpoint of step {origin.step} in {origin.run} is gone; expected one that is "
            "kept, such as a run's last one."
        )
    # The best of them is among those that the other run has kept.
    for step in steps_of(origin.run):
        if step < origin.step:
            _bring(origin.run / CHECKPOINTS / str(step), folder / CHECKPOINTS / str(step))
    atomic.write_text(folder / NOTE, json.dumps({**note, "complete": True}))


def _bring(source: Path, target: Path) -> bool:
    """A folder at a second place, whole or not at all; whether it is there, for a run that goes on may delete it."""
    if target.exists():
        return True
    try:
        with atomic.new_folder(target) as new:
            locks = shutil.ignore_patterns(".lock")
            shutil.copytree(source, new, copy_function=_linked, ignore=locks, dirs_exist_ok=True)
    except UserError:
        if source.exists():
            raise
    return target.exists()


def _linked(source: str, target: str) -> str:
    """A file at a second place, as a link if they are on one file system that has them: it is never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def is_trained(path: Path) -> bool:
    """Whether a path is that of a run, or of a checkpoint in one, and not of a model."""
    if (path / "config.json").exists():
        return False
    return (path / CONFIG).exists() or (path.parent.name == CHECKPOINTS and path.name.isdecimal())


def find_step(source: Path, called: str) -> Origin:
    """The run and the step that `source`, a run or a checkpoint in it, stands for; messages call it so."""
    if (source / CONFIG).exists():
        step = latest_step(source)
        if step is None:
            raise UserError(f"{called} {source} is a run that has saved no checkpoint yet.")
        return Origin(source, step)
    if source.parent.name == CHECKPOINTS and source.name.isdecimal() and source.is_dir():
        return Origin(source.parent.parent, int(source.name))
    raise UserError(
        f"{called} {source} is neither a run (a folder with {CONFIG}), nor a checkpoint in one "
        f"(RUN/{CHECKPOINTS}/STEP)."
    )
