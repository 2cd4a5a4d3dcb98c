"""Recipes of launch/ run here, on a CPU: one host, SLURM with commands that stand in for its own, hosts of a TPU."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import cluster
import pytest
import slurm

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = Path(sys.executable).parent
NO_SAMPLES = "samples={prompts: 0}"


def start(
    log: Path, recipe: str, *arguments: str, path: Path = PYTHON, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """A recipe as a user starts it, whose commands are looked for in `path` first."""
    given = {
        # Not what the tests themselves have set: the recipe's own.
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "PATH": f"{path}:{PYTHON}:{os.environ['PATH']}",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cluster.COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        program = ("bash", f"launch/{recipe}", *arguments)
        return subprocess.Popen(program, cwd=ROOT, env=given, stdout=file, stderr=subprocess.STDOUT)


def ended(log: Path, process: "subprocess.Popen[bytes]") -> cluster.Ended:
    code = process.wait(cluster.TIMEOUT)
    return cluster.Ended(code, log.read_text(encoding="utf-8"))


def test_one_host_trains_in_the_shared_environment(alone: Path, tiny: Path, tmp_path: Path):
    _, *arguments = cluster.training(tiny, tmp_path, NO_SAMPLES)
    log = tmp_path / "log"
    done = ended(log, start(log, "single-host.sh", *arguments, environment={}))
    assert done.code == 0, done.printed
    cluster.assert_same_run(tmp_path / "run", alone)


@pytest.fixture
def job() -> dict[str, str]:
    """What sbatch gives its script: a job of two tasks, whose number gives a free port."""
    for number in itertools.count(os.getpid()):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", 61440 + number % 4096))
            except OSError:
                continue
        return {"SLURM_JOB_ID": str(number), "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    raise AssertionError


def test_slurm_saves_before_its_time_is_over_and_goes_on_when_it_is_queued_again(
    job: dict[str, str], alone: Path, tiny: Path, tmp_path: Path
):
    commands, log = tmp_path / "commands", tmp_path / "log"
    slurm.install(commands)
    _, *arguments = cluster.training(tiny, tmp_path, NO_SAMPLES, "training.save_every=null")
    process = start(log, "slurm.sbatch", *arguments, path=commands, environment=job)
    cluster.until(tmp_path / "run", 1)
    process.send_signal(signal.SIGUSR1)
    stopped = ended(log, process)
    assert stopped.code == 143, stopped.printed
    assert "on 2 cpu device(s) of 2 processes" in stopped.printed
    assert slurm.requeued(commands) == [job["SLURM_JOB_ID"]]
    done = ended(log, start(log, "slurm.sbatch", *arguments, path=commands, environment=job))
    assert done.code == 0, done.printed
    assert "going on from step" in done.printed
    assert slurm.requeued(commands) == [job["SLURM_JOB_ID"]]
    cluster.assert_same_run(tmp_path / "run", alone)


def test_slurm_does_not_queue_a_mistake_again(job: dict[str, str], tmp_path: Path):
    commands, log = tmp_path / "commands", tmp_path / "log"
    slurm.install(commands)
    done = ended(log, start(log, "slurm.sbatch", f"{tmp_path}/none.yaml", path=commands, environment=job))
    # One task has ended with 2; by then the other has, too, or it is killed.
    assert done.code in (2, 137)
    assert f"{tmp_path}/none.yaml" in done.printed
    assert slurm.requeued(commands) == []


METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes"


def stand_in(commands: Path, **scripts: str) -> Path:
    """A folder with commands of these texts, for PATH."""
    commands.mkdir()
    for name, text in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    return commands


@pytest.mark.parametrize(
    "endpoints", ["10.0.0.7,10.0.0.8,10.0.0.9", "name:1:10.0.0.7,name:2:10.0.0.8,name:3:10.0.0.9"], ids=["new", "old"]
)
def test_the_hosts_of_a_tpu_learn_their_places_from_the_metadata(endpoints: str, tmp_path: Path):
    curl = f"""
        case "$*" in *"Metadata-Flavor: Google {METADATA}/worker-network-endpoints") echo "{endpoints}" ;;
                     *"Metadata-Flavor: Google {METADATA}/agent-worker-number") echo 2 ;;
                     *) exit 22 ;; esac"""
    python = 'echo "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID" "$@"'
    commands, log = stand_in(tmp_path / "commands", curl=curl, python=python), tmp_path / "log"
    done = ended(log, start(log, "tpu-vm.sh", "a.yaml", "training.seed=1", path=commands, environment={}))
    assert (done.code, done.printed) == (0, "10.0.0.7:8476 3 2 -m jaxpo.launch train a.yaml training.seed=1\n")


def test_a_machine_that_is_no_host_of_a_tpu_is_told_so(tmp_path: Path):
    commands, log = stand_in(tmp_path / "commands", curl="exit 22"), tmp_path / "log"
    done = ended(log, start(log, "tpu-vm.sh", "a.yaml", path=commands, environment={}))
    assert done.code == 2
    assert done.printed.startswith("error: the metadata of this machine has no worker-network-endpoints; expected")
