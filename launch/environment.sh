# shellcheck shell=bash
# What every recipe sets before it starts jaxpo: `source launch/environment.sh`. What is set already stays as it is.

# The part of a GPU's memory that JAX takes at its start: three quarters unless told otherwise, and what is left serves
# nobody. Where a run fails for want of memory outside of JAX (NCCL, cuDNN), take less. JAX refuses the variable's old
# name beside it.
if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then
  export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.92}"
fi

# Compiled programs outlive the process, so that a restart reaches its first step in seconds. Of several processes the
# first one alone writes them: hosts that do not share this folder compile everything anew at each start. Who may write
# to it may run code as you, so share it with nobody else.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxpo/xla}"

# Collectives of GPUs begin early and are waited for late, with other work between them. XLA ends a program over a flag
# that it does not know; jaxlib 0.10 to 0.12 know this one, and a CPU or a TPU takes no notice of it. Who sets XLA_FLAGS
# sets all of them.
export XLA_FLAGS="${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}"

# NCCL says what goes wrong; INFO also says which network it took, which is where to look when hosts do not meet. Where
# it takes the wrong one, export NCCL_SOCKET_IFNAME (eth0, say; =eth0 for exactly that name), and NCCL_IB_HCA for
# InfiniBand.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# What a process says is in its log at once; one that is killed by SIGABRT (kill -ABRT PID) or crashes in native code
# says where each of its threads was.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
