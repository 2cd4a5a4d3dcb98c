"""What several processes read of a checkpoint that they load together, and what it takes of their memory.

    python tests/distributed/load_sharded.py --gigabytes 2 --json OUT.json

Makes a random checkpoint of so many gigabytes (bfloat16, several files) in a folder in memory, and loads it on a mesh
of `fsdp` over four processes of one device each. Told for each process, in bytes: `share`, what it is to hold of the
checkpoint; `read`, the pages of the checkpoint's files that it has touched, as /proc/self/smaps counts them while all
that was mapped is kept mapped; `hashed`, what it has read for the fingerprint of the weights; `peak`, the most memory
of its own that it has had in loading (without the files' pages) above what it had before. And the seconds of loading.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cluster
import jax
import numpy as np

from jaxpo import processes
from jaxpo.config import MeshConfig
from jaxpo.models import safetensors_files
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import abstract_decoder
from jaxpo.reference.fingerprint import weights_fingerprint
from jaxpo.training.mesh import Layout, make_mesh

PROCESSES = 4
# In memory, where each page of a file is one by itself: of other files the system maps all of what its cache holds as
# one, up to 2 MiB, when a byte of it is touched.
MEMORY = Path("/dev/shm")
PLACE = ("--coordinator", "--processes", "--process")


def make(folder: Path, total: int) -> None:
    """A Llama of about `total` bytes of random bfloat16 in files of an eighth of it."""
    import ml_dtypes

    from jaxpo.models import families
    from jaxpo.models.scratch import configure

    width, layers, vocab = (2048, 16, 32_000) if total > 1_000_000_000 else (2048, 1, 4_000)
    # Of a layer: attention 2.5 width^2, and three matrices of width x mlp, which takes what is left.
    left = total / 2 - vocab * width - layers * 2.5 * width * width
    mlp = int(left / layers / 3 / width) // 64 * 64
    architecture = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    hf_config, config = configure(architecture, vocab, {})
    tensors = families.tensors(hf_config, config, str(folder))
    shards: list[list[families.Tensor]] = [[]]
    for tensor in tensors:
        if sum(2 * int(np.prod(t.shape)) for t in shards[-1]) > total / 8:
            shards.append([])
        shards[-1].append(tensor)
    folder.mkdir(parents=True)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # 15 bits: no number that is not finite, and cheap to draw.
        values = (rng.integers(0, 0x3F80, t.shape, np.uint16).view(bfloat16) for t in shard)
        safetensors_files.write(folder / file, {t.name: (bfloat16, t.shape) for t in shard}, values)
        weight_map |= dict.fromkeys((t.name for t in shard), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config))


def touched() -> int:
    """Bytes of safetensors files that this process has mapped and touched."""
    smaps = Path("/proc/self/smaps").read_text()
    return 1024 * sum(int(kib) for kib in re.findall(r"\.safetensors\n(?:[^\n]*\n)*?Rss: +(\d+) kB", smaps))


def memory() -> int:
    """Bytes of this process's own memory."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def read_by_calls() -> int:
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def bits(array: jax.Array) -> jax.Array:
    """The sum of the bits of bfloat16 numbers, modulo 2^32."""
    return jax.lax.bitcast_convert_type(array, np.uint16).astype(np.uint32).sum(dtype=np.uint32)


def measure(folder: Path, out: Path) -> None:
    """Load the checkpoint as a run does, and write what it took."""
    mapped: list[np.ndarray] = []
    read = safetensors_files.SafetensorsTensor.read

    def kept(self: safetensors_files.SafetensorsTensor) -> np.ndarray:
        mapped.append(read(self))
        return mapped[-1]

    safetensors_files.SafetensorsTensor.read = kept
    checkpoint = read_checkpoint(folder)
    config = checkpoint.decoder_config
    shardings = Layout(make_mesh(MeshConfig(fsdp=-1))).decoder(config, abstract_decoder(config, "bfloat16"))
    before, calls = memory(), read_by_calls()
    fingerprint = weights_fingerprint(checkpoint.weight_files, out.with_suffix(".memo.json"))
    hashed = read_by_calls() - calls
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    decoder = load_decoder(checkpoint, "bfloat16", shardings)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(decoder)
    shares = [sum(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in leaves]
    found = {"share": sum(shares), "read": touched(), "hashed": hashed, "peak": peak[0], "seconds": seconds}
    # What is loaded is what the files hold: in a sum that does not depend on where it lies.
    sums = [
        int(jax.jit(lambda x: jax.lax.bitcast_convert_type(x, np.uint16).astype(np.uint32).sum())(x)) for x in leaves
    ]
    stored = [int(np.asarray(tensor).view(np.uint16).sum(dtype=np.uint32)) for tensor in mapped]
    found |= {"fingerprint": fingerprint, "same": sum(sums) % 2**32 == sum(stored) % 2**32}
    out.write_text(json.dumps(found))


def measured(folder: Path, logs: Path) -> list[dict[str, Any]]:
    """What each of four processes says."""
    outs = [logs / f"{n}.json" for n in range(PROCESSES)]
    differing = {n: ("--measure", str(out)) for n, out in enumerate(outs)}
    program = (str(Path(__file__)), "--folder", str(folder))
    found = cluster.ended(logs, cluster.start(logs, PROCESSES, 1, program=program, differing=differing))
    if any(one.code != 0 for one in found):
        raise SystemExit("\n---\n".join(one.printed for one in found))
    return [json.loads(out.read_text()) for out in outs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    for hidden in ("--folder", "--measure"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    for flag in PLACE:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if given["measure"] is not None:
        place = processes.place({flag: given[flag.strip("-")] for flag in PLACE}, os.environ)
        with processes.joined(place):
            measure(given["folder"], given["measure"])
        return 0
    with tempfile.TemporaryDirectory(prefix="load-sharded-", dir=MEMORY) as name:
        folder = Path(name) / "model"
        make(folder, int(given["gigabytes"] * 1e9))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        files = len(list(folder.glob("*.safetensors")))
        print(f"{size / 1e9:.2f} GB in {files} files, {PROCESSES} processes")
        found = measured(folder, Path(name) / "logs")
    for n, one in enumerate(found):
        shown = ", ".join(f"{key} {one[key] / 1e6:.0f} MB" for key in ("share", "read", "hashed", "peak"))
        print(f"process {n}: {shown}; read / share {one['read'] / one['share']:.3f}; {one['seconds']:.1f} s")
    if given["json"] is not None:
        given["json"].write_text(json.dumps({"bytes": size, "files": files, "processes": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
