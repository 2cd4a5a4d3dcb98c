"""The devices of this machine: by their published figures, or measured where there are none."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpo.planning.hardware import BY_KIND, Chip, Topology, of_count, share_of

# Rows and columns of the products that are timed, and the numbers that are copied.
PRODUCT, COPY = 2048, 1 << 26
CGROUP = Path("/sys/fs/cgroup/memory.max")


def devices_here(compute_dtype: str) -> Topology:
    """What jax would train on in this process."""
    devices = jax.devices()
    known = BY_KIND.get(devices[0].device_kind)
    if known is not None:
        return of_count(known, len(devices))
    return Topology(_measured(devices[0], len(devices), compute_dtype), (len(devices),))


def _measured(device: Any, count: int, compute_dtype: str) -> Chip:
    """A device by what it does now: the shortest of three products, and of three copies. CPU devices share it all."""
    sharing = count if device.platform == "cpu" else 1
    square, line = jnp.ones((PRODUCT, PRODUCT), compute_dtype), jnp.ones(COPY, jnp.float32)
    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    flops = 2 * PRODUCT**3 / _seconds(lambda: multiply(square)) / sharing
    add = jax.jit(lambda a: a + 1)
    bandwidth = 8 * COPY / _seconds(lambda: add(line)) / sharing
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = main_memory() / sharing if limit is None else limit / share_of(device.platform)[0]
    return Chip(
        name=device.device_kind,
        platform=device.platform,
        kinds=(device.device_kind,),
        memory=memory,
        bandwidth=bandwidth,
        flops=flops,
        flops32=flops,
        link=bandwidth,
        island=count,
        between=None,
        host=bandwidth,
    )


def _seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    found = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return min(found)


def main_memory() -> int:
    """Bytes of this machine's memory, or of what its container may take of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = CGROUP.read_text(encoding="ascii").strip() if CGROUP.exists() else ""
    return min(whole, int(allowed)) if allowed.isdecimal() else whole
