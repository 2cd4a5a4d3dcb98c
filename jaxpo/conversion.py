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
from jaxpo.origin import START, find_step, is_trained
from jaxpo.prepare import INIT, MADE_OF, at_stage, learns_rewards
from jaxpo.run_folder import CONFIG, read_object
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
        start, revision = began_with(run, run_folder)
        checkpoint = read_checkpoint(start, revision, head="score" if learns_rewards(run) else "lm")
        decoder = trained_decoder(run_folder, step, checkpoint, run.model.dtype)
        deliver(run, checkpoint, load_tokenizer(start, revision), decoder, out, dtype)
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
        """What `start` is to be made of, None if of nothing: one answer, for the other run may go on."""
        note = read_object(start / MADE_OF)
        if note is not None and note["path"] == path and latest_step(folder) is not None:
            return note
        if not is_trained(Path(path).expanduser()):
            return None
        source, step = find_step(Path(path).expanduser(), "model.path")
        return {"path": path, "run": str(source.absolute()), "step": step}

    made_of = processes.same(wanted)
    if made_of is None:
        return run
    if run.model.revision is not None:
        raise UserError(f"model.revision has no effect: model.path {path} is a run; leave it out.")
    if processes.same(lambda: read_object(start / MADE_OF)) != made_of:
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
    if run.model.path is None or not is_trained(Path(run.model.path).expanduser()):
        return run
    source, _ = find_step(Path(run.model.path).expanduser(), "model.path")
    path, revision = began_with(config_file.load(source / CONFIG), source)
    return replace(run, model=replace(run.model, path=path, revision=revision))


def began_with(run: Run, folder: Path) -> tuple[str, str | None]:
    """The path and the revision of a model of the config and tokenizer that the run in `folder` trains."""
    if run.model.scratch is not None:
        return str(folder / INIT), None
    note = read_object(folder / START / MADE_OF)
    if note is not None and note["path"] == run.model.path:
        return str(folder / START), None
    model = of_same_shape(run, folder).model
    assert model.path is not None
    return model.path, model.revision


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
