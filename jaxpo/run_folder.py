"""A run's folder: what lies in it, and whose it is. Nothing that was learnt is overwritten."""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxpo import atomic, config_file, processes
from jaxpo.config import Run
from jaxpo.errors import UserError
from jaxpo.prepare import INIT, STAGES, Parts, weights_of
from jaxpo.seal import seal, unseal
from jaxpo.training.checkpoint import latest_step

CONFIG = "config.yaml"
SUMMARY = "summary.json"
SAMPLES = "samples.json"
EXPORT = "export"
INPUTS = "inputs.json"
# By which several processes see that they have the same folder.
MARK = ".claimed"

# What a resumed run may change: it decides speed, memory, places or what is logged, never what is learnt.
FREE = (
    "output_dir",
    "logging",
    "export",
    "mesh",
    "data.workers",
    "data.cache_dir",
    "reference.cache_dir",
    "model.remat",
    "model.unroll",
    "model.attention",
    "optimizer.offload",
    "training.row_length",
    "training.row_shapes",
    "training.rows_per_device",
    "training.packing",
    "training.share_prompt",
    "training.eval_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.keep_every",
)


@contextmanager
def claim(folder: Path, run: Run) -> Iterator[None]:
    """Hold the run's folder against other processes, and see that what is in it belongs to this run.

    UserError where the file system refuses anything in it, now or in the block.
    """
    with ExitStack() as stack:
        stack.enter_context(usable(folder))
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout:
                raise UserError(
                    f"output_dir {folder} is in use by another jaxpo process; expected a folder of its own."
                ) from None
            check_same_run(folder, run)
            atomic.remove_unfinished(folder)
            atomic.write_text(folder / CONFIG, config_file.dump(run))
        check_shared(folder)
        yield


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """UserError for what the file system refuses in the run's folder, be it full, read-only or gone."""
    try:
        yield
    except OSError as error:
        # Of other files others tell, and stdout has no name.
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else None
        if path is None or not (path.is_relative_to(folder) or folder.is_relative_to(path)):
            raise
        raise UserError(
            f"output_dir {folder} cannot be used: {error}. Once it can be written to, the same command goes on from "
            "what is saved there."
        ) from error


def check_shared(folder: Path) -> None:
    """Raise UserError unless all processes see what the first one writes in the folder."""
    if not processes.several():
        return
    path = folder / MARK

    def written() -> str:
        atomic.write_text(path, text := secrets.token_hex(8))
        return text

    mark = processes.same(written)
    if not path.exists() or path.read_text(encoding="utf-8") != mark:
        raise UserError(
            f"output_dir {folder} is not the same folder for all processes: {processes.name()} does not see what the "
            "first one has written there. Expected a folder that all hosts share."
        )
    processes.wait(f"claim {folder}")
    if processes.is_first():
        path.unlink()


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a small file of a run's folder, None if there is no such file."""
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. Expected a JSON object; move the file away.") from error


def read_samples(folder: Path) -> dict[str, Any]:
    """The samples that a run has made so far, empty before the first. Raises UserError if they were changed since."""
    found = read_object(folder / SAMPLES)
    try:
        return {} if found is None else unseal(found)
    except ValueError as error:
        raise UserError(
            f"{folder / SAMPLES} is damaged: {error}. Put it back as it was, or move the file away to have its answers "
            "made again."
        ) from None


def write_samples(folder: Path, samples: dict[str, Any]) -> None:
    atomic.write_text(folder / SAMPLES, json.dumps(seal(samples), indent=1, ensure_ascii=False))


def check_same_run(folder: Path, run: Run) -> None:
    """Raise UserError if the folder holds something else than this run: nothing that was learnt is overwritten."""
    if not (folder / CONFIG).exists():
        names = sorted(p.name for p in folder.iterdir() if p.name not in (".lock", MARK, INIT, STAGES))
        # A run that was killed while it wrote its config has left the half of it under such a name.
        foreign = [name for name in names if not name.startswith(f".{CONFIG}.")]
        if foreign:
            raise UserError(
                f"output_dir {folder} holds {', '.join(foreign[:4])} but no {CONFIG}, so it is no run of jaxpo; "
                "expected a new or empty folder."
            )
        return
    written = config_file.load(folder / CONFIG)
    if not (folder / SUMMARY).exists() and latest_step(folder) is None:
        # A run that has come to nothing yet, because of a mistake in its config perhaps, may begin anew.
        if config_file.dump(written) != (folder / CONFIG).read_text(encoding="utf-8"):
            raise UserError(
                f"output_dir {folder} holds a {CONFIG} that no run of jaxpo wrote, and it would be overwritten; "
                "expected a new or empty folder."
            )
        return
    if changed := changes(written, run):
        raise UserError(
            f"output_dir {folder} holds a run with another config: {'; '.join(changed)}. Expected the same config, to "
            "go on with that run, or another output_dir."
        )


def changes(written: Run, run: Run) -> list[str]:
    """What a run says otherwise than the one that was written, and may not, each as a sentence."""
    before, now = settings(written), settings(run)
    bound = set(bound_keys(run))
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (key in bound or not is_free(key))
    ]


def is_free(key: str) -> bool:
    """Whether a key is one of FREE, of the run itself or of a stage."""
    key = re.sub(r"^stages\.[^.]+\.", "", key)
    return any(key == free or key.startswith(free + ".") for free in FREE)


def bound_keys(run: Run) -> Iterator[str]:
    """The keys of FREE that decide what this run learns after all: a run that looks at itself does so when they say."""
    for prefix, one in {"": run, **{f"stages.{name}.": stage for name, stage in run.stages.items()}}.items():
        if one.control.max_kl is not None:
            yield f"{prefix}logging.every"
        if one.control.early_stop is not None:
            yield f"{prefix}training.eval_every"


def settings(run: Run) -> dict[str, Any]:
    """A run's keys and values; a path to another stage of the same run is told from where they both lie."""
    found = flat(config_file.as_mapping(run))
    if run.output_dir is not None and run.output_dir.parent.name == STAGES:
        for key in ("model.path", "reference.path"):
            path = found[key]
            if path is not None and Path(path).is_relative_to(run.output_dir.parent):
                found[key] = str(Path(path).relative_to(run.output_dir.parent))
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items())
    return {key: item for part in parts for key, item in part.items()}


def check_same_inputs(folder: Path, parts: Parts, resumed: bool) -> None:
    """Remember in inputs.json what a run starts from; raise UserError if a resumed one started from something else."""
    path = folder / INPUTS
    # Of the first process, all of them hear what the weights are.
    now = inputs(parts)
    if not processes.is_first():
        return
    if resumed and path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}. Move it away to go on without a comparison.") from error
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"output_dir {folder} holds a run that started from other weights or rows, or from the same rows "
                f"tokenised otherwise: {', '.join(changed)} changed since. Expected them as they were, or another "
                "output_dir."
            )
        return
    atomic.write_text(path, json.dumps(now, indent=1))


def inputs(parts: Parts) -> dict[str, str]:
    """Fingerprints of the initial weights, and of every source's token ids, labels and scores, by config key."""
    corpora = {"data.train": parts.train, "data.eval": parts.eval}
    sources = {
        f"{key}.{i}": one
        for key, corpus in corpora.items()
        if corpus is not None
        for i, one in enumerate(corpus.sources)
    }
    return {
        "model": weights_of(parts.run, parts.checkpoint),
        **{key: one.fingerprint for key, one in sources.items()},
        **{f"{key} (labels and scores)": one.judgements for key, one in sources.items()},
    }
