"""Checkpoints from Hugging Face's format to jaxpo's and back."""

from pathlib import Path

import jax

from jaxpo import config_file, console
from jaxpo.config import MeshConfig
from jaxpo.config_checks import path_problem
from jaxpo.data.tokenizer import load_tokenizer
from jaxpo.delivery import deliver
from jaxpo.errors import UserError
from jaxpo.models import native
from jaxpo.models.checkpoint import SMALL_FILES, Checkpoint, read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder, abstract_decoder
from jaxpo.models.export import export
from jaxpo.prepare import INIT, at_stage, learns_rewards
from jaxpo.run_folder import CONFIG
from jaxpo.training import checkpoint as training_checkpoint
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
        run_folder, step = find_step(source)
        run = config_file.load(run_folder / CONFIG)
        start = str(run_folder / INIT) if run.model.scratch is not None else at_stage(run, run_folder).model.path
        assert start is not None
        checkpoint = read_checkpoint(start, run.model.revision, head="score" if learns_rewards(run) else "lm")
        decoder = trained_decoder(run_folder, step, checkpoint, run.model.dtype)
        deliver(run, checkpoint, load_tokenizer(start, run.model.revision), decoder, out, dtype)
    console.say(f"Hugging Face checkpoint  {out}")


def check_paths(source: str, out: Path) -> None:
    """Raise UserError for what no file system takes."""
    for name, path in (("PATH", source), ("OUT", str(out))):
        if problem := path_problem(path):
            raise UserError(f"{name} {problem}.")


def find_step(source: Path) -> tuple[Path, int]:
    """The folder of a run and the step that `source`, the run or a checkpoint in it, stands for."""
    if (source / CONFIG).exists():
        step = training_checkpoint.latest_step(source)
        if step is None:
            raise UserError(f"{source} is a run that has saved no checkpoint yet.")
        return source, step
    if source.parent.name == training_checkpoint.FOLDER and source.name.isdecimal() and source.is_dir():
        return source.parent.parent, int(source.name)
    raise UserError(
        f"{source} is neither a run (a folder with {CONFIG}), nor a checkpoint in one "
        f"(RUN/{training_checkpoint.FOLDER}/STEP), nor a checkpoint that `convert from-hf` made."
    )


def trained_decoder(run_folder: Path, step: int, checkpoint: Checkpoint, dtype: str) -> Decoder:
    abstract = abstract_decoder(checkpoint.decoder_config, dtype)
    layout = Layout(make_mesh(MeshConfig()))
    return training_checkpoint.restore_decoder(run_folder, step, layout.place(checkpoint.decoder_config, abstract))


def shardings(checkpoint: Checkpoint) -> Decoder:
    """Over all devices here: a model may be larger than one of them."""
    layout = Layout(make_mesh(MeshConfig()))
    config = checkpoint.decoder_config
    return jax.tree.map(lambda leaf: leaf.sharding, layout.place(config, abstract_decoder(config, "float32")))
