"""Checkpoints from Hugging Face's format to jaxpo's and back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxpo import atomic, config_file, console, processes
from jaxpo.config import MeshConfig, Run
from jaxpo.config_checks import path_problem
from jaxpo.data.tokenizer import load_tokenizer
from jaxpo.delivery import deliver
from jaxpo.errors import UserError
from jaxpo.models import native
from jaxpo.models.checkpoint import SMALL_FILES, Checkpoint, read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder, abstract_decoder
from jaxpo.models.export import export
from jaxpo.origin import START, find_step, is_trained, read_note
from jaxpo.prepare import INIT, MADE_OF, at_stage, learns_rewards
from jaxpo.run_folder import CONFIG
from jaxpo.training.checkpoint import FOLDER as CHECKPOINTS
from jaxpo.training.checkpoint import latest_step, restore_decoder
from jaxpo.training.mesh import Layout, make_mesh


def from_hf(source: str, out: Path) -> None:
    """Make jaxpo's own checkpoint, a folder that model.path may name, of a Hugging Face folder or hub id."""
    check_paths(source, out)
    checkpoint = read_checkpoint(source, head="stored")
    if checkpoint.native:
        raise UserError(f"{source} is in jaxpo's own format already; expected a Hugging Face checkpoint.")
    decoder = load_decoder(checkpoint, checkpoint.stored_dtype, shardings(checkpoint))
    small = [f for pattern in SMALL_FILES for f in sorted(checkpoint.folder.glob(pattern)) if f.is_file()]
    names = [file.relative_to(checkpoint.folder) for file in small if not file.name.endswith(".index.json")]
    native.write(decoder, checkpoint.folder, names, out)
    console.say(f"jaxpo checkpoint         {out}")


def to_hf(source: Path, out: Path, dtype: str | None) -> None:
    """Make a Hugging Face folder of a run (its last checkpoint), of a checkpoint in it, or of jaxpo's own format."""
    check_paths(str(source), out)
    if native.is_native(source) and (source / "config.json").exists():
        checkpoint = read_checkpoint(source, head="stored")
        export(
            load_decoder(checkpoint, checkpoint.stored_dtype, shardings(checkpoint)),
            checkpoint.hf_config,
            out,
            dtype=dtype,
            tokenizer=checkpoint.folder,
            generation_config=checkpoint.generation_config,
        )
    else:
        run_folder, step = find_step(source, "PATH")
        run = config_file.load(run_folder / CONFIG)
        start = (
            str(run_folder / INIT)
            if run.model.scratch is not None
            else started(at_stage(run, run_folder), run_folder).model.path
        )
        assert start is not None
        checkpoint = read_checkpoint(start, run.model.revision, head="score" if learns_rewards(run) else "lm")
        decoder = trained_decoder(run_folder, step, checkpoint, run.model.dtype)
        deliver(run, checkpoint, load_tokenizer(start, run.model.revision), decoder, out, dtype)
    console.say(f"Hugging Face checkpoint  {out}")


def started(run: Run, folder: Path) -> Run:
    """The run with a Hugging Face folder for its model.path, where that names another run, or a checkpoint in one.

    The folder is `folder`/start. It is made once, and again only if the run names other weights now, before the first
    step that is saved; after that nothing else has to be there any more.
    """
    path, start = run.model.path, folder / START
    if path is None:
        return run

    def wanted() -> dict[str, Any] | None:
        """What `start` is to be made of, None if it serves as it is: one answer, for the other run may go on."""
        note = read_note(start / MADE_OF)
        if note is not None and note["path"] == path and latest_step(folder) is not None:
            return None
        source, step = find_step(Path(path).expanduser(), "model.path")
        made_of = {"path": path, "run": str(source.absolute()), "step": step}
        return None if note == made_of else made_of

    if not processes.same(lambda: (start / MADE_OF).exists() or is_trained(Path(path).expanduser())):
        return run
    if run.model.revision is not None:
        raise UserError(f"model.revision has no effect: model.path {path} is a run; leave it out.")
    if (made_of := processes.same(wanted)) is not None:
        if processes.is_first() and start.exists():
            shutil.rmtree(start)
        to_hf(Path(made_of["run"]) / CHECKPOINTS / str(made_of["step"]), start, None)
        if processes.is_first():
            atomic.write_text(start / MADE_OF, json.dumps(made_of))
        processes.wait(f"start {start}")
    return replace(run, model=replace(run.model, path=str(start)))


def of_same_shape(run: Run, folder: Path) -> Run:
    """The run with a model.path of the same config and tokenizer, where that names another run: no weights are made.

    folder: of the whole run, whose stages it may name.
    """
    run = at_stage(run, folder)
    while run.model.path is not None and is_trained(Path(run.model.path).expanduser()):
        source, _ = find_step(Path(run.model.path).expanduser(), "model.path")
        made = next((source / name for name in (INIT, START) if (source / name).exists()), None)
        before = at_stage(config_file.load(source / CONFIG), source)
        path = before.model.path if made is None else str(made)
        run = replace(run, model=replace(run.model, path=path, revision=before.model.revision))
    return run


def check_paths(source: str, out: Path) -> None:
    """Raise UserError for what no file system takes."""
    for name, path in (("PATH", source), ("OUT", str(out))):
        if problem := path_problem(path):
            raise UserError(f"{name} {problem}.")


def trained_decoder(run_folder: Path, step: int, checkpoint: Checkpoint, dtype: str) -> Decoder:
    abstract = abstract_decoder(checkpoint.decoder_config, dtype)
    layout = Layout(make_mesh(MeshConfig()))
    return restore_decoder(run_folder, step, layout.place(checkpoint.decoder_config, abstract))


def shardings(checkpoint: Checkpoint) -> Decoder:
    """Over all devices here: a model may be larger than one of them."""
    layout = Layout(make_mesh(MeshConfig()))
    config = checkpoint.decoder_config
    return jax.tree.map(lambda leaf: leaf.sharding, layout.place(config, abstract_decoder(config, "float32")))
