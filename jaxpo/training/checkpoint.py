"""Checkpoints through Orbax: written in the background, complete or absent, the last few and the best kept."""

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxpo.config import TrainingConfig
from jaxpo.errors import UserError
from jaxpo.models.decoder import Decoder

FOLDER = "checkpoints"


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path: what a checkpoint stores does not depend on our classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def renamed(abstract: Any, leaves: dict[str, Any]) -> Any:
    """The inverse of `named`, for a tree shaped like `abstract`."""
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named(abstract)])


class Checkpoints:
    """The checkpoints of one run: a training state and a small JSON of progress at each saved step."""

    def __init__(self, run_folder: Path, config: TrainingConfig) -> None:
        self._folder = (run_folder / FOLDER).absolute()
        self._best_metric = best_metric = config.best_metric
        policies: list[Any] = [LatestN(n=config.keep_checkpoints)]
        if best_metric is not None:
            # Sorted by the metric, the last one is the best.
            down = config.best_mode == "min"
            policies.append(BestN(lambda m: m[best_metric], down, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            best_fn=None if best_metric is None else lambda metrics: metrics[best_metric],
            best_mode=config.best_mode,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "progress"))

    def latest(self) -> int | None:
        """The last step that is safely on disk."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step whose best_metric is best."""
        return self._manager.best_step()

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def save(self, step: int, state: Any, progress: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Start to write a checkpoint; the state may be donated once this returns.

        A step whose `metrics` do not hold the best_metric, for it was not evaluated, is no candidate for the best.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(named(state)), progress=ocp.args.JsonSave(progress))
        value = metrics.get(self._best_metric) if self._best_metric is not None else None
        ranked = {self._best_metric: value} if value is not None and math.isfinite(value) else None
        try:
            self._manager.save(step, args=items, metrics=ranked, force=True)
        except OSError as error:
            raise UserError(f"checkpoint {self.path(step)} could not be written: {error}.") from error

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state saved at a step, on the shardings of `abstract`, and the progress saved with it."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(named(abstract)), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {self.path(step)} cannot be read: {str(error).splitlines()[0]} Expected the state that this "
                "run saved there. If the folder is damaged, delete it and start again: the run goes on from the "
                "checkpoint before it."
            ) from error
        return renamed(abstract, restored["state"]), restored["progress"]

    def wait(self) -> None:
        """Return when all that was saved is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()


def latest_step(run_folder: Path) -> int | None:
    """The last step that a run has saved; nothing is written."""
    folder = run_folder / FOLDER
    return ocp.utils.checkpoint_steps(folder.absolute())[-1] if folder.is_dir() else None


def restore_decoder(run_folder: Path, step: int, abstract: Decoder) -> Decoder:
    """The decoder saved at a step, on the shardings of `abstract`; the optimizer's state is not read."""
    folder = (run_folder / FOLDER / str(step) / "state").absolute()
    wanted = {f"decoder.{name}": leaf for name, leaf in named(abstract).items()}
    targets = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), wanted)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=targets, partial_restore=True)
            restored = checkpointer.restore(folder, args=args)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder.parent} cannot be read: {str(error).splitlines()[0]}") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])
