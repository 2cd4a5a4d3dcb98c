"""jaxpo against TRL and Tunix: DPO on the same rows with the same model, side by side, each in its own environment.

    python tests/benchmarks/against_peers.py --json OUT.json [--png OUT.png] [--quick] [--batch 8] [--pairs 24]

Trains SmolLM2-135M on HH-RLHF helpful-base from ../shared, with what each user gets: jaxpo by its command, TRL 1.16.0
and Tunix 0.1.7 by the scripts in ../shared/peers. Repeats alternate between the systems, and medians are reported. The
ceiling is the fastest matrix product measured in the same run, by jax or by torch, in the same dtype.

pairs_per_s is of steady training: jaxpo's leaves out the steps of the first epoch that compiled something, Tunix's its
first step; TRL compiles nothing and its counts all. jaxpo reads its reference from a table, which costs one forward
pass before the first epoch: pairs_per_s_with_table has it within, as if one epoch were all.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
PEERS = SHARED / "peers"
MODEL = Path("~/.cache/jaxpo-models/smollm2-135m-instruct").expanduser()
ENVIRONMENTS = Path("~/.cache/jaxpo/benchmarks").expanduser()
PACKAGES = {
    "jaxpo": ["-e", str(ROOT)],
    "trl": ["torch==2.13.0", "trl==1.16.0"],
    "tunix": ["google-tunix==0.1.7", "jax", "jinja2"],
}
DTYPES = ("float32", "bfloat16")
MAX_LENGTH = 1024
ROW_LENGTH = 2688
RATE = 1e-5
EPOCHS = 3

CEILING = """
import json, sys, time
size, best = 2048, 0.0
if sys.argv[1] == "jax":
    from jaxpo import compiler
    compiler.set_up(sys.argv[2])
    import jax, jax.numpy as jnp
    a = jnp.ones((size, size), sys.argv[2])
    # A CPU multiplies bfloat16 at its full speed only if asked for a float32 result.
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    run = lambda: product(a).block_until_ready()
else:
    import torch
    a = torch.ones((size, size), dtype=getattr(torch, sys.argv[2]))
    run = lambda: a @ a
run()
for _ in range(12):
    start = time.perf_counter()
    run()
    best = max(best, 2 * size**3 / (time.perf_counter() - start))
print(json.dumps(best))
"""

Result = dict[str, Any]


def python_of(system: str) -> Path:
    """The interpreter of a system's environment, made if it is not there."""
    folder = ENVIRONMENTS / system
    done = folder / "made"
    if not done.exists() or done.read_text() != repr(PACKAGES[system]):
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making the environment of {system} in {folder}", file=sys.stderr)
        subprocess.run([python312() if system == "tunix" else "python3", "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *PACKAGES[system]], check=True)
        done.write_text(repr(PACKAGES[system]))
    return folder / "bin" / "python"


def python312() -> str:
    """A Python 3.12 that works: a version manager's shim may only answer to the name."""
    installed = Path("~/.pyenv/versions").expanduser().glob("3.12*/bin/python3.12")
    for candidate in ("python3.12", *map(str, installed)):
        if shutil.which(candidate) and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    sys.exit("no python3.12 here, which Tunix needs; use --systems jaxpo,trl")


def output_of(command: list[Any]) -> str:
    """What a command prints; its whole output is shown if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}\nended with {done.returncode}")
    return done.stdout


def last_json(text: str) -> Any:
    return json.loads(text.strip().splitlines()[-1])


def jaxpo(rows: Path, pairs: int, batch: int, dtype: str, work: Path) -> Result:
    folder = Path(tempfile.mkdtemp(dir=work))
    config = {
        "model": {"path": str(MODEL), "compute_dtype": dtype, "remat": "dots"},
        "data": {
            "train": [{"path": str(rows), "limit": pairs}],
            "max_length": MAX_LENGTH,
            "max_prompt_length": None,
            "shuffle": False,
            "cache_dir": str(folder / "data"),
        },
        "objective": {"name": "dpo", "beta": 0.1},
        "reference": {"cache_dir": str(folder / "reference")},
        "training": {
            "batch_size": batch,
            "num_epochs": EPOCHS,
            "row_length": ROW_LENGTH,
            "row_shapes": 8,
            "max_grad_norm": 1.0,
            "save_every": None,
        },
        "optimizer": {"learning_rate": RATE, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0},
        "logging": {"every": 1},
        "samples": {"prompts": 0},
        "output_dir": str(folder / "run"),
    }
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    output_of([python_of("jaxpo"), "-m", "jaxpo.launch", "train", path])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds, rate = summary["seconds"], summary["pairs_per_s"]
    steps = [line for line in lines if "loss" in line]
    epoch = len(steps) // EPOCHS
    result = {
        "pairs_per_s": rate,
        "pairs_per_s_with_table": pairs / (pairs / rate + seconds["reference"]),
        "tokens_per_s": summary["tokens_per_s"],
        "useful_flops": 1e12 * summary["tflops_per_s"],
        "fill": 1.0 - summary["padding_fraction"],
        "peak_rss_gb": summary["peak_bytes"] / 1e9,
        "losses": [line["loss"] for line in steps[:epoch]],
        "seconds": seconds,
    }
    shutil.rmtree(folder)
    return result


def trl(rows: Path, pairs: int, batch: int, dtype: str, work: Path) -> Result:
    options = ["--pairs", pairs, "--batch", batch, "--micro", 2, "--dtype", dtype, "--max-length", MAX_LENGTH]
    return last_json(output_of([python_of("trl"), PEERS / "trl_dpo.py", MODEL, rows, *options, "--no-shuffle"]))


def tunix(rows: Path, pairs: int, batch: int, dtype: str, work: Path) -> Result:
    del dtype, work
    # Its first micro-step compiles and the next ones are alike: two batches say what more would.
    options = ["--pairs", min(pairs, 2 * batch), "--batch", batch, "--micro", 1]
    return last_json(output_of([python_of("tunix"), PEERS / "tunix_dpo.py", MODEL, rows, *options]))


RUN: dict[str, Callable[..., Result]] = {"jaxpo": jaxpo, "trl": trl, "tunix": tunix}


def ceiling(dtype: str, systems: list[str]) -> float:
    """FLOP/s of the fastest matrix product."""
    found = [last_json(output_of([python_of("jaxpo"), "-c", CEILING, "jax", dtype]))]
    if "trl" in systems:
        found.append(last_json(output_of([python_of("trl"), "-c", CEILING, "torch", dtype])))
    return max(found)


def medians(results: list[Result]) -> Result:
    """The median of every number over repeats; the first repeat's lists, which do not vary but by rounding."""
    first = results[0]
    found: Result = {}
    for name, value in first.items():
        if isinstance(value, dict):
            found[name] = medians([one[name] for one in results])
        elif isinstance(value, int | float):
            found[name] = median(one[name] for one in results)
        else:
            found[name] = value
    return found


def chart(report: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    systems = [system for system in RUN if system in report]
    height = 0.38
    for n, dtype in enumerate(DTYPES):
        at = [i + (n - 0.5) * height for i, s in enumerate(systems) if dtype in report[s]["pairs_per_s"]]
        rates = [report[s]["pairs_per_s"][dtype] for s in systems if dtype in report[s]["pairs_per_s"]]
        bars = axes.barh(at, rates, height, label=dtype)
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(systems)), systems)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("preference pairs per second")
    axes.set_title(report["what"], fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--quick", action="store_true", help="one repeat of two batches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="pairs of an epoch; three batches unless told")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--systems", default="jaxpo,trl,tunix")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    arguments = parser.parse_args()
    if not PEERS.is_dir() or not (MODEL / "model.safetensors").exists():
        sys.exit(f"needs {PEERS} and the weights in {MODEL}, as {SHARED / 'models' / 'get_smollm2.py'} writes them")
    if arguments.png and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--png needs matplotlib beside this script: pip install matplotlib")
    systems, dtypes = arguments.systems.split(","), arguments.dtypes.split(",")
    batch, repeats = arguments.batch, 1 if arguments.quick else arguments.repeats
    pairs = arguments.pairs or batch * (2 if arguments.quick else 3)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = work / "rows.jsonl"
        source = SHARED / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz"
        output_of([python_of("jaxpo"), PEERS / "hh_pairs.py", source, rows, pairs])
        found: dict[tuple[str, str], list[Result]] = {}
        ceilings: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
        for repeat in range(repeats):
            for dtype in dtypes:
                ceilings[dtype].append(ceiling(dtype, systems))
                for system in systems:
                    if system == "tunix" and dtype != "float32":
                        continue
                    result = RUN[system](rows, pairs, batch, dtype, work)
                    found.setdefault((system, dtype), []).append(result)
                    print(f"{repeat} {dtype} {system}: {result['pairs_per_s']:.4f} pairs/s", file=sys.stderr)
    report = summarise(found, {dtype: max(values) for dtype, values in ceilings.items()})
    report["what"] = f"DPO, SmolLM2-135M, {pairs} pairs of HH-RLHF, batches of {batch}, {repeats} repeat(s)"
    arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if arguments.png:
        chart(report, arguments.png)
    print(json.dumps(report["ratio"]))


def summarise(found: dict[tuple[str, str], list[Result]], ceilings: dict[str, float]) -> Result:
    """Per system and dtype: medians, the share of the ceiling in useful arithmetic, and jaxpo's ratios."""
    report: Result = {"ceiling_flops": ceilings, "ratio": {}, "runs": {f"{s} {d}": r for (s, d), r in found.items()}}
    for (system, dtype), results in found.items():
        one = medians(results)
        into = report.setdefault(system, {})
        for name, value in one.items():
            into.setdefault(name, {})[dtype] = value
    for dtype, most in ceilings.items():
        # What a pair costs is the same for every system: the tokens that it has.
        if ("jaxpo", dtype) not in found:
            continue
        ours = report["jaxpo"]
        per_pair = ours["useful_flops"][dtype] / ours["pairs_per_s"][dtype]
        for system in RUN:
            if (system, dtype) not in found:
                continue
            rate = report[system]["pairs_per_s"][dtype]
            report[system].setdefault("mfu", {})[dtype] = rate * per_pair / most
            if system != "jaxpo":
                ratio = ours["pairs_per_s"][dtype] / rate
                report["ratio"].setdefault(system, {})[dtype] = ratio
                memory = ours["peak_rss_gb"][dtype] / report[system]["peak_rss_gb"][dtype]
                report.setdefault("memory_ratio", {}).setdefault(system, {})[dtype] = memory
        if ("trl", dtype) in found:
            theirs = report["trl"]["losses"][dtype]
            gaps = [abs(a - b) for a, b in zip(ours["losses"][dtype], theirs, strict=True)]
            report.setdefault("loss_difference", {})[dtype] = max(gaps)
    return report


if __name__ == "__main__":
    main()
