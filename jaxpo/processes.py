"""Several processes that compute as one, each with devices of its own: how they start, agree, and end together.

Every process runs the same program. What there is once (a lock, a file, a line on the screen) is the business of the
first one; the others wait for what comes of it. A process that fails tells the others why before it ends, and they end
with its message, wherever they are waiting.
"""

import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpo.errors import UserError

T = TypeVar("T")

# Seconds after which a process that says nothing, because its machine is gone, is given up.
SILENCE = 60
# Where a process that fails leaves its message for the others.
FAILURE = "jaxpo/failure"
# Seconds in which a message has come to all: so long the first process, which keeps them, stays there for the others.
TO_BE_READ = 3.0
# The calls of `stop_signal`'s function, over all stages: jax asks for numbers that only grow.
_calls = itertools.count(1)
# How collectives and jax's service say that a process is gone.
SILENT = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket closed|heartbeat|unavailable|deadline.exceeded",
    re.IGNORECASE,
)
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Schedulers that tell each process which one it is: how many there are says which variable. jax reads the rest.
SCHEDULERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """A process's place among others: where the first one listens, how many there are, which one this is, from 0."""

    coordinator: str
    number: int
    index: int


def place(given: Mapping[str, str | None], environment: Mapping[str, str]) -> Place | None:
    """The place that flags give, or else the environment; None where neither does.

    given: the values of --coordinator, --processes and --process, None for those that were left out. Raises UserError
    where one is missing or no number.
    """
    flags = ("--coordinator", "--processes", "--process")
    told = {flag: value for flag, value in given.items() if value is not None}
    told = told or {name: environment[name] for name in ENVIRONMENT if name in environment}
    if not told:
        return None
    names = flags if any(value is not None for value in given.values()) else ENVIRONMENT
    if missing := [name for name in names if name not in told]:
        raise UserError(
            f"found {', '.join(told)} without {', '.join(missing)}; expected all of {', '.join(names)}, or none "
            "of them where there is one process."
        )
    coordinator, number, index = (told[name] for name in names)
    if ":" not in coordinator:
        raise UserError(f"{names[0]} is {coordinator!r}; expected HOST:PORT of the first process.")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"{names[1]} is {number!r}; expected the number of processes, 1 or more.")
    if not index.isdecimal() or int(index) >= int(number):
        raise UserError(f"{names[2]} is {index!r}; expected which process this is, 0 to {int(number) - 1}.")
    return Place(coordinator, int(number), int(index))


def scheduled(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler started this process as one of several, of which jax finds out the rest by itself."""
    counts = (environment.get(name, "1") for name in SCHEDULERS)
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return any(count.isdecimal() and int(count) > 1 for count in counts) or len(hosts) > 1


def start(where: Place | None) -> threading.Thread | None:
    """Meet the other processes, if there are any, and begin to listen to them. Before this nothing may touch a device.

    Returns what listens, None where this process is alone. Raises UserError where they do not find each other, or where
    devices of others are seen that nobody told of.
    """
    if where is None and not scheduled(os.environ):
        if jax.process_count() > 1:
            raise UserError(
                f"this is one of {jax.process_count()} processes, which did not meet before they began. Expected "
                "--coordinator, --processes and --process, with which each of them is told its place."
            )
        return None
    arguments: dict[str, Any] = {"heartbeat_timeout_seconds": SILENCE}
    if where is not None:
        if where.number == 1:
            return None
        arguments |= {
            # Told by hand, a process also has all devices that it can see, whatever a scheduler would give it.
            "cluster_detection_method": "deactivate",
            "coordinator_address": where.coordinator,
            "num_processes": where.number,
            "process_id": where.index,
        }
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes did not find each other: {' '.join(str(error).split())}. Expected every process to be "
            "started with the address of the first one, one that all of them reach, the same number of processes and "
            "an index of its own."
        ) from error
    listener = threading.Thread(target=_end_with_the_others, daemon=True)
    listener.start()
    return listener


@contextmanager
def joined(where: Place | None) -> Iterator[None]:
    """Meet the other processes, if there are any; where this one fails inside, all end with its message.

    What fails before that, a mistake in the config say, is the same in all of them.
    """
    listener = start(where)
    try:
        yield
    except SystemExit:
        _part(listener)
        raise
    except UserError as error:
        fail(str(error), 2)
        raise
    except KeyboardInterrupt:
        fail("interrupted", 130)
        raise
    except Exception as error:
        if several():
            # What fails here may do so because another process has ended, whose message then ends this one meanwhile.
            time.sleep(2 * TO_BE_READ)
            if (said := silence(error)) is not None:
                fail(
                    f"another process has ended and left no message: it was killed, or its machine is lost ({said}). "
                    "The same command, given to all of them again, goes on from what is saved.",
                    1,
                )
            traceback.print_exc()
            fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}", 1)
        raise
    _part(listener)


def silence(error: BaseException) -> str | None:
    """What jax says of another process that does not answer any more, in a line; None where an error is another one."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    said = (" ".join(str(one).split()) for one in causes if isinstance(one, jax.errors.JaxRuntimeError))
    return next((text[:200] for text in said if SILENT.search(text)), None)


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process does what is done once."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def writes(number: int) -> bool:
    """Whether of many files that are shared out among all processes this one writes the one of this number."""
    return not several() or number % jax.process_count() == jax.process_index()


def name() -> str:
    """What this process is called in messages to people."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def wait(reason: str) -> None:
    """Return when all processes have come here, for the same reason."""
    if several():
        multihost_utils.sync_global_devices(reason)


def same(compute: Callable[[], T]) -> T:
    """What the first process computes, a value that JSON can hold, on all of them."""
    if not several():
        return compute()
    text = json.dumps(compute()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    sent = np.frombuffer(text.ljust(size), np.uint8)[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes())


def same_array(compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array that the first process computes, on all of them."""
    if not several():
        return compute()
    array = compute() if is_first() else None
    shape, dtype = same(lambda: (array.shape, array.dtype.str) if array is not None else ((), ""))
    mine = np.zeros(shape, dtype) if array is None else array
    return np.asarray(multihost_utils.broadcast_one_to_all(mine))


def each(value: float) -> np.ndarray:
    """The value of each process, float64 [number of processes]."""
    mine = np.array(value, np.float64)
    # As bits: jax would make it float32.
    bits = mine.reshape(1).view(np.uint32)
    if not several():
        return mine.reshape(1)
    return np.asarray(multihost_utils.process_allgather(bits)).view(np.float64).reshape(-1)


def merged(mine: np.ndarray) -> np.ndarray:
    """The sum of what each process has, an array of the same shape and dtype on all of them."""
    if not several():
        return mine
    return np.asarray(multihost_utils.process_allgather(mine)).sum(axis=0, dtype=mine.dtype)


def share(sizes: Sequence[int]) -> list[int]:
    """Which of many pieces of work, by their sizes, are this process's: a run of them, about as much as the others'."""
    if not several():
        return list(range(len(sizes)))
    total = max(sum(sizes), 1)
    middles = np.cumsum(sizes) - np.asarray(sizes) / 2
    owners = np.minimum(middles * jax.process_count() // total, jax.process_count() - 1)
    return [i for i, owner in enumerate(owners) if owner == jax.process_index()]


def whole(array: jax.Array) -> np.ndarray:
    """All of an array, on every process, wherever its parts are."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def led(
    work: Callable[[Callable[[list[int]], np.ndarray]], np.ndarray], compute: Callable[[list[int]], np.ndarray]
) -> np.ndarray:
    """The array that work(compute) gives in the first process, on all of them; they compute along, what it is about."""
    if not several():
        return work(compute)
    if not is_first():
        # An empty list says that there is nothing more.
        while wanted := same(list):
            compute(wanted)
        return same_array(lambda: np.zeros(0))

    def leading(wanted: list[int]) -> np.ndarray:
        same(lambda: wanted)
        return compute(wanted)

    done = work(leading)
    same(list)
    return same_array(lambda: done)


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM has asked for an end; elsewhere SIGTERM ends the process at once.

    Of several processes one is enough to be asked: by jax's own service they agree on the call, of the same number in
    each of them, at which it tells all. They take no other notice of SIGTERM, from their start to their end.
    """
    if several():
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_calls))
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous: Any = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)


def fail(text: str, code: int) -> None:
    """End this process and all others with a message and an exit code; return where this is the only one."""
    if not several():
        return
    print(f"error: {name()}: {text}", file=sys.stderr)
    client = _client()
    try:
        client.key_value_set(FAILURE, json.dumps({"text": f"{name()}: {text}", "code": code}))
    except Exception:  # another one was faster, or the first process is gone
        time.sleep(TO_BE_READ)
    if is_first():
        time.sleep(TO_BE_READ)
    _exit(code)


def _end_with_the_others() -> None:
    """Wait for the message of a process that fails, and end with it."""
    client = _client()
    while True:
        try:
            failure = json.loads(client.blocking_key_value_get(FAILURE, 24 * 3600 * 1000))
        except Exception as error:  # jax gives no type of its own
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return
        break
    if failure is not None and not failure["text"].startswith(f"{name()}:"):
        print(f"error: {failure['text']}", file=sys.stderr)
        if is_first():
            time.sleep(TO_BE_READ)
        _exit(failure["code"])


def _part(listener: threading.Thread | None) -> None:
    """Go apart, all of them having come to an end: what still listened when Python ends would crash it."""
    if listener is None:
        return
    wait("the end")
    if is_first():
        _client().key_value_set(FAILURE, json.dumps(None))
    listener.join()


def _exit(code: int) -> None:
    """End at once: whatever else there is to do at an end would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client() -> Any:
    # jax has no public way to its store of keys; orbax takes this one, too.
    from jax._src import distributed

    return distributed.global_state.client
