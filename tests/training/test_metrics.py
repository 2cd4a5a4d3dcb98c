"""Metrics on the host, and metrics.jsonl across crashes and resumed runs."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Metric
from jaxpo.errors import UserError
from jaxpo.training.metrics import FILE, JsonLines, means, read, total


def metric(total: float, weight: float) -> Metric:
    return Metric(jnp.float32(total), jnp.float32(weight))


def test_sums_are_taken_in_float64() -> None:
    """In float32 a thousand small terms would vanish beside a large one."""
    parts = [{"a": metric(2.0**24, 1.0)}, *[{"a": metric(1.0, 1.0)}] * 1000]
    assert total(parts)["a"] == (2.0**24 + 1000, 1001.0)


def test_a_mean_weighs_its_parts() -> None:
    parts = [{"a": metric(6.0, 3.0), "b": metric(1.0, 1.0)}, {"a": metric(2.0, 1.0)}]
    assert means(total(parts)) == {"a": 2.0, "b": 1.0}
    assert means(total(parts), "eval_") == {"eval_a": 2.0, "eval_b": 1.0}


def test_a_mean_of_nothing_is_none() -> None:
    assert means(total([{"a": metric(0.0, 0.0)}])) == {"a": None}


def lines(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]


def write_steps(folder: Path, first: int, last: int, run: int) -> None:
    sink = JsonLines(folder, first)
    for step in range(first, last):
        sink.write(step + 1, {"loss": float(run)})
    sink.close()


def test_each_line_is_on_disk_once_written(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path, 0)
    sink.write(1, {"loss": 0.5, "eval_loss": None})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "eval_loss": None}]
    sink.write(2, {"loss": np.inf, "grad_norm": np.nan})
    assert lines(tmp_path)[1] == {"step": 2, "loss": None, "grad_norm": None}
    assert read(tmp_path) == lines(tmp_path)
    sink.close()


def test_a_resumed_run_drops_later_lines_and_writes_them_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 5, run=1)
    write_steps(tmp_path, 3, 6, run=2)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


def test_a_run_that_starts_again_from_the_beginning_writes_step_0_once(tmp_path: Path) -> None:
    """A run that is killed before its first checkpoint has evaluated already, as step 0."""
    for run in (1, 2):
        sink = JsonLines(tmp_path, 0)
        sink.write(0, {"eval_loss": float(run)})
        sink.write(1, {"loss": float(run)})
        sink.close()
    assert lines(tmp_path) == [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 2.0}]


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 3, run=1)
    path = tmp_path / FILE
    whole = path.read_text(encoding="utf-8")
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut], encoding="utf-8")
        assert [r["step"] for r in read(tmp_path)] == [1, 2]
    write_steps(tmp_path, 2, 4, run=2)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 1), (3, 2), (4, 2)]


@pytest.mark.parametrize("damage", ["\0\0\0\0\n", "{\n", "7\n", '{"loss": 1.0}\n'])
def test_a_damaged_line_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    write_steps(tmp_path, 0, 3, run=1)
    path = tmp_path / FILE
    path.write_text(damage + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        JsonLines(tmp_path, 3)
    assert str(path) in str(caught.value)


def test_without_a_file_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert read(tmp_path) == []
