"""How DPO of an 8B model would scale from 1 to 1,024 chips at fixed work for each: a prediction, drawn.

    python tests/benchmarks/weak_scaling.py --png docs/weak-scaling.png --json OUT.json

Nothing is measured: it is the roofline that `python -m jaxpo.launch plan` goes by, over links as their vendors publish
them; what it assumes is printed and stands in the JSON. Rows of 4,096 tokens hold two pairs each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from accelerator import LLAMA

from jaxpo.config import DataConfig, DataSource, ModelConfig, OptimizerConfig, Run, TrainingConfig
from jaxpo.planning.hardware import CHIPS
from jaxpo.planning.weak_scaling import ASSUMPTIONS, Point, curve
from jaxpo.planning.work import FSDP, batches_of
from jaxpo.training.flops import Counts

ROW = 4096
# Two pairs of a prompt of 1,024 tokens and answers of 512.
PAIR = (1024, 512, 512)
COUNTS = [1 << n for n in range(11)]
KINDS = {"v5e": "TPU v5e", "v5p": "TPU v5p", "h100": "H100, 8 a host, 400 Gb/s each"}


def run_of(rows: int) -> Run:
    return Run(
        model=ModelConfig(path="llama-3-8b", dtype="bfloat16", compute_dtype="bfloat16", remat="full"),
        data=DataConfig(train=(DataSource(path="pairs.jsonl"),), max_length=ROW),
        training=TrainingConfig(batch_size=2, row_length=ROW, rows_per_device=rows),
        optimizer=OptimizerConfig(state_dtype="bfloat16"),
    )


def main() -> None:
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=2, help="rows of 4,096 tokens that a chip computes in a step")
    arguments = parser.parse_args()
    run = run_of(arguments.rows)
    prompt, *completions = PAIR
    row: Counts = batches_of(np.array([prompt]), np.array([completions]), run, None, "the script").counts
    curves: dict[str, list[Point]] = {}
    for name in KINDS:
        chip = next(chip for chip in CHIPS if chip.name == name)
        curves[name] = list(curve(run, LLAMA, chip, COUNTS, row))
        for point in curves[name]:
            print(name, described(point))
    for line in ASSUMPTIONS:
        print(f"- {line}")
    if arguments.json:
        report = {"assumptions": ASSUMPTIONS, "rows": arguments.rows, "row_length": ROW}
        listed = {name: [described(point) for point in points] for name, points in curves.items()}
        arguments.json.write_text(json.dumps({**report, **listed}, indent=1), encoding="utf-8")
    draw(curves, arguments.rows, arguments.png)


def described(point: Point) -> dict[str, Any]:
    found = point.estimate
    return {
        "chips": point.chips,
        "fsdp": found.step.sizes[FSDP],
        "efficiency": round(point.efficiency, 4),
        "serial": round(point.serial, 4),
        "mfu": round(point.mfu, 4),
        "step_s": round(found.times.total, 4),
        "bound_by": found.times.bound_by,
        "peak_gib": round(found.memory.peak / 2**30, 2),
        "verdict": found.verdict,
    }


def draw(curves: dict[str, list[Point]], rows: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, points), shift in zip(curves.items(), (-5, 5, 0), strict=True):
        x, best = [point.chips for point in points], [100 * point.efficiency for point in points]
        (line,) = axes.plot(x, best, marker="o", markersize=4, label=KINDS[name])
        axes.fill_between(x, best, [100 * point.serial for point in points], alpha=0.15, color=line.get_color())
        axes.annotate(
            f"{best[-1]:.0f} %",
            (x[-1], best[-1]),
            xytext=(8, shift),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=line.get_color(),
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    axes.set_ylim(0, 105)
    axes.set_xlabel("chips")
    axes.set_ylabel("speed of a chip, % of one without links")
    axes.set_title(
        f"predicted, not measured: DPO of an 8B Llama, all weights, {rows} rows of 4,096 tokens a chip", fontsize=9
    )
    axes.legend(
        frameon=False, fontsize=8, loc="lower left", title="shaded: down to no overlap of links and products"
    ).get_title().set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
