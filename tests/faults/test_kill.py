"""A run that is killed or terminated, and started again with the same command, ends as if nothing had happened."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from command import Command, Commands, command


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def learnt(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what the clock has written."""
    return {name: value for name, value in record.items() if not name.endswith("_per_s")}


def assert_the_same(out: Path, whole: Path) -> None:
    assert (out / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    assert list(map(learnt, records(out))) == list(map(learnt, records(whole)))
    mine, others = (json.loads((folder / "summary.json").read_text()) for folder in (out, whole))
    assert mine.keys() == others.keys()
    assert mine["seconds"].keys() == others["seconds"].keys()
    for name in ("before", "after", "steps", "examples", "padding_fraction", "exported_step", "dropped", "truncated"):
        assert mine[name] == others[name], name
    names = {path.name for path in (whole / "export").iterdir()}
    assert {path.name for path in (out / "export").iterdir()} == names
    assert sorted(path.name for path in out.glob(".export*")) == []


def test_sigkill_anywhere(interrupted: Command, whole: Path, tiny: Path, moments: random.Random):
    out = interrupted.out
    interrupted.killed_at("reference", 1)
    (first_chunk,) = interrupted.folder.glob("reference/*/logps/c.0.0")
    assert not first_chunk.with_name("c.1.0").exists()
    written = first_chunk.stat()

    # The first chunk is not computed again. What a checkpoint is made of is being written when this one dies.
    printed = interrupted.killed_at("checkpoint", 1, moments.uniform(0.0, 0.02))
    assert "reference log-probs: 64/80 examples" in printed
    assert first_chunk.stat().st_mtime_ns == written.st_mtime_ns
    assert [record["step"] for record in records(out)] == [0, 1, 2]

    interrupted.killed_at("evaluation", 1)
    interrupted.killed_at("step", moments.randint(2, 3), 0.1)
    interrupted.killed_at("export", 1)
    assert len(list(out.glob(".export.new-*"))) == 1
    assert not (out / "summary.json").exists()

    printed = interrupted.run()
    assert "going on from step 6 of 6" in printed
    assert_the_same(out, whole)
    trained, untrained = (folder / "model.safetensors" for folder in (out / "export", tiny / "llama"))
    assert trained.read_bytes() != untrained.read_bytes()


def test_sigkill_of_a_run_whose_reference_moves(moving: Commands):
    """It moves after steps 2 and 4, and is saved after step 3: killed after each move, and once it is saved."""
    moving.interrupted.killed_at("sync", 1)
    moving.interrupted.killed_at("checkpoint", 1, 1.0)
    moving.interrupted.killed_at("step", 2, 0.1)
    assert "going on from step 3 of 6" in moving.interrupted.run()
    moving.undisturbed.run()
    assert_the_same(moving.interrupted.out, moving.undisturbed.out)


def test_sigkill_of_a_run_on_labels_with_a_beta_that_adapts_itself(kto: Commands, moments: random.Random):
    kto.interrupted.killed_at("evaluation", 1)
    kto.interrupted.killed_at("checkpoint", 2, moments.uniform(0.0, 0.02))
    kto.interrupted.killed_at("step", 2, 0.1)
    assert "going on from step" in kto.interrupted.run()
    kto.undisturbed.run()
    assert_the_same(kto.interrupted.out, kto.undisturbed.out)
    assert len({record["beta_scale"] for record in records(kto.interrupted.out) if "loss" in record}) > 3


def test_sigterm_saves_and_exits_143(interrupted: Command, whole: Path):
    code, printed = interrupted.terminated_after('"step": 2')
    assert code == 128 + signal.SIGTERM, printed
    assert "SIGTERM: saved step" in printed
    assert "Traceback" not in printed
    saved = max(int(folder.name) for folder in (interrupted.out / "checkpoints").iterdir())
    assert saved < 6
    assert f"going on from step {saved} of 6" in interrupted.run()
    assert_the_same(interrupted.out, whole)


def test_a_second_start_compiles_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled = tmp_path / "compiled"
    monkeypatch.setattr("command.COMPILED", compiled)

    def programs_after(folder: str) -> set[str]:
        command(tiny, tmp_path / folder, "training.max_steps=1").run()
        return {path.name for path in compiled.glob("*-cache")}

    first = programs_after("first")
    assert any(name.startswith("jit_step-") for name in first)
    assert programs_after("second") == first
