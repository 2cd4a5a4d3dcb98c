"""Checkpoints: bit-exact, on any mesh, the last few and the best kept, damage told and never trained on."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxpo import processes
from jaxpo.config import MeshConfig, OptimizerConfig, TrainingConfig
from jaxpo.errors import UserError
from jaxpo.models.checksums import checksum
from jaxpo.models.decoder import Decoder, abstract_decoder
from jaxpo.seal import seal
from jaxpo.training.checkpoint import FOLDER, Checkpoints, latest_step, restore_decoder
from jaxpo.training.loop import Progress
from jaxpo.training.mesh import Layout, make_mesh
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState


def layout(data: int, fsdp: int, tensor: int) -> Layout:
    return Layout(make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor)))


def abstract_state(at: Layout, decoder: Decoder) -> TrainState:
    shapes = abstract_decoder(decoder.config, jnp.float32)
    optimizer = make_optimizer(OptimizerConfig(), decoder.config, 10, 1.0)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    carry = {"beta_scale": scalar, "reward_shift/chosen/mean": scalar}
    state = TrainState(step, shapes, jax.eval_shape(optimizer.init, shapes), carry)
    return at.place(decoder.config, state)


@pytest.fixture(scope="module")
def abstract(small_decoder: Decoder) -> TrainState:
    return abstract_state(layout(2, 2, 2), small_decoder)


@pytest.fixture(scope="module")
def state(abstract: TrainState) -> TrainState:
    """Random numbers everywhere, odd ones among them, on a mesh of (2, 2, 2)."""
    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-30, 30, leaf.shape)
        values = np.asarray(values if leaf.dtype == jnp.float32 else 7, leaf.dtype)
        if values.size > 4:
            values.flat[:4] = [-0.0, np.float32(1e-45), np.inf, np.nan]
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(random, abstract)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def same_places(a: Any, wanted: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(wanted), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


def save(folder: Path, state: Any, steps: dict[int, dict[str, Any]], **config: Any) -> None:
    with Checkpoints(folder, TrainingConfig(**config)) as checkpoints:
        for step, metrics in steps.items():
            checkpoints.save(step, state, asdict(Progress(examples=step)), metrics)


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / FOLDER).iterdir() if p.name.isdecimal())


def test_a_state_comes_back_bit_for_bit_on_its_mesh_and_on_another(
    tmp_path: Path, state: TrainState, abstract: TrainState, small_decoder: Decoder
) -> None:
    progress = Progress(examples=24, tokens=999, seconds={"train": 0.1 + 0.2}, window={"loss": [1 / 3, 7.0]})
    with Checkpoints(tmp_path, TrainingConfig()) as checkpoints:
        checkpoints.save(3, state, asdict(progress), {})
        checkpoints.wait()
        assert checkpoints.latest() == 3
    for wanted in (
        abstract,
        abstract_state(layout(1, 8, 1), small_decoder),
        abstract_state(layout(8, 1, 1), small_decoder),
    ):
        with Checkpoints(tmp_path, TrainingConfig()) as checkpoints:
            restored, saved = checkpoints.restore(3, wanted)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert same_bits(restored, state)
        assert same_places(restored, wanted)
        assert Progress(**saved) == progress


def test_the_decoder_comes_back_alone(tmp_path: Path, state: TrainState, small_decoder: Decoder) -> None:
    save(tmp_path, state, {5: {}})
    wanted = abstract_state(layout(1, 8, 1), small_decoder).decoder
    restored = restore_decoder(tmp_path, 5, wanted)
    assert same_bits(restored, state.decoder)
    assert same_places(restored, wanted)


SMALL = {"x": jnp.arange(6.0), "n": jnp.int32(3)}


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    save(tmp_path, SMALL, {n: {} for n in (8, 9, 10, 11, 100)}, keep_checkpoints=3)
    assert steps_on_disk(tmp_path) == [10, 11, 100]
    assert latest_step(tmp_path) == 100


def test_milestones_are_kept_for_good(tmp_path: Path) -> None:
    save(tmp_path, SMALL, {n: {} for n in (2, 4, 6, 8, 10, 12, 13)}, keep_checkpoints=1, keep_every=4)
    assert steps_on_disk(tmp_path) == [4, 8, 12, 13]


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_the_best_is_kept_besides(tmp_path: Path, mode: str, best: int) -> None:
    """Steps without the metric, or with one that is not finite, are no candidates."""
    accuracies = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.6, 5: None, 6: np.nan, 7: 0.7}
    steps: dict[int, dict[str, Any]]
    steps = {n: {"loss": 1.0} if a is None else {"loss": 1.0, "eval_accuracy": a} for n, a in accuracies.items()}
    config = {"keep_checkpoints": 2, "best_metric": "eval_accuracy", "best_mode": mode}
    save(tmp_path, SMALL, steps, **config)
    assert steps_on_disk(tmp_path) == [best, 6, 7]
    with Checkpoints(tmp_path, TrainingConfig(**config)) as checkpoints:
        assert checkpoints.latest() == 7
        checkpoints.restore(7, SMALL)
        assert checkpoints.best() == best
        assert checkpoints.metrics(best) == steps[best]
        checkpoints.save(8, SMALL, {}, {})
        assert checkpoints.best() == best
        checkpoints.learn(8, {"eval_accuracy": 0.95 if mode == "max" else 0.1})
        assert checkpoints.best() == 8


def test_what_is_learnt_after_a_save_is_kept_with_the_next(tmp_path: Path) -> None:
    """SIGTERM leaves an evaluation out, and the resumed run makes up for it."""
    config = TrainingConfig(best_metric="eval_loss", keep_checkpoints=1)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.learn(0, {"eval_loss": 0.7})
        checkpoints.save(4, SMALL, {}, {"loss": 0.6})
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.restore(4, SMALL)
        assert checkpoints.best() is None
        checkpoints.learn(4, {"eval_loss": 0.1})
        checkpoints.save(6, SMALL, {}, {"eval_loss": 0.3})
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.restore(6, SMALL)
        assert checkpoints.best() == 4
        assert [checkpoints.metrics(n) for n in (0, 4)] == [{"eval_loss": 0.7}, {"loss": 0.6, "eval_loss": 0.1}]
        checkpoints.save(8, SMALL, {}, {"eval_loss": 0.2})
    assert steps_on_disk(tmp_path) == [4, 8]


def test_a_checkpoint_of_another_version_is_told(tmp_path: Path) -> None:
    save(tmp_path, SMALL, {5: {}})
    path = tmp_path / FOLDER / "5" / "progress" / "metadata"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(seal({"progress": written["progress"], "checksums": written["checksums"]})))
    with (
        Checkpoints(tmp_path, TrainingConfig()) as checkpoints,
        pytest.raises(UserError, match="5 was written by another version of jaxpo"),
    ):
        checkpoints.restore(5, SMALL)


def test_of_equally_good_steps_the_last_is_the_best(tmp_path: Path) -> None:
    config = {"best_metric": "eval_accuracy", "keep_checkpoints": 1}
    save(tmp_path, SMALL, {1: {"eval_accuracy": 0.5}, 2: {"eval_accuracy": 0.5}, 3: {"eval_accuracy": 0.4}}, **config)
    assert steps_on_disk(tmp_path) == [2, 3]


def test_of_a_loss_the_least_is_the_best(tmp_path: Path) -> None:
    config = {"best_metric": "eval_loss", "keep_checkpoints": 1}
    save(tmp_path, SMALL, {1: {"eval_loss": 0.5}, 2: {"eval_loss": 0.3}, 3: {"eval_loss": 0.4}}, **config)
    assert steps_on_disk(tmp_path) == [2, 3]


def test_what_lies_on_the_host_comes_back_to_the_host(tmp_path: Path) -> None:
    """A moving reference's tables, beside arrays on devices."""
    table = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    save(tmp_path, {**SMALL, "reference": {"train": table, "eval": None}}, {1: {}})
    wanted = {
        "x": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=SMALL["x"].sharding),
        "n": jax.ShapeDtypeStruct((), jnp.int32, sharding=SMALL["n"].sharding),
        "reference": {"train": np.empty_like(table), "eval": None},
    }
    with Checkpoints(tmp_path, TrainingConfig()) as checkpoints:
        restored, _ = checkpoints.restore(1, wanted)
    assert isinstance(restored["reference"]["train"], np.ndarray)
    np.testing.assert_array_equal(restored["reference"]["train"], table)
    assert restored["reference"]["eval"] is None


def test_before_the_first_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    with Checkpoints(tmp_path, TrainingConfig()) as checkpoints:
        assert checkpoints.latest() is None
    assert latest_step(tmp_path) is None


def test_a_checkpoint_that_was_cut_off_by_a_kill_does_not_count(tmp_path: Path) -> None:
    """Orbax writes under another name and renames at the end; what a kill leaves behind is cleared away."""
    save(tmp_path, SMALL, {1: {}})
    left = tmp_path / FOLDER / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / FOLDER / "1", left)
    (left / "commit_success.txt").unlink(missing_ok=True)
    assert latest_step(tmp_path) == 1
    with Checkpoints(tmp_path, TrainingConfig()) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, SMALL, {}, {})
        checkpoints.wait()
    assert steps_on_disk(tmp_path) == [1, 2]
    assert not left.exists()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_a_checksum_sees_any_flipped_bit_and_any_exchange(dtype: Any) -> None:
    values = np.asarray(np.random.default_rng(0).normal(size=(3, 5)) * 100, dtype)
    expected = int(checksum(jnp.asarray(values)))
    raw = np.frombuffer(values.tobytes(), np.uint8)
    for bit in range(raw.size * 8):
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        assert int(checksum(jnp.asarray(np.frombuffer(flipped.tobytes(), dtype).reshape(3, 5)))) != expected
    assert int(checksum(jnp.asarray(values[::-1]))) != expected
    assert int(checksum(jnp.asarray(np.roll(values, 1, axis=1)))) != expected


def test_a_checksum_does_not_depend_on_the_sharding() -> None:
    at = layout(2, 2, 2)
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    whole, split = (
        jax.device_put(values, at.replicated),
        jax.device_put(values, at.parameter((16, 8), ("vocab", "embed"))),
    )
    assert int(jax.jit(checksum)(split)) == int(jax.jit(checksum)(whole)) == int(checksum(jnp.asarray(values)))


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What damaged_checkpoints.py found, by the kind of damage."""
    script = Path(__file__).with_name("damaged_checkpoints.py")
    folder = tmp_path_factory.mktemp("damage")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["missing", "cut", "0.2", "0.5", "0.8"])
def test_damage_is_an_error_that_names_the_checkpoint_or_does_no_harm(damage: dict[str, Any], how: str) -> None:
    """Every file of a checkpoint in turn; at least those of the weights and of the progress must be missed."""
    told = {path: text for path, text in damage[how].items() if text is not None}
    for path, text in told.items():
        assert text.startswith("checkpoint RUN/checkpoints/2 cannot be read: "), (path, text)
        assert "\n" not in text
    assert "progress/metadata" in told
    assert any(path.startswith("state/") and "/d/" in path for path in told)


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(damage: dict[str, Any]) -> None:
    text = damage["full disk"]["text"]
    assert text.startswith("a checkpoint in RUN/checkpoints could not be written: ")
    assert "File too large" in text
    assert "The last good checkpoint is RUN/checkpoints/1;" in text
    assert damage["full disk"]["latest"] == 1


def test_a_changed_weight_is_told_when_the_decoder_is_read_alone(
    tmp_path: Path, state: TrainState, small_decoder: Decoder
) -> None:
    save(tmp_path, state, {5: {}})
    wanted = abstract_state(layout(1, 8, 1), small_decoder).decoder
    path = tmp_path / FOLDER / "5" / "progress" / "metadata"
    progress = json.loads(path.read_text())
    progress["checksums"]["decoder.embedding.value"] ^= 1
    path.write_text(json.dumps(seal({name: value for name, value in progress.items() if name != "crc32"})))
    with pytest.raises(UserError, match=f"{tmp_path / FOLDER / '5'} cannot be read: decoder.embedding.value changed"):
        restore_decoder(tmp_path, 5, wanted)


def test_a_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, SMALL, {1: {}})
    with Checkpoints(tmp_path, TrainingConfig()) as checkpoints, pytest.raises(UserError, match="cannot be read"):
        checkpoints.restore(1, {"x": jax.ShapeDtypeStruct((6,), jnp.float32)})


def test_all_processes_end_as_soon_as_one_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told from the background: in the foreground they would wait for each other before."""
    found = []

    class NoSpace:
        def result(self, timeout: float | None = None) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def fails(*_: Any, **__: Any) -> list[NoSpace]:
        return [NoSpace()]

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", fails)
    monkeypatch.setattr(processes, "fail", lambda text, code: found.append((text, code)))
    with Checkpoints(tmp_path, TrainingConfig()) as checkpoints:
        checkpoints.save(3, SMALL, {}, {})
        with pytest.raises(UserError, match="No space left on device") as told:
            checkpoints.wait()
    assert found == [(str(told.value), 2)]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FOLDER).touch()
    with pytest.raises(UserError, match=f"{tmp_path / FOLDER} cannot be used for checkpoints: "):
        Checkpoints(tmp_path, TrainingConfig())
