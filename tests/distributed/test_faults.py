"""One of several processes fails, is killed or is told to stop: all end soon, and the same command goes on."""

import signal
from pathlib import Path

import cluster

# Seconds in which all end when one has: gloo tells at once of a process that is gone.
SOON = 60.0


def test_a_mistake_of_one_ends_all_with_its_message(tiny: Path, tmp_path: Path):
    differing = {1: (f"data.train=[{{path: {tmp_path}/none.jsonl}}]",)}
    started = cluster.start(tmp_path / "logs", 2, 2, *cluster.training(tiny, tmp_path), differing=differing)
    found = cluster.ended(tmp_path / "logs", started)
    assert [one.code for one in found] == [2, 2], found[0].printed
    for one in found:
        assert f"error: process 1 of 2: {tmp_path}/none.jsonl" in one.printed
        assert "Traceback" not in one.printed


def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(alone: Path, tiny: Path, tmp_path: Path):
    command = cluster.training(tiny, tmp_path)
    started = cluster.start(tmp_path / "logs", 2, 2, *command)
    cluster.until(tmp_path / "run", 3)
    started[1].kill()
    found = cluster.ended(tmp_path / "logs", started, SOON)
    assert found[0].code not in (0, None), found[0].printed
    cluster.run(tmp_path / "logs", 2, 2, *command)
    cluster.assert_same_run(tmp_path / "run", alone)


def test_sigterm_of_one_saves_and_ends_all_and_one_process_goes_on(alone: Path, tiny: Path, tmp_path: Path):
    command = cluster.training(tiny, tmp_path, "training.save_every=null")
    started = cluster.start(tmp_path / "logs", 2, 2, *command)
    cluster.until(tmp_path / "run", 1)
    started[1].send_signal(signal.SIGTERM)
    found = cluster.ended(tmp_path / "logs", started, SOON)
    assert [one.code for one in found] == [143, 143], found[0].printed
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    (one,) = cluster.run(tmp_path / "logs", 1, 1, *command)
    assert "going on from step" in one.printed
    cluster.assert_same_run(tmp_path / "run", alone)


def test_what_one_process_saved_two_go_on_with(alone: Path, tiny: Path, tmp_path: Path):
    mesh = "mesh={data: 1, fsdp: 4, tensor: 2}"
    (process,) = cluster.start(tmp_path / "logs", 1, 8, *cluster.training(tiny, tmp_path, mesh))
    cluster.until(tmp_path / "run", 2)
    process.terminate()
    (stopped,) = cluster.ended(tmp_path / "logs", [process], SOON)
    assert stopped.code == 143, stopped.printed
    found = cluster.run(tmp_path / "logs", 2, 2, *cluster.training(tiny, tmp_path))
    assert "going on from step" in found[0].printed
    cluster.assert_same_run(tmp_path / "run", alone)
