"""Settings of XLA that a run depends on, to be made before it touches a device."""

import os
import re
from pathlib import Path

import jax

from jaxpo.errors import UserError

YNN = "--xla_cpu_experimental_ynn_fusion_type"
# The releases of jaxlib that know the flag; XLA ends the process over one that it does not know.
KNOWN = ((0, 10), (0, 13))
# Devices simulated on a CPU share one pool of threads and wait for each other on it, each for a collective of every
# loop that it is in. XLA makes as many threads as there are devices; once all of them wait, each for others that have
# no thread left to come, XLA ends the process after 40 s. A loop of layers in one of microbatches needs two a device.
THREADS_PER_DEVICE = 4


def set_up(compute_dtype: str) -> None:
    """Set the precision of products, the kernels that a CPU takes for them, and its threads."""
    set_precision(compute_dtype)
    os.environ["XLA_FLAGS"] = flags(spelled_out(os.environ.get("XLA_FLAGS", "")), compute_dtype, jax.__version_info__)
    devices = simulated(os.environ["XLA_FLAGS"], int(jax.config.values["jax_num_cpu_devices"]))
    if devices < 1:
        raise UserError(
            f"the environment asks for {devices} CPU devices (JAX_NUM_CPU_DEVICES, or in XLA_FLAGS "
            "--xla_force_host_platform_device_count); expected 1 or more."
        )
    if devices > 1:
        # Where XLA takes the size of its pool from.
        os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * devices))


def set_precision(compute_dtype: str) -> None:
    """The part of it that may change in a process: stages of a run may differ in compute_dtype."""
    # GPUs and TPUs would round the inputs of float32 products to fewer bits unless told otherwise.
    jax.config.update("jax_default_matmul_precision", "highest" if compute_dtype == "float32" else None)


def flags(given: str, compute_dtype: str, version: tuple[int, ...]) -> str:
    """XLA_FLAGS with what a CPU needs, unless the user has set it.

    In jaxlib 0.10.2 sums that XLA hands to YNNPACK can be wrong (jax-ml/jax#39103), so YNNPACK gets none of them. Of
    products it gets those of bfloat16, where it is twice as fast as anything else; in float32 XLA's own share small
    ones better among cores.
    """
    if YNN in given or not KNOWN[0] <= version[:2] < KNOWN[1]:
        return given
    kernels = "individual_dot" if compute_dtype == "bfloat16" else ""
    return f"{given} {YNN}={kernels}".strip()


def spelled_out(given: str) -> str:
    """XLA_FLAGS, or what stands in the file that it names: to XLA a value that begins with no hyphen is a path."""
    if not given.strip() or given.lstrip().startswith("-"):
        return given
    try:
        return " ".join(Path(given).read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise UserError(
            f'XLA_FLAGS is "{given}", which names no file that can be read: {error}. Expected flags, which begin with '
            "--, or the path of a file of them."
        ) from error


def simulated(flags: str, jax_num_cpu_devices: int) -> int:
    """CPU devices that are asked for: by jax's option, or where it is not set (-1) by XLA's flag."""
    if jax_num_cpu_devices != -1:
        return jax_num_cpu_devices
    found = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    return int(found[-1]) if found else 1
