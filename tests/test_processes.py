"""How a process learns its place among others, and what becomes of it alone."""

import numpy as np
import pytest

from jaxpo import processes
from jaxpo.errors import UserError
from jaxpo.processes import Place, place, scheduled

NO_FLAGS = {"--coordinator": None, "--processes": None, "--process": None}
FLAGS = {"--coordinator": "host:1234", "--processes": "4", "--process": "3"}
ENVIRONMENT = {"JAX_COORDINATOR_ADDRESS": "other:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


def test_flags_go_before_the_environment():
    assert place(FLAGS, ENVIRONMENT) == Place("host:1234", 4, 3)
    assert place(NO_FLAGS, ENVIRONMENT) == Place("other:1", 2, 0)
    assert place(NO_FLAGS, {}) is None


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({**FLAGS, "--process": None}, {}, r"found --coordinator, --processes without --process; expected all of"),
        (NO_FLAGS, {"JAX_PROCESS_ID": "0"}, r"found JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        ({**FLAGS, "--coordinator": "host"}, {}, r"--coordinator is 'host'; expected HOST:PORT of the first process"),
        ({**FLAGS, "--processes": "four"}, {}, r"--processes is 'four'; expected the number of processes, 1 or more"),
        ({**FLAGS, "--process": "4"}, {}, r"--process is '4'; expected which process this is, 0 to 3"),
        (NO_FLAGS, {**ENVIRONMENT, "JAX_PROCESS_ID": "x"}, r"JAX_PROCESS_ID is 'x'; expected which process this is"),
    ],
)
def test_half_a_place_is_refused(flags: dict[str, str | None], environment: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        place(flags, environment)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_a_scheduler_tells_of_others(environment: dict[str, str], several: bool):
    assert scheduled(environment) is several


def test_one_process_alone_needs_nobody():
    assert processes.is_first()
    assert not processes.several()
    assert processes.same(lambda: {"a": [1]}) == {"a": [1]}
    assert processes.each(2.5).tolist() == [2.5]
    assert all(processes.writes(number) for number in range(4))
    led = processes.led(lambda compute: compute([3, 4]) + 1, lambda rows: np.array(rows))
    assert led.tolist() == [4, 5]
