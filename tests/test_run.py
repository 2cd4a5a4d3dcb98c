"""The course of whole runs on a tiny model: what a run leaves behind, when it goes on, when it refuses."""

import errno
import gc
import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from jaxpo import config_file, conversion, launch, origin, run
from jaxpo.config import Run
from jaxpo.data.templates import TEMPLATES
from jaxpo.errors import UserError
from jaxpo.evaluation import plots, report
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.training import loop
from jaxpo.training.checkpoint import Checkpoints
from jaxpo.training.control import Control
from jaxpo.training.loop import Ended, Loop
from jaxpo.training.moving_reference import Reference
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState

Train = Callable[..., Path]


@pytest.fixture
def configured(tiny: Path, tmp_path: Path) -> Callable[..., Run]:
    """`configured(kind, *changes)`: the tiny config of a kind, whose run is to be in tmp_path/run."""

    def make(kind: str, *changes: str) -> Run:
        return config_file.load(tiny / f"{kind}.yaml", [f"output_dir={tmp_path}/run", *changes])

    return make


@pytest.fixture
def train(configured: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Train:
    """`train(kind, *changes)`: the run, without its plots, which take longer than everything else."""
    monkeypatch.setattr(plots, "write", lambda records, folder: None)
    return lambda kind, *changes: run.train(configured(kind, *changes))


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished DPO run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    # Its own table: another test may have filled that of `tiny`.
    places = [f"output_dir={folder / 'run'}", f"reference.cache_dir={folder / 'reference'}"]
    return run.train(config_file.load(tiny / "dpo.yaml", [*places, *SAMPLES]))


SAMPLES = ("samples.prompts=2", "samples.max_new_tokens=4")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "export" / "model.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    assert (a / "export" / "model.safetensors").read_bytes() == (b / "export" / "model.safetensors").read_bytes()


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM comes while the at-th step of the next run is computed."""
    open_step, calls = loop.OpenStep, [0]

    def counting(*fields: Any) -> loop.OpenStep:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return open_step(*fields)

    monkeypatch.setattr(loop, "OpenStep", counting)


def stop(train: Train, at: int, *changes: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, at)
        with pytest.raises(SystemExit) as caught:
            train("dpo", *changes)
    assert caught.value.code == 143


# What a run leaves behind


def test_the_folder_of_a_finished_run(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "plots", "export", "dropped.jsonl"}
    assert list((finished / "plots").glob("*.png"))
    assert not list(finished.rglob("*.partial"))
    assert [record["step"] for record in records(finished)] == [0, 1, 2, 3, 4, 5, 6]
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"2", "4", "6"}
    samples = json.loads((finished / "samples.json").read_text())
    assert samples.keys() == {"prompts", "before", "after", "crc32"}
    assert all(len(samples[name]) == 2 for name in ("prompts", "before", "after"))


def test_the_summary(finished: Path):
    found = summary(finished)
    assert found["reference"] == {"computed": 192, "reused": 0}
    assert (found["steps"], found["examples"], found["exported_step"]) == (6, 48, 6)
    assert found["dropped"] == {}
    assert 0.0 < found["padding_fraction"] < 1.0
    assert found["pairs_per_s"] > 0.0
    assert found["tokens_per_s"] > found["pairs_per_s"]
    assert found["peak_bytes"] > 1e7
    assert all(seconds >= 0.0 for seconds in found["seconds"].values())
    assert found["seconds"].keys() >= {"data", "load", "reference", "train", "evaluate", "checkpoint", "export"}
    lines = records(finished)
    for when, line in (("before", lines[0]), ("after", lines[-1])):
        assert found[when] == {name: value for name, value in line.items() if name.startswith("eval_")}
        assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_kl/chosen"} <= found[when].keys()
    assert abs(found["before"]["eval_loss"] - math.log(2)) < 1e-5
    assert found["after"]["eval_loss"] < 0.5


def test_the_written_config_reproduces_the_run(finished: Path, tmp_path: Path):
    out = run.train(config_file.load(finished / "config.yaml", [f"output_dir={tmp_path}/again"]))
    assert_equal_weights(out, finished)
    assert [r.get("loss") for r in records(out)] == [r.get("loss") for r in records(finished)]
    assert summary(out)["reference"] == {"computed": 0, "reused": 192}


def test_dropped_rows_are_listed_and_data_that_end_early_are_told(
    train: Train, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    rows = (tiny / "dpo.jsonl").read_text().splitlines()[:9]
    equal = json.loads(rows[3])
    equal["rejected"] = equal["chosen"]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:3], json.dumps(equal), *rows[4:]]) + "\n")
    out = train("dpo", f"data.train=[{{path: {tmp_path}/rows.jsonl}}]", "training.eval_every=null")
    assert "training.num_epochs 1 is over after 1 steps, before training.max_steps 6" in capfd.readouterr().out
    assert summary(out)["dropped"] == {"equal_answers": 1}
    (line,) = map(json.loads, (out / "dropped.jsonl").read_text().splitlines())
    assert line["where"].endswith("rows.jsonl:4")


def test_without_evaluation(train: Train):
    out = train("dpo", "data.eval=[]", "training.eval_every=null", "training.max_steps=2", *SAMPLES)
    found = summary(out)
    assert (found["before"], found["after"]) == ({}, {})
    assert found["reference"]["computed"] + found["reference"]["reused"] == 160
    assert [record["step"] for record in records(out)] == [1, 2]
    assert len(json.loads((out / "samples.json").read_text())["after"]) == 2


def test_the_export_speaks_the_format_it_was_trained_in(train: Train, tiny: Path):
    out = train("dpo", "data.chat_template=zephyr", "training.max_steps=1")
    assert (out / "export/chat_template.jinja").read_text(encoding="utf-8") == TEMPLATES["zephyr"].source
    assert (tiny / "llama/chat_template.jinja").read_text(encoding="utf-8") == TEMPLATES["chatml"].source


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_ipo(normalize: str, train: Train):
    objective = f"objective={{name: ipo, normalize: {normalize}}}"
    out = train("dpo", objective, "training.max_steps=3", "optimizer.learning_rate=1.0e-3")
    before, after = summary(out)["before"], summary(out)["after"]
    assert before["eval_loss"] == pytest.approx(1 / (2 * 0.1) ** 2, abs=1e-3)
    assert after["eval_loss"] < before["eval_loss"]


def test_sft(train: Train):
    out = train("sft")
    found = summary(out)
    assert found["reference"] == {"computed": 0, "reused": 0}
    assert found["after"]["eval_loss"] < found["before"]["eval_loss"] - 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_compute(dtype: str, train: Train, tiny: Path, finished: Path):
    out = train("dpo", "model.compute_dtype=bfloat16", f"model.dtype={dtype}", "export.dtype=bfloat16")
    assert {array.dtype for array in weights(out).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((out / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    found = summary(out)
    assert abs(found["before"]["eval_loss"] - math.log(2)) < 1e-5
    assert found["after"]["eval_loss"] == pytest.approx(summary(finished)["after"]["eval_loss"], rel=0.5)


def test_stages_in_order(train: Train, tiny: Path, tmp_path: Path):
    """A model from scratch, by SFT, then by DPO from where that ended; again is nothing to do."""
    scratch = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    scratch |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    stage = {
        "model": {"scratch": {"architecture": scratch, "tokenizer": {"vocab_size": 300}}, "compute_dtype": "float32"},
        "data": {"train": [{"path": f"{tiny}/sft.jsonl"}], "max_length": 192, "cache_dir": f"{tiny}/data"},
        "objective": {"name": "sft"},
        "training": {"batch_size": 8, "row_length": 192, "max_steps": 2},
        "optimizer": {"learning_rate": 0.01},
        "samples": {"prompts": 0},
    }
    changes = [f"stages={json.dumps({'sft': stage})}", "model.path=stage:sft", "data.max_length=192"]
    out = train("dpo", *changes, "training.max_steps=2")
    first = load_file(out / "stages" / "sft" / "export" / "model.safetensors")
    assert summary(out / "stages" / "sft")["objective"] == "sft"
    assert weights(out).keys() == first.keys()
    assert not np.array_equal(weights(out)["model.norm.weight"], first["model.norm.weight"])
    assert (out / "stages" / "sft" / "init" / "tokenizer.json").exists()
    before = content(out)
    train("dpo", *changes, "training.max_steps=2")
    assert content(out) == before

    again = run.train(config_file.load(out / "config.yaml", [f"output_dir={tmp_path}/again"]))
    assert_equal_weights(again, out)


def test_one_stage_in_bfloat16_decides_the_kernels_of_all(
    train: Train, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr(run.compiler, "set_up", asked.append)
    monkeypatch.setattr(run, "train_one", lambda *_: None)
    monkeypatch.setattr(run, "at_stage", lambda one, folder: one)
    data, scratch = {"train": [{"path": f"{tiny}/sft.jsonl"}]}, {"architecture": {"model_type": "llama"}}
    for of_stage, of_run in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")):
        stage = {"model": {"scratch": scratch, "compute_dtype": of_stage}, "data": data, "objective": {"name": "sft"}}
        changes = (f"model.compute_dtype={of_run}", f"output_dir={tmp_path}/{of_stage}-{of_run}")
        train("dpo", f"stages={json.dumps({'sft': stage})}", "model.path=stage:sft", *changes)
    assert asked == ["bfloat16", "bfloat16", "float32"]


# Where a run begins


def test_a_run_goes_on_from_a_checkpoint_of_another_one(
    finished: Path, train: Train, configured: Callable[..., Run], tmp_path: Path
):
    before = content(finished)
    config = configured("dpo", *SAMPLES, "training.row_length=512")
    out = run.train(config, resume=str(finished / "checkpoints" / "4"))
    # Those before it may hold the best, and are kept as the others are.
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"2", "4", "6"}
    ours, theirs = records(out), records(finished)
    # Up to that step the lines are theirs, to the second.
    assert ours[:5] == theirs[:5]
    for mine, other in zip(ours[5:], theirs[5:], strict=True):
        assert mine["step"] == other["step"]
        assert mine.get("loss") == pytest.approx(other.get("loss"), rel=1e-5)
    mine, other = weights(out), weights(finished)
    for name, tensor in other.items():
        np.testing.assert_allclose(mine[name], tensor, rtol=1e-4, atol=1e-6)
    assert json.loads((out / "samples.json").read_text())["before"] is not None
    assert content(finished) == before


def test_a_run_that_was_brought_elsewhere_goes_on_there(finished: Path, train: Train, configured: Callable[..., Run]):
    """The same command after a kill: what it has saved since counts, not what it came from."""
    config = configured("dpo", *SAMPLES)
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, 1)
        with pytest.raises(SystemExit):
            run.train(config, resume=str(finished / "checkpoints" / "2"))
    place = run.place_of(config)
    assert {path.name for path in (place / "checkpoints").iterdir()} == {"2", "3"}
    with pytest.raises(UserError, match=r"--resume is .*/4, but output_dir .* holds a run of its own at step 3"):
        run.train(config, resume=str(finished / "checkpoints" / "4"))
    # It needs its origin no more.
    told = json.loads((place / "resumed_from.json").read_text())
    (place / "resumed_from.json").write_text(json.dumps({**told, "run": str(place / "gone")}))
    assert_equal_weights(run.train(config, resume=str(finished / "checkpoints" / "2")), finished)


def test_the_best_of_another_run_comes_along(train: Train, configured: Callable[..., Run], tmp_path: Path):
    changes = [
        "training.best_metric=eval_kl/abs",  # the distance grows: the first evaluation after a step is the best
        "training.eval_every=2",
        "training.save_every=5",
        "training.keep_checkpoints=2",
        "export.checkpoint=best",
    ]
    first = train("dpo", *changes)
    assert {path.name for path in (first / "checkpoints").iterdir()} == {"2", "5", "6"}
    config = configured("dpo", *changes, f"output_dir={tmp_path}/second")
    out = run.train(config, resume=str(first / "checkpoints" / "5"))
    assert summary(out)["exported_step"] == 2
    assert_equal_weights(out, first)


def test_what_is_brought_is_there_whole_or_is_brought_again(
    finished: Path, train: Train, configured: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    """Killed before the checkpoint is there, and after."""
    config, wanted = configured("dpo", *SAMPLES), str(finished / "checkpoints" / "4")
    bring, seen = origin._bring, []

    def killed(source: Path, target: Path) -> bool:
        seen.append(target.name)
        if len(seen) in (4, 9):
            raise KeyboardInterrupt
        return bring(source, target)

    monkeypatch.setattr(origin, "_bring", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.train(config, resume=wanted)
        assert not json.loads((run.place_of(config) / "resumed_from.json").read_text())["complete"]
    monkeypatch.setattr(origin, "_bring", bring)
    assert_equal_weights(run.train(config, resume=wanted), finished)


def test_a_checkpoint_that_is_gone_meanwhile_is_told(finished: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    shutil.rmtree(source / "checkpoints" / "4")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"the checkpoint of step 4 in .*/source is gone"):
        origin.adopt(origin.Origin(source, 4), str(source), tmp_path / "run")


def test_a_run_that_is_never_to_go_on(finished: Path, train: Train, configured: Callable[..., Run]):
    stop(train, 2)
    with pytest.raises(UserError, match=r"--resume is never, but output_dir .*/run holds a run of its own at step 2"):
        run.train(configured("dpo"), resume="never")
    stage = {"model": {"path": "x"}, "data": {"train": [{"path": "y"}]}, "objective": {"name": "sft"}}
    config = configured("dpo", f"stages={json.dumps({'sft': stage})}", f"output_dir={finished.parent}/staged")
    done = finished.parent / "staged" / "stages" / "sft"
    done.mkdir(parents=True)
    (done / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="holds the stage sft"):
        run.train(config, resume="never")


def test_what_a_run_cannot_go_on_from(finished: Path, train: Train, configured: Callable[..., Run], tmp_path: Path):
    for given, message in (
        (str(tmp_path / "nothing"), r"--resume .*/nothing is neither a run .* nor a checkpoint in one"),
        (f"{finished}/checkpoints/5", "is neither a run"),
        (f"{finished}/config.yaml", "is neither a run"),
        ("", "--resume is empty"),
        ("gs://bucket/run", '--resume is "gs://bucket/run", an address'),
        ("~nobody-here/run", "the home of a user whom"),
        ("x" * 300, "too long for the name of a file"),
    ):
        with pytest.raises(UserError, match=message):
            run.train(configured("dpo", *SAMPLES), resume=given)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError) as caught:
        run.train(configured("dpo", *SAMPLES, "optimizer.learning_rate=1.0e-3"), resume=str(finished))
    assert "optimizer.learning_rate was 0.01 and is 0.001" in str(caught.value)
    assert f"model.path={finished}/checkpoints/6 begins a new one with its weights" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_begins_with_the_weights_of_another_one(finished: Path, train: Train, tmp_path: Path):
    """Of the weights alone: steps, moments and data begin anew."""
    conversion.to_hf(finished / "checkpoints" / "4", tmp_path / "weights", None)
    wanted = train("dpo", f"model.path={tmp_path}/weights", f"output_dir={tmp_path}/wanted")
    out = train("dpo", f"model.path={finished}/checkpoints/4")
    assert summary(out)["steps"] == 6
    assert_equal_weights(out, wanted)
    # What came of it is converted as any other run's, and the whole run stands for its last checkpoint.
    conversion.to_hf(out, tmp_path / "again", None)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        out / "export" / "model.safetensors"
    ).read_bytes()
    last = train("dpo", f"model.path={finished}", f"output_dir={tmp_path}/last", "training.max_steps=1")
    assert load_file(last / "start" / "model.safetensors").keys() == weights(finished).keys()
    assert (last / "start" / "model.safetensors").read_bytes() == (
        finished / "export" / "model.safetensors"
    ).read_bytes()


# Checkpoints and the best of them


def test_the_best_checkpoint_is_kept_and_exported(train: Train, configured: Callable[..., Run]):
    changes = [
        "training.best_metric=eval_kl/abs",  # the distance grows: the first evaluation after a step is the best
        "training.eval_every=2",
        "training.save_every=3",
        "training.keep_checkpoints=1",
        "export.checkpoint=best",
    ]
    out = train("dpo", *changes)
    found = summary(out)
    assert found["exported_step"] == 2
    assert found["steps"] == 6
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"2", "6"}
    lines = {record["step"]: record for record in records(out)}
    assert found["after"] == {name: value for name, value in lines[2].items() if name.startswith("eval_")}

    config = configured("dpo", *changes)
    parts = run.prepare(config, out)
    optimizer = make_optimizer(config.optimizer, parts.checkpoint.decoder_config, 6, config.training.max_grad_norm)
    abstract = run.abstract_state(config, parts.checkpoint.decoder_config, parts.layout, optimizer, Control())
    with Checkpoints(out, config.training) as checkpoints:
        state, _ = checkpoints.restore(2, abstract)
    exported = load_decoder(read_checkpoint(str(out / "export"), None), "float32", None)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(exported), jax.device_get(state.decoder))


def test_a_best_metric_that_no_evaluation_gives(train: Train):
    with pytest.raises(UserError, match=r"best_metric is 'eval_reward'.*eval_rewards/accuracies"):
        train("dpo", "training.best_metric=eval_reward", "training.best_mode=max")


def test_only_the_last_checkpoints_are_kept(train: Train):
    out = train("dpo", "training.save_every=1", "training.keep_checkpoints=2", "training.max_steps=4")
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"3", "4"}


def test_a_loss_that_is_not_finite_stops_the_run(train: Train, tmp_path: Path, tiny: Path):
    rows = "optimizer.learning_rate=1.0e+30"
    with pytest.raises(UserError) as caught:
        train("dpo", rows, "training.save_every=1", "training.max_grad_norm=null", "optimizer.warmup_ratio=0.0")
    text = str(caught.value)
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert (found["step"], found["update_norm"]) == (1, "inf")
    assert "step 1 gave a loss of 0.69" in text
    assert "an update of norm inf" in text
    assert "dpo.jsonl:" in text
    assert "No checkpoint was saved yet" in text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(found["examples"]) == 8
    assert not (tmp_path / "run" / "summary.json").exists()


# A run's control of itself


def learnt(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what the clock has written."""
    return {name: value for name, value in line.items() if not name.endswith("_per_s")}


FAR = ("control.max_kl=1", "training.save_every=null", "training.eval_every=null")


def test_a_run_that_strays_too_far_ends_there(
    train: Train, configured: Callable[..., Run], capfd: pytest.CaptureFixture[str]
):
    out = train("dpo", *FAR)
    found, lines = summary(out), records(out)
    stop = found["stopped"]["step"]
    assert stop == found["steps"] == found["exported_step"] < 6
    assert found["examples"] == 8 * stop
    distances = [line["kl/smoothed"] for line in lines if "loss" in line]
    assert distances[-1] > 1.0 >= max(distances[:-1])
    assert found["stopped"]["reason"] == f"kl/smoothed is {distances[-1]:.4g}, more than control.max_kl, 1"
    assert f"stopped after step {stop} of 6: kl/smoothed is" in capfd.readouterr().out
    assert found["after"] == {name: value for name, value in lines[-1].items() if name.startswith("eval_")} != {}
    assert {path.name for path in (out / "checkpoints").iterdir()} == {str(stop)}

    before = content(out)
    train("dpo", *FAR)
    assert "nothing to do" in capfd.readouterr().out
    assert content(out) == before


def test_a_run_killed_after_it_has_stopped_is_finished_without_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "finish", killed)
        with pytest.raises(Killed):
            train("dpo", *FAR)
    before = records(tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(loop, "OpenStep", killed)
    out = train("dpo", *FAR)
    assert summary(out)["stopped"]["step"] == summary(out)["steps"] == before[-1]["step"]
    assert records(out) == before


def test_a_run_that_gets_no_better_ends_and_gives_its_best(train: Train):
    """By a distance that is to be small and only grows, the first checkpoint is the best."""
    rule = "{metric: eval_kl/abs, patience: 2}"
    best = ("training.best_metric=eval_kl/abs", "export.checkpoint=best", "training.eval_every=1")
    out = train("dpo", f"control.early_stop={rule}", *best)
    found, lines = summary(out), {line["step"]: line for line in records(out)}
    assert (found["steps"], found["exported_step"]) == (2, 1)
    assert found["stopped"]["step"] == 2
    reason = found["stopped"]["reason"]
    assert reason.startswith("eval_kl/abs was no better for 2 evaluations in a row; its best is ")
    assert reason.endswith(", of step 0")
    assert found["after"] == {name: value for name, value in lines[1].items() if name.startswith("eval_")}


def test_a_run_that_ends_at_its_last_step_was_not_stopped(finished: Path):
    assert summary(finished)["stopped"] is None


def test_adaptive_beta_goes_on_where_it_was(train: Train, tmp_path: Path):
    band = "control.adaptive_beta={kl_low: 1.0, kl_high: 2.0, rate: 0.5, limit: 3.0}"
    whole = train("dpo", band, f"output_dir={tmp_path}/whole")
    scales = [line["beta_scale"] for line in records(whole) if "loss" in line]
    assert min(scales) < 1.0
    assert scales[-1] > min(scales)
    stop(train, 3, band)
    out = train("dpo", band)
    assert list(map(learnt, records(out))) == list(map(learnt, records(whole)))
    assert_equal_weights(out, whole)


# Going on, and refusing to


def test_a_finished_run_is_left_alone(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    before = content(finished)
    assert run.train(config_file.load(finished / "config.yaml")) == finished
    assert "nothing to do" in capfd.readouterr().out
    assert content(finished) == before


def test_another_config_is_refused(finished: Path, capfd: pytest.CaptureFixture[str]):
    before = content(finished)
    changes = ["training.batch_size=4", "objective.beta=0.3"]
    with pytest.raises(UserError) as caught:
        run.train(config_file.load(finished / "config.yaml", changes))
    assert "objective.beta was 0.1 and is 0.3; training.batch_size was 8 and is 4" in str(caught.value)
    assert launch.main(["train", str(finished / "config.yaml"), *changes]) == 2
    assert "training.batch_size" in capfd.readouterr().err
    assert content(finished) == before


def test_another_objective_is_refused(finished: Path):
    with pytest.raises(UserError, match=r"objective\.name was 'dpo' and is 'ipo'"):
        run.train(config_file.load(finished / "config.yaml", ["objective={name: ipo}"]))


def test_a_foreign_folder_is_refused(train: Train, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex but no config\.yaml"):
        train("dpo")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"thesis.tex", ".lock"}


def test_a_foreign_folder_is_refused_before_its_stages(train: Train, tiny: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    stage = {"model": {"path": f"{tiny}/llama"}, "data": {"train": [{"path": f"{tiny}/sft.jsonl"}]}}
    stage["objective"] = {"name": "sft"}
    with pytest.raises(UserError, match=r"holds thesis\.tex but no config\.yaml"):
        train("dpo", f"stages={json.dumps({'sft': stage})}", "model.path=stage:sft")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"thesis.tex", ".lock"}


def test_a_file_in_place_of_the_folder_is_refused(train: Train, tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="output_dir"):
        train("dpo")


def test_a_folder_in_use_is_refused(train: Train, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="in use by another jaxpo process"):
        train("dpo")


def test_a_kill_while_the_config_is_written(train: Train, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.4711.0a1b2c3d").write_text("output_di")
    assert (train("dpo", "training.max_steps=1") / "summary.json").exists()


def test_sigterm_then_the_same_command(train: Train, finished: Path, tmp_path: Path):
    stop(train, 3, *SAMPLES)
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2, 3]
    out = train("dpo", *SAMPLES)
    assert_equal_weights(out, finished)
    assert [r.get("loss") for r in records(out)] == [r.get("loss") for r in records(finished)]


@pytest.mark.parametrize(
    "changes",
    [
        ["training.row_length=512", "training.rows_per_device=2", "model.remat=full"],
        ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "optimizer.offload=true"],
        ["logging.every=2", "training.eval_every=null", "training.save_every=5", "training.keep_checkpoints=1"],
    ],
)
def test_what_a_resumed_run_may_change(changes: list[str], train: Train, finished: Path, tmp_path: Path):
    stop(train, 3)
    out = train("dpo", *changes)
    expected = weights(finished)
    for name, array in weights(out).items():
        # Adam divides by the root of tiny second moments, which magnifies the rounding.
        np.testing.assert_allclose(array, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert summary(out)["after"]["eval_loss"] == pytest.approx(summary(finished)["after"]["eval_loss"], rel=1e-3)


def test_other_samples_are_refused(train: Train):
    """A resumed run has no weights left to sample from as they were before."""
    stop(train, 2)
    with pytest.raises(UserError, match=r"samples\.prompts was 0 and is 2"):
        train("dpo", "samples.prompts=2")


def test_other_rows_under_the_same_name_are_refused(train: Train, tiny: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(tiny / "dpo.jsonl", rows)
    stop(train, 2, f"data.train.0.path={rows}")
    rows.write_text(rows.read_text(encoding="utf-8").replace("?", "!", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"other weights or rows.*: data\.train\.0 changed"):
        train("dpo", f"data.train.0.path={rows}")
    shutil.copy(tiny / "dpo.jsonl", rows)
    train("dpo", f"data.train.0.path={rows}")


@pytest.fixture
def labels(tmp_path: Path, tiny: Path) -> Path:
    """Rows of labelled answers, six desirable ones to ten."""
    pairs = [json.loads(line) for line in (tiny / "dpo.jsonl").read_text(encoding="utf-8").splitlines()[:16]]
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if n < 6 else "rejected"], "label": n < 6}
        for n, pair in enumerate(pairs)
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(path: Path, *changes: str) -> tuple[str, ...]:
    """The overrides that make the tiny DPO run one of KTO."""
    rows = (f"data.train=[{{path: {path}}}]", "data.eval=[]", "training.eval_every=null")
    return ("objective={name: kto}", *rows, *changes)


def test_other_labels_of_the_same_rows_are_refused(train: Train, labels: Path):
    stop(train, 1, *labelled(labels))
    text = labels.read_text(encoding="utf-8")
    labels.write_text(text.replace('"label": true', '"label": false', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"other weights or rows.*: data\.train\.0 \(labels and scores\) changed"):
        train("dpo", *labelled(labels))
    labels.write_text(text, encoding="utf-8")
    train("dpo", *labelled(labels))


def test_unbalanced_labels_are_told(train: Train, labels: Path, capfd: pytest.CaptureFixture[str]):
    train("dpo", *labelled(labels, "training.max_steps=1"))
    told = capfd.readouterr()
    assert "data.train has 6 desirable and 10 undesirable answers; with their weights they stand 0.6 to 1" in told.err
    assert "an objective.desirable_weight of 1.67 to 2.22" in told.err


def test_data_tells_of_unbalanced_labels(
    configured: Callable[..., Run], labels: Path, capfd: pytest.CaptureFixture[str]
):
    run.inspect_data(configured("dpo", *labelled(labels)), None, "train", 0)
    assert "they stand 0.6 to 1" in capfd.readouterr().err


def test_labels_of_one_kind_are_told_of_either_split(
    configured: Callable[..., Run], labels: Path, capfd: pytest.CaptureFixture[str]
):
    lines = labels.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, kept in (("good", lines[:6]), ("bad", lines[6:])):
        labels.with_name(name).with_suffix(".jsonl").write_text("".join(kept), encoding="utf-8")
    sources = [
        f"data.{split}=[{{path: {labels.with_name(name)}.jsonl}}]"
        for split, name in (("train", "good"), ("eval", "bad"))
    ]
    run.inspect_data(configured("dpo", "objective={name: bco}", *sources), None, "train", 0)
    told = capfd.readouterr().err
    assert "data.train has 6 desirable and 0 undesirable answers: objective bco has nothing to tell apart" in told
    assert "data.eval has 0 desirable and 10 undesirable answers: objective bco has nothing to tell apart" in told


def test_a_stage_that_starts_from_a_stage_can_be_moved(train: Train, tiny: Path, tmp_path: Path):
    """Stopped in the second stage, whose config names the place of the first one."""
    one = {
        "model": {"path": f"{tiny}/llama", "compute_dtype": "float32"},
        "data": {"train": [{"path": f"{tiny}/sft.jsonl"}], "max_length": 128, "cache_dir": f"{tiny}/data"},
        "objective": {"name": "sft"},
        "training": {"batch_size": 8, "row_length": 256, "max_steps": 1},
        "samples": {"prompts": 0},
    }
    two = {**one, "model": {"path": "stage:one", "compute_dtype": "float32"}}
    two["training"] = {**one["training"], "max_steps": 3}
    changes = (f"stages={json.dumps({'one': one, 'two': two})}", "model.path=stage:two", "training.max_steps=1")
    # The first step is the first stage's; the third is the second one of the second.
    stop(train, 3, *changes)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "run"
    (tmp_path / "run").rename(moved)
    assert {path.name for path in (moved / "stages" / "two" / "checkpoints").iterdir()} == {"2"}
    train("dpo", *changes, f"output_dir={moved}")
    assert summary(moved)["steps"] == 1
    with pytest.raises(UserError, match=r"model\.path was 'one/export' and is"):
        run.run_folder.check_same_run(
            moved / "stages" / "two",
            config_file.load(moved / "stages" / "two" / "config.yaml", [f"model.path={tiny}/llama"]),
        )


def test_by_default_a_loss_that_falls_stops_nothing_and_the_last_is_the_best(train: Train):
    best = ("training.best_metric=eval_loss", "export.checkpoint=best", "training.eval_every=1")
    found = summary(train("dpo", "control.early_stop={metric: eval_loss, patience: 2}", *best))
    assert (found["steps"], found["stopped"], found["exported_step"]) == (6, None, 6)


@pytest.mark.parametrize(
    ("control", "change", "told"),
    [
        ("control.max_kl=1000", "logging.every=2", r"logging\.every was 1 and is 2"),
        (
            "control.early_stop={metric: eval_loss, patience: 1}",
            "training.eval_every=2",
            r"training\.eval_every was 3 and is 2",
        ),
    ],
)
def test_where_a_run_looks_at_itself_may_not_change(control: str, change: str, told: str, train: Train):
    stop(train, 1, control)
    with pytest.raises(UserError, match=told):
        train("dpo", control, change)


def test_a_stopped_run_that_was_moved_goes_on(train: Train, finished: Path, tmp_path: Path, tiny: Path):
    stop(train, 4)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "run"
    (tmp_path / "run").rename(moved)
    run.train(config_file.load(tiny / "dpo.yaml", [f"output_dir={moved}"]))
    assert_equal_weights(moved, finished)


def test_a_checkpoint_half_deleted_by_a_kill(train: Train, finished: Path, tmp_path: Path):
    changes = ["training.best_metric=eval_loss", "training.eval_every=1"]
    stop(train, 4, *changes)
    checkpoints = tmp_path / "run" / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir())
    for number, step in enumerate(steps[:-1]):
        for file in sorted(path for path in (checkpoints / str(step)).rglob("*") if path.is_file())[number::2]:
            file.unlink()
    assert_equal_weights(train("dpo", *changes), finished)


def test_a_damaged_last_checkpoint_is_named(train: Train, tmp_path: Path):
    stop(train, 4)
    damaged = tmp_path / "run" / "checkpoints" / "4"
    shutil.rmtree(damaged / "state")
    with pytest.raises(UserError) as caught:
        train("dpo")
    assert str(damaged) in str(caught.value)
    shutil.rmtree(damaged)
    assert (train("dpo") / "summary.json").exists()


# Memory


def shapes_of(tree: Any) -> Counter[tuple[tuple[int, ...], np.dtype]]:
    return Counter((leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What is alive after each step and each evaluation, apart from what was alive before the run: shapes and bytes."""
    gc.collect()
    before = jax.live_arrays()
    found: dict[str, list[Any]] = {"step": [], "evaluation": [], "sync": []}
    original = loop.train

    def look(where: str, state: TrainState, batch: Any = ()) -> None:
        jax.block_until_ready(state)
        gc.collect()
        known = {id(array) for array in before}
        alive = [array for array in jax.live_arrays() if id(array) not in known]
        sizes = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (alive, state.decoder, batch))
        found[where].append((shapes_of(alive), shapes_of(state.decoder), *sizes))

    def watched(work: Loop, state: TrainState, reference: Reference, first: int, progress: Any) -> Ended:
        def step(state: TrainState, batch: Any) -> Any:
            state, result = work.step(state, batch)
            look("step", state, batch)
            return state, result

        assert work.evaluate is not None
        evaluate = work.evaluate

        def evaluated(decoder: Any, *rest: Any) -> Any:
            line = evaluate(decoder, *rest)
            look("evaluation", TrainState(jnp.int32(0), decoder, (), {}))
            return line

        def scored(decoder: Any, rows: Any) -> Any:
            assert work.sync is not None
            values = work.sync.score(decoder, rows)
            look("sync", TrainState(jnp.int32(0), decoder, (), {}))
            return values

        sync = None if work.sync is None else replace(work.sync, score=scored)
        watching = replace(work, step=step, evaluate=evaluated, sync=sync)
        return original(watching, state, reference, first, progress)

    monkeypatch.setattr(loop, "train", watched)
    return found


@pytest.mark.parametrize("reference", ["its own start", "another model", "its own start, resumed"])
def test_no_reference_parameter_is_alive_in_training(
    reference: str, train: Train, live: dict[str, list[Any]], tiny: Path, tmp_path: Path
):
    # A checkpoint that is being written keeps what it writes alive, so that none is written before the end.
    changes = [f"reference.cache_dir={tmp_path}/reference", "training.save_every=null"]
    if reference == "another model":
        shutil.copytree(tiny / "llama", tmp_path / "other")
        file = tmp_path / "other" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + np.float32(0.5).tobytes())
        changes.append(f"reference.path={tmp_path}/other")
    if "resumed" in reference:
        stop(train, 3, *changes)
        live["step"].clear()
    out = train("dpo", *changes)
    assert summary(out)["reference"]["computed"] == (0 if "resumed" in reference else 192)
    assert live["step"]
    assert live["evaluation"]
    assert_copies(live, 3)


@pytest.mark.parametrize(("alpha", "copies"), [(1.0, 3), (0.5, 4)])
def test_a_moving_reference_takes_the_memory_of_an_average_or_none(
    alpha: float, copies: int, train: Train, live: dict[str, list[Any]]
):
    """While its log-probs are computed, too."""
    train("dpo", "training.save_every=null", "reference.sync_steps=2", f"reference.mixup_alpha={alpha}")
    assert {where: len(looks) for where, looks in live.items()} == {"step": 6, "evaluation": 3, "sync": 4}
    assert_copies(live, copies)


def assert_copies(live: dict[str, list[Any]], expected: int) -> None:
    """The weights, Adam's two moments, and an average where there is one; any other copy would make it one more."""
    for where, looks in live.items():
        for shapes, decoder, total, params, batch in looks:
            copies = {shape: shapes[shape] / decoder[shape] for shape in decoder}
            assert set(copies.values()) == {expected}, (where, copies)
            least = expected * params
            assert least < total < least + 2 * batch + 0.1 * params, (where, total, params, batch)


# A disk that takes nothing more


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    configured: Callable[..., Run], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Full once for each of these files, in the order in which a run writes them."""
    fsync, filling = os.fsync, ["config.yaml", "inputs.json", "samples.json", "metrics.jsonl", "plots/", "summary.json"]

    def full(file: int) -> None:
        if filling and filling[0] in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    one = configured("dpo", *SAMPLES)
    while filling:
        expected = f"^output_dir {tmp_path}/run cannot be used: .*No space left.*{filling[0]}.*the same command goes on"
        with pytest.raises(UserError, match=expected):
            run.train(one)
        filling.pop(0)
    out = run.train(one)
    assert_equal_weights(out, finished)
    assert [r.get("loss") for r in records(out)] == [r.get("loss") for r in records(finished)]


def test_all_is_written_before_the_summary_says_so(train: Train, finished: Path, monkeypatch: pytest.MonkeyPatch):
    """What a run that is killed as it prints its report leaves is whole."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "show", killed)
    with pytest.raises(KeyboardInterrupt):
        train("dpo", *SAMPLES)
    out = train("dpo", *SAMPLES)
    assert (out / "samples.md").read_bytes() == (finished / "samples.md").read_bytes()


def test_a_resumed_run_makes_up_for_answers_whose_file_is_gone(train: Train, finished: Path, tmp_path: Path):
    stop(train, 3, *SAMPLES)
    (tmp_path / "run" / "samples.json").unlink()
    out = train("dpo", *SAMPLES)
    assert (out / "samples.json").read_bytes() == (finished / "samples.json").read_bytes()
    assert_equal_weights(out, finished)


def test_answers_that_were_changed_are_told(train: Train, finished: Path, tmp_path: Path):
    stop(train, 3, *SAMPLES)
    path = tmp_path / "run" / "samples.json"
    samples = json.loads(path.read_text())
    samples["before"][0] += "!"
    path.write_text(json.dumps(samples))
    with pytest.raises(
        UserError, match=f"^{path} is damaged: it was changed since it was written.* move the file away"
    ):
        train("dpo", *SAMPLES)
    path.unlink()
    out = train("dpo", *SAMPLES)
    assert (out / "samples.json").read_bytes() == (finished / "samples.json").read_bytes()


@pytest.mark.parametrize("place", [-1, -2])
def test_a_line_that_was_changed_is_as_it_was_or_told(place: int, train: Train, finished: Path, tmp_path: Path):
    """A character of a metric's name; the last line is the checkpoint's to know."""
    stop(train, 4)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[place] = lines[place].replace("logps/chosen", "logps/chosef")
    path.write_text("".join(lines))
    assert "chosef" in path.read_text()
    if place == -2:
        with pytest.raises(UserError, match=f"^{path} is damaged: its first 4 lines are not those that it held"):
            train("dpo")
        return
    whole = records(finished)
    ours = records(train("dpo"))
    assert [sorted(r) for r in ours] == [sorted(r) for r in whole]
    assert [r.get("loss") for r in ours] == [r.get("loss") for r in whole]


@pytest.mark.parametrize("lost", ["the last line", "a line before"])
def test_a_line_that_was_lost_is_put_back_or_told(lost: str, train: Train, finished: Path, tmp_path: Path):
    stop(train, 4)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    del lines[-1 if lost == "the last line" else -2]
    path.write_text("".join(lines))
    if lost == "a line before":
        with pytest.raises(UserError, match=f"^{path} is damaged: its first 4 lines are not those that it held"):
            train("dpo")
        return
    assert [r.get("loss") for r in records(train("dpo"))] == [r.get("loss") for r in records(finished)]
