"""The closing report: metrics before and after, sample answers, and the files they go to."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from jaxpo.evaluation import report

BEFORE = {
    "eval_loss": 0.6931,
    "eval_kl/chosen": 0.0,
    "eval_rewards/accuracies": 0.5,
    "eval_rewards/margins": 0.0,
    "eval_another": 1.0,
}
AFTER = {
    **BEFORE,
    "eval_loss": 0.1,
    "eval_rewards/accuracies": 0.985,
    "eval_rewards/margins": -1.5,
    "eval_another": None,
}
PROMPTS = ["<|im_start|>user\nWhere is my [red]lamp[/red]?<|im_end|>\n<|im_start|>assistant\n", "我的背包在哪里。" * 12]


def lines(*printed: Any, width: int = 100) -> list[str]:
    console = Console(record=True, width=width, force_terminal=False)
    for thing in printed:
        console.print(thing)
    return [line.rstrip() for line in console.export_text().splitlines()]


def row(shown: list[str], name: str) -> list[str]:
    [line] = [line for line in shown if f" {name} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_comparison_starts_with_what_matters_and_shows_the_change():
    shown = lines(report.comparison(BEFORE, AFTER))
    assert row(shown, "eval_rewards/accuracies") == ["eval_rewards/accuracies", "50.0 %", "98.5 %", "+48.5 pp"]
    assert row(shown, "eval_loss") == ["eval_loss", "0.6931", "0.1000", "-0.5931"]
    assert row(shown, "eval_another") == ["eval_another", "1.0000", "-", ""]
    order = [next(i for i, line in enumerate(shown) if f" {name} " in line) for name in (
        "eval_rewards/accuracies", "eval_loss", "eval_rewards/margins", "eval_kl/chosen", "eval_another"
    )]  # fmt: skip
    assert order == sorted(order)


def test_a_metric_of_one_side_only_is_shown():
    shown = lines(report.comparison({}, {"eval_loss": 0.5}))
    assert row(shown, "eval_loss") == ["eval_loss", "-", "0.5000", ""]


def names(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """The metrics of the table, from its top."""
    return [str(cell) for cell in report.comparison(before, after).columns[0].cells]


@pytest.mark.parametrize(
    ("metrics", "first"),
    [
        (["loss", "logps/chosen", "rewards/accuracies", "kl/abs", "rewards/margins"], "rewards/accuracies"),
        (["loss", "accuracy", "margin", "calibration_error", "confidence", "mean_reward"], "accuracy"),
        (["loss", "rewards/top1", "rewards/accuracies"], "rewards/accuracies"),
        (["loss", "mean_token_accuracy"], "loss"),
    ],
)
def test_what_a_family_is_there_for_stands_on_top(metrics: list[str], first: str):
    values = {f"eval_{name}": 0.5 for name in metrics}
    found = names(values, values)
    assert found[0] == f"eval_{first}"
    assert set(found) == set(values)


def test_the_terms_of_a_loss_follow_it():
    values = {f"eval_{name}": 1.0 for name in ("rewards/margins", "loss/sft", "loss", "nll_loss", "loss/dpo", "kl")}
    assert names(values, values)[:4] == ["eval_loss", "eval_loss/dpo", "eval_loss/sft", "eval_nll_loss"]


def test_shares_of_every_family_are_percentages():
    shares = ["accuracy", "confidence", "calibration_error", "rewards/top1", "rewards/accuracies"]
    shown = lines(report.comparison({f"eval_{n}": 0.25 for n in shares}, {f"eval_{n}": 0.5 for n in shares}))
    for name in shares:
        assert row(shown, f"eval_{name}") == [f"eval_{name}", "25.0 %", "50.0 %", "+25.0 pp"]


def test_a_metric_without_a_value_on_either_side_is_no_line():
    nothing: Any = {"eval_rewards/rejected": None, "eval_loss": 0.5}
    assert names(nothing, nothing) == ["eval_loss"]


def test_less_is_better_of_errors_and_losses():
    less = {"eval_calibration_error": 0.2, "eval_loss/dpo": 0.7, "eval_nll_loss": 2.0}
    before = {**less, "eval_confidence": 0.6, "eval_kl/abs": 1.0}
    after = {name: value / 2 for name, value in before.items()}
    table = report.comparison(before, after)
    styles = {str(n): str(c.style) for n, c in zip(table.columns[0].cells, table.columns[3].cells, strict=True)}  # type: ignore[union-attr]
    assert styles == {**dict.fromkeys(before, ""), **dict.fromkeys(less, "green")}


def test_better_is_green_and_worse_is_red_where_that_can_be_said():
    changes = [cell for cell in report.comparison(BEFORE, AFTER).columns[3].cells if isinstance(cell, Text)]
    styles = [str(change.style) for change in changes]
    assert styles == ["green", "green", "red", "", ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = {
        "prompts": PROMPTS,
        "before": ["No.\x1b[2J", ""],
        "after": ["Gladly ```done```!", "很高兴为您服务。" * 12],
    }
    (tmp_path / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    (tmp_path / "export").mkdir()
    return tmp_path


SUMMARY = {
    "before": BEFORE,
    "after": AFTER,
    "reference": {"computed": 12, "reused": 3},
    "pairs_per_s": 33.14,
    "tokens_per_s": 12345.6,
    "peak_bytes": 1_500_000_000,
    "steps": 70,
    "seconds": {"train": 60.4, "data": 5.0},
}


def test_the_closing_report_tells_samples_metrics_and_places(folder: Path, capsys: pytest.CaptureFixture[str]):
    report.show(folder, SUMMARY)
    out = capsys.readouterr().out
    assert "Where is my [red]lamp[/red]?" in out
    assert "<|im_start|>" not in out
    assert "(nothing)" in out
    assert "\x1b" not in out
    assert "eval_rewards/accuracies" in out
    assert "70 steps in 1 min 5 s, 33.1 examples/s, 12,345.6 tokens/s, peak memory 1.50 GB\n" in out
    assert "reference log-probs: 12 computed, 3 reused\n" in out
    assert str(folder / "export") in out
    assert str(folder / "plots") not in out


def test_panels_close_in_line_around_wide_characters(folder: Path, capsys: pytest.CaptureFixture[str]):
    report.show(folder, SUMMARY)
    framed = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "│╭╰" and "┃" not in line]
    panels = framed[: max(i for i, line in enumerate(framed) if line.startswith("╰")) + 1]
    assert len(panels) >= 12
    assert len({cell_len(line) for line in panels}) == 1


def test_samples_are_written_as_markdown_that_nothing_breaks(folder: Path):
    report.write_markdown(folder)
    text = (folder / "samples.md").read_text(encoding="utf-8")
    assert PROMPTS[0].rstrip() in text
    assert "````text\nGladly ```done```!\n````\n" in text
    assert text.count("## ") == 2
    assert not list(folder.glob("*.partial"))


def test_a_run_without_samples_or_evaluation_is_reported_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = {**SUMMARY, "before": {}, "after": {}, "reference": {"computed": 0, "reused": 0}, "pairs_per_s": None}
    report.show(tmp_path, summary)
    report.write_markdown(tmp_path)
    out = capsys.readouterr().out
    assert out == "70 steps in 1 min 5 s, 12,345.6 tokens/s, peak memory 1.50 GB\n"
    assert not list(tmp_path.iterdir())
