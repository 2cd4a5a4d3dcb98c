"""The course of a run as pictures: a line for training, points for the held-out evaluation."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxpo import atomic

Record = Mapping[str, float | int | None]

INK, PALE = "#24292f", "#6e7781"
BLUE, ORANGE = "#1f6fb4", "#d95f0e"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#d0d7de",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10.0,
    "grid.color": "#eaeef2",
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": PALE,
    "xtick.major.size": 0.0,
    "ytick.color": PALE,
    "ytick.major.size": 0.0,
}
# Below so many points a curve is drawn as it is.
SMOOTHED_FROM = 20


@dataclass(frozen=True)
class Plot:
    """A picture: its file, what it says, and the metrics in it with what they are called there.

    `line` is a value to mark as a thin line: chance, or zero. `percent` is for shares.
    """

    file: str
    title: str
    note: str
    unit: str
    metrics: Mapping[str, str]
    line: float | None = None
    percent: bool = False


PLOTS = (
    Plot("loss", "Loss", "of the objective; lower is better", "loss", {"loss": ""}),
    Plot(
        "accuracy",
        "Preference accuracy",
        "pairs whose chosen answer has the higher reward; the dashed line is chance",
        "share of pairs",
        {"rewards/accuracies": ""},
        line=0.5,
        percent=True,
    ),
    Plot(
        "token_accuracy",
        "Token accuracy",
        "tokens of the chosen answer that the model held to be the likeliest",
        "share of tokens",
        {"mean_token_accuracy": ""},
        percent=True,
    ),
    Plot(
        "margins",
        "Reward margin",
        "reward of the chosen answer less that of the rejected one",
        "margin (nats)",
        {"rewards/margins": ""},
        line=0.0,
    ),
    Plot(
        "rewards",
        "Rewards",
        "beta times the log-ratio of an answer, policy to reference",
        "reward (nats)",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        line=0.0,
    ),
    Plot(
        "kl",
        "Distance to the reference",
        "mean log-ratio per token of the data's answers, policy to reference",
        "log-ratio (nats per token)",
        {"kl/chosen": "chosen", "kl/rejected": "rejected"},
        line=0.0,
    ),
)


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write FOLDER/NAME.png for every picture of `PLOTS` whose metrics the records have, and return their paths.

    A record holds a `step` and metrics by name, those of the evaluation under `eval_NAME`; None is a missing value.
    """
    paths = []
    for plot in PLOTS:
        figure = draw(plot, records)
        if figure is None:
            continue
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=160)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{plot.file}.png"
        atomic.write_bytes(path, picture.getvalue())
        paths.append(path)
    return paths


def draw(plot: Plot, records: Sequence[Record]) -> Figure | None:
    """The picture, or None where the records have nothing of it."""
    curves = {name: (points(records, name), points(records, f"eval_{name}")) for name in plot.metrics}
    if not any(len(steps) for pair in curves.values() for steps, _ in pair):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colours = [(BLUE, BLUE), (ORANGE, ORANGE)] if len(curves) > 1 else [(BLUE, ORANGE)]
        for (name, (train, held_out)), (line, dots) in zip(curves.items(), colours, strict=True):
            what = plot.metrics[name]
            _draw_training(axes, *train, f"{what}, training".strip(", "), line)
            _draw_held_out(axes, *held_out, f"{what}, held-out".strip(", "), dots)
        if plot.line is not None:
            axes.axhline(plot.line, color=PALE, linewidth=1.0, linestyle=(0, (4, 4)), zorder=2)
        if plot.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(max(high, 0.6), 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        axes.set_title(plot.title, loc="left", fontsize=13.0, fontweight="bold", pad=24.0)
        above = {"xytext": (0.0, 9.0), "textcoords": "offset points"}
        axes.annotate(plot.note, (0.0, 1.0), xycoords="axes fraction", fontsize=9.0, color=PALE, **above)
        axes.legend(loc="best")
    return figure


def points(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and values [N] of a metric, where it is a finite number."""
    found = [(record["step"], value) for record in records if (value := record.get(name)) is not None]
    kept = [(step, value) for step, value in found if step is not None and math.isfinite(value)]
    steps, values = np.array(kept, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Values [N] averaged with a Gaussian over about a fiftieth of them to either side; the ends with what is there."""
    sigma = len(values) / 50.0
    reach = math.ceil(3.0 * sigma)
    kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    weights = np.convolve(np.ones_like(values), kernel)[reach : reach + len(values)]
    return np.convolve(values, kernel)[reach : reach + len(values)] / weights


def _draw_training(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    if len(steps) == 0:
        return
    if len(steps) < SMOOTHED_FROM:
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, label=label, zorder=3)
        return
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.25, zorder=2)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=f"{label} (smoothed)", zorder=3)


def _draw_held_out(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    if len(steps) == 0:
        return
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=1.0,
        linestyle=(0, (2, 2)),
        marker="o",
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=1.2,
        label=label,
        zorder=4,
    )
