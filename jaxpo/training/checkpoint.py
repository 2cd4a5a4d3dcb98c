"""Checkpoints through Orbax: written in the background, complete or absent; the last few, the best, milestones kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxpo import processes
from jaxpo.batch import direction
from jaxpo.config import TrainingConfig
from jaxpo.errors import UserError
from jaxpo.models.checksums import check_sums, checksums
from jaxpo.models.decoder import Decoder
from jaxpo.seal import seal, unseal
from jaxpo.training.metrics import Record, finite

FOLDER = "checkpoints"
# Of what lies beside a state, the progress of `training.loop` included.
VERSION = 1


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path: what a checkpoint stores does not depend on our classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def renamed(abstract: Any, leaves: dict[str, Any]) -> Any:
    """The inverse of `named`, for a tree shaped like `abstract`."""
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named(abstract)])


class Beside(NamedTuple):
    """What is written beside a state: the progress, the metrics of steps by their number, the state's checksums."""

    progress: dict[str, Any]
    metrics: dict[str, Record]
    checksums: dict[str, int]


class OtherVersionError(Exception):
    """A checkpoint that was written by another version of jaxpo."""


def as_json(beside: Beside) -> dict[str, Any]:
    """With the version and a checksum of all of it."""
    return seal({"version": VERSION, **beside._asdict()})


def from_json(written: Any) -> Beside:
    """The inverse of `as_json`. Raises ValueError where it is not what was written, OtherVersionError."""
    content = unseal(dict(written))
    if content.pop("version", None) != VERSION:
        raise OtherVersionError
    return Beside(**content)


def reason(error: BaseException) -> str:
    """The first cause of an error in a line, without TensorStore's specs in brackets and without a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [")[0].split()).rstrip(".")
    # TensorStore says where first, and what at the end.
    return (text if len(text) <= 500 else f"{text[:200]} … {text[-250:]}") or type(error).__name__


def unreadable(folder: Path, error: Exception) -> UserError:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"checkpoint {folder} does not fit into memory here: {reason(error)}. It is left as it was.")
    if isinstance(error, OtherVersionError):
        return UserError(
            f"checkpoint {folder} was written by another version of jaxpo, which alone can go on from it. Expected "
            "that version, or another output_dir. It is left as it was."
        )
    return UserError(
        f"checkpoint {folder} cannot be read: {reason(error)}. Expected the state that this run saved there. If the "
        "folder is damaged, delete it and start again: the run goes on from the checkpoint before it."
    )


@dataclass(frozen=True)
class Kept(PreservationPolicy):
    """Which checkpoints stay: the last few of all steps, the best of them, and those at multiples of `every`."""

    last: int
    every: int | None
    best: Callable[[Sequence[int]], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.last :], self.best(steps)}
        return [step in kept or (self.every is not None and step % self.every == 0) for step in steps]


class Told:
    """One of orbax's futures, whose error is told as soon as it is known."""

    def __init__(self, future: Any, tell: Callable[[Exception], None]) -> None:
        self._future = future
        self._tell = tell

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout=timeout)
        except Exception as error:  # orbax raises all kinds, Exception itself among them
            self._tell(error)
            raise


def telling(handler: Any, tell: Callable[[Exception], None]) -> Any:
    """A handler of orbax's that tells what goes wrong in the background.

    Of several processes the one that cannot write would wait for the others, and they for it, until orbax gives up
    after ten minutes.
    """
    save = handler.async_save

    async def async_save(*arguments: Any, **more: Any) -> list[Told]:
        return [Told(future, tell) for future in await save(*arguments, **more) or ()]

    handler.async_save = async_save
    return handler


class Checkpoints:
    """The checkpoints of one run: a training state and a small JSON of progress at each saved step.

    A checkpoint keeps the metrics of its step, of step 0 and of the steps that are kept beside it: which is the best
    is known to whoever has restored one, and by what `learn` is told since.
    """

    def __init__(self, run_folder: Path, config: TrainingConfig) -> None:
        self._folder = (run_folder / FOLDER).absolute()
        self._config = config
        self._metrics: dict[int, Record] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Kept(config.keep_checkpoints, config.keep_every, self._best_of),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        try:
            # Of a file in its place orbax would tell at the first write.
            self._folder.mkdir(parents=True, exist_ok=True)
            handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
            told = {name: telling(handler, self._end_all) for name, handler in handlers.items()}
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=told)
        except Exception as error:  # orbax raises all kinds, Exception itself among them
            raise UserError(
                f"{self._folder} cannot be used for checkpoints: {reason(error)}. Expected a folder that can be "
                "written; what is saved in it is left as it was."
            ) from error

    def latest(self) -> int | None:
        """The last step that is safely on disk."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step whose best_metric is best, the last of those that are equally good."""
        return self._best_of(self._manager.all_steps())

    def learn(self, step: int, metrics: Record) -> None:
        """Metrics of a step, saved or about to be, or 0."""
        self._metrics[step] = self.metrics(step) | finite(metrics)

    def metrics(self, step: int) -> Record:
        """What is known of a step, 0 or one that is kept."""
        return self._metrics.get(step, {})

    def _best_of(self, steps: Sequence[int]) -> int | None:
        metric, mode = self._config.best_metric, self._config.best_mode
        if metric is None:
            return None
        values = {step: value for step in steps if (value := self.metrics(step).get(metric)) is not None}
        return max(values, key=lambda step: (direction(metric, mode) * values[step], step), default=None)

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def save(self, step: int, state: Any, progress: dict[str, Any], metrics: Record) -> None:
        """Start to write a checkpoint; the state may be donated once this returns.

        A step whose `metrics` do not hold the best_metric, for it was not evaluated, is no candidate for the best until
        `learn` tells it.
        """
        self.learn(step, metrics)
        leaves = named(state)
        known = {str(n): self.metrics(n) for n in (0, *self._manager.all_steps(), step)}
        beside = as_json(Beside(progress, known, checksums(leaves)))
        items = ocp.args.Composite(state=ocp.args.StandardSave(leaves), progress=ocp.args.JsonSave(beside))
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state saved at a step, on the shardings of `abstract`, and the progress saved with it."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(named(abstract)), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
            beside = from_json(restored["progress"])
            check_sums(restored["state"], beside.checksums)
        except Exception as error:  # orbax raises all kinds, Exception itself among them
            raise unreadable(self.path(step), error) from error
        self._metrics = {int(n): metrics for n, metrics in beside.metrics.items()}
        return renamed(abstract, restored["state"]), beside.progress

    def wait(self) -> None:
        """Return when all that was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Where an error of writing comes to light, of this checkpoint or of one still written in the background."""
        try:
            yield
        except Exception as error:  # orbax raises all kinds, Exception itself among them
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> UserError:
        # To orbax a step that is still being written is the latest.
        last = latest_step(self._folder.parent)
        there = (
            "No checkpoint was saved yet; the same command begins anew"
            if last is None
            else f"The last good checkpoint is {self.path(last)}; the same command goes on from there"
        )
        return UserError(
            f"a checkpoint in {self._folder} could not be written: {reason(error)}. {there} once the folder can be "
            "written to again."
        )

    def _end_all(self, error: Exception) -> None:
        """Of several processes, end all; alone, the next save tells."""
        processes.fail(str(self._not_written(error)), 2)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            # What ended the run comes first.
            if kind is None:
                raise
        finally:
            self._manager.close()


def steps_of(run_folder: Path) -> list[int]:
    """The steps that a run has saved and kept; nothing is written."""
    folder = run_folder / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder.absolute())) if folder.is_dir() else []


def latest_step(run_folder: Path) -> int | None:
    """The last step that a run has saved, None before the first."""
    return max(steps_of(run_folder), default=None)


def restore_decoder(run_folder: Path, step: int, abstract: Decoder) -> Decoder:
    """The decoder saved at a step, on the shardings of `abstract`; the optimizer's state is not read."""
    folder = (run_folder / FOLDER / str(step)).absolute()
    wanted = {f"decoder.{name}": leaf for name, leaf in named(abstract).items()}
    targets = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), wanted)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=targets, partial_restore=True)
            restored = checkpointer.restore(folder / "state", args=args)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            beside = from_json(checkpointer.restore(folder / "progress"))
        check_sums(restored, beside.checksums)
    except Exception as error:  # orbax raises all kinds, Exception itself among them
        raise unreadable(folder, error) from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])
