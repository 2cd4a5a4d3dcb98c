"""What XLA is told before a run touches a device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpo.compiler import flags, spelled_out
from jaxpo.errors import UserError

COUNT = "--xla_force_host_platform_device_count"
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    ("given", "compute_dtype", "version", "expected"),
    [
        ("", "float32", (0, 10, 2), f"{FLAG}="),
        ("", "bfloat16", (0, 12, 0), f"{FLAG}=individual_dot"),
        ("--xla_dump_to=x", "bfloat16", (0, 10, 2), f"--xla_dump_to=x {FLAG}=individual_dot"),
        (f"{FLAG}=+reduce", "float32", (0, 10, 2), f"{FLAG}=+reduce"),
        # A release that may not know the flag would end the process over it.
        ("--xla_dump_to=x", "float32", (0, 13, 0), "--xla_dump_to=x"),
        ("", "float32", (0, 9, 1), ""),
    ],
)
def test_flags(given: str, compute_dtype: str, version: tuple[int, ...], expected: str) -> None:
    assert flags(given, compute_dtype, version) == expected


# jax-ml/jax#39103: the last of these sums is wrong in jaxlib 0.10.2 as it comes.
SUMS = """
import jaxpo.compiler
jaxpo.compiler.set_up({dtype!r})
import jax, jax.numpy as jnp
i = jnp.arange(32769, dtype=jnp.float32)
x = jnp.stack((i, jnp.zeros_like(i), jnp.zeros_like(i)), axis=1)
print(float(jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)[-1]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_right(dtype: str) -> None:
    done = subprocess.run([sys.executable, "-c", SUMS.format(dtype=dtype)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 32768.0**2


def test_flags_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "flags"
    file.write_text("--xla_dump_to=x\n--xla_force_host_platform_device_count=3\n")
    assert spelled_out(str(file)) == "--xla_dump_to=x --xla_force_host_platform_device_count=3"
    assert spelled_out(" --xla_dump_to=x") == " --xla_dump_to=x"
    assert spelled_out("") == ""
    with pytest.raises(UserError, match=r'XLA_FLAGS is "no/such/file", which names no file'):
        spelled_out("no/such/file")


@pytest.mark.parametrize("given", [{"JAX_NUM_CPU_DEVICES": "0"}, {"XLA_FLAGS": f"{COUNT}=0"}])
def test_no_devices_are_refused(given: dict[str, str]) -> None:
    program = "import jaxpo.compiler; jaxpo.compiler.set_up('float32')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **given})
    assert done.returncode
    assert "asks for 0 CPU devices" in done.stderr.splitlines()[-1]


THREADS = """
import jaxpo.compiler
jaxpo.compiler.set_up("float32")
import jax
from pathlib import Path
jax.devices()
print(sum(task.read_text() == "tf_XLAEigen\\n" for task in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"JAX_NUM_CPU_DEVICES": "3"}, 4 * 3),
        ({"XLA_FLAGS": f"{COUNT}=3"}, 4 * 3),
        ({"JAX_NUM_CPU_DEVICES": "3", "NPROC": "5"}, 5),
    ],
)
def test_simulated_devices_have_threads_to_wait_on(given: dict[str, str], expected: int) -> None:
    """With one thread a device a train step on eight of them hangs now and then, and the process is ended."""
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment |= given
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == expected
