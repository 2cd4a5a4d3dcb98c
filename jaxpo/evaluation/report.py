"""What a person sees at the end of a run: held-out metrics before and after, sample answers, and where things are."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxpo import atomic, console
from jaxpo.batch import direction

Metrics = Mapping[str, float | int | None]

PREFIX = "eval_"
# What matters most comes first; metrics that are not named here follow by name.
ORDER = (
    "accuracy",
    "rewards/accuracies",
    "rewards/top1",
    "loss",
    "nll_loss",
    "margin",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "log_odds_chosen",
    "log_odds_ratio",
    "calibration_error",
    "confidence",
    "mean_reward",
    "kl",
    "reward_shift",
    "kl/abs",
    "kl/chosen",
    "kl/rejected",
    "logps/accuracies",
    "logps/chosen",
    "logps/rejected",
    "mean_token_accuracy",
)
# The terms of a mixture's loss; they come after the loss.
TERM = "loss/"
SHARES = (
    "accuracy",
    "rewards/accuracies",
    "rewards/top1",
    "logps/accuracies",
    "calibration_error",
    "confidence",
    "mean_token_accuracy",
)

_MARKER = re.compile(r"<\|[^|<>]+\|>|</?s>|\[/?INST\]")


def show(folder: Path, summary: Mapping[str, Any]) -> None:
    """Print the closing report of the run in `folder` from its summary and samples.json."""
    if texts := answers(folder):
        show_samples(*texts)
    if summary["after"]:
        console.console.print(comparison(summary["before"], summary["after"]))
    for line in _figures(summary):
        console.say(line)
    for name, what in (("export", "Hugging Face checkpoint"), ("plots", "plots"), ("summary.json", "figures")):
        if (folder / name).exists():
            console.say(f"{what:<24} {folder / name}")


def answers(folder: Path) -> tuple[list[str], list[str], list[str]] | None:
    """Prompts, and answers before and after, of samples.json; None where there is none."""
    samples = folder / "samples.json"
    if not samples.exists():
        return None
    texts = json.loads(samples.read_text(encoding="utf-8"))
    # Samples from before are missing where their file was moved away while the run was on.
    return texts["prompts"], texts.get("before", [""] * len(texts["prompts"])), texts["after"]


def write_markdown(folder: Path) -> None:
    """samples.md, from samples.json."""
    if texts := answers(folder):
        atomic.write_text(folder / "samples.md", samples_markdown(*texts))


def comparison(before: Metrics, after: Metrics) -> Table:
    """A table of held-out metrics before and after training and their change, green for better and red for worse."""
    table = Table(title="Held-out metrics", title_justify="left", title_style="bold")
    table.add_column("metric")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name in sorted(before.keys() | after.keys(), key=_rank):
        old, new = before.get(name), after.get(name)
        if old is None and new is None:
            continue
        bare = name.removeprefix(PREFIX)
        change = "" if old is None or new is None else _value(bare, new - old, sign="+")
        table.add_row(Text(name), _value(bare, old), _value(bare, new), Text(change, style=_style(bare, old, new)))
    return table


def show_samples(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """Print each prompt with its greedy answers before and after training."""
    for number, (prompt, old, new) in enumerate(zip(prompts, before, after, strict=True), 1):
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("prompt", Text(console.printable(_plain(prompt))))
        grid.add_row("before", Text(console.printable(old.strip()) or "(nothing)", style="yellow"))
        grid.add_row("after", Text(console.printable(new.strip()) or "(nothing)", style="green"))
        console.console.print(Panel(grid, title=f"sample {number}", title_align="left", border_style="dim"))


def samples_markdown(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> str:
    """The samples as a Markdown document; texts stand in blocks, so that nothing in them is taken for markup."""
    parts = ["# Greedy answers before and after training\n"]
    for number, texts in enumerate(zip(prompts, before, after, strict=True), 1):
        parts.append(f"## {number}\n")
        for title, text in zip(("Prompt", "Before", "After"), texts, strict=True):
            fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
            parts.append(f"{title}:\n\n{fence}text\n{text.rstrip()}\n{fence}\n")
    return "\n".join(parts)


def _figures(summary: Mapping[str, Any]) -> list[str]:
    reference, seconds = summary["reference"], sum(summary["seconds"].values())
    lines = [
        f"{summary['steps']} steps in {_clock(seconds)}"
        + "".join(f", {summary[key]:,.1f} {unit}" for key, unit in _RATES.items() if summary.get(key) is not None)
        + f", peak memory {summary['peak_bytes'] / 1e9:.2f} GB"
    ]
    if reference["computed"] or reference["reused"]:
        lines.append(f"reference log-probs: {reference['computed']} computed, {reference['reused']} reused")
    return lines


# The first has TRL users' name for it in the summary, whatever the examples are: pairs, answers or lists.
_RATES = {"pairs_per_s": "examples/s", "tokens_per_s": "tokens/s"}


def _rank(name: str) -> tuple[int, str]:
    bare = name.removeprefix(PREFIX)
    place = "loss" if bare.startswith(TERM) else bare
    return (ORDER.index(place) if place in ORDER else len(ORDER), name)


def _value(bare: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if bare in SHARES:
        # A change of a share is told in percentage points.
        return f"{100.0 * value:{sign}z.1f} {'pp' if sign else '%'}"
    return f"{value:{sign}z.4f}"


def _style(bare: str, old: float | None, new: float | None) -> str:
    # A distance to the reference grows with whatever is learnt: that alone is nothing bad.
    better = 0 if bare.startswith("kl") else direction(bare)
    if old is None or new is None or not better or old == new:
        return ""
    return "green" if (new - old) * better > 0 else "red"


def _plain(prompt: str) -> str:
    """A prompt without the template's markers and empty lines, for reading."""
    lines = (line.strip() for line in _MARKER.sub("\n", prompt).splitlines())
    return "\n".join(line for line in lines if line)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
