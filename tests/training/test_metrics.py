"""Metrics on the host, and metrics.jsonl across crashes and resumed runs."""

import errno
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Metric
from jaxpo.errors import UserError
from jaxpo.training.metrics import FILE, JsonLines, Known, Record, checksum, means, read, total


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
    sink = JsonLines(folder, first, known(first))
    for step in range(first, last):
        sink.write(step + 1, {"loss": float(run)})
    sink.close()


def known(step: int) -> Known:
    """What a checkpoint of a step knows of the lines of `write_steps`, run 1."""
    records: list[Record] = [{"step": n, "loss": 1.0} for n in range(1, step + 1)]
    return Known(step, records[-1] if records else {}, checksum(records[:-1]))


def test_each_line_is_on_disk_once_written(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path, 0, known(0))
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
        sink = JsonLines(tmp_path, 0, known(0))
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


DAMAGE = [b"\0\0\0\0\n", b"{\n", b"7\n", b'{"loss": 1.0}\n', b"\xff\r\n"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path, damage: bytes) -> None:
    write_steps(tmp_path, 0, 3, run=1)
    path = tmp_path / FILE
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, damage, *rest]))
    with pytest.raises(UserError, match=f"^{path}:2 is damaged: "):
        JsonLines(tmp_path, 3, known(3))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_last_line_is_left_out(tmp_path: Path, damage: bytes) -> None:
    write_steps(tmp_path, 0, 3, run=1)
    with (tmp_path / FILE).open("ab") as file:
        file.write(damage)
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 10, 20])
def test_the_last_line_before_a_checkpoint_is_put_back(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, 0, 3, run=1)
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    JsonLines(tmp_path, 3, known(3)).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", [{"eval_loss": 0.25}, {"loss": 2.0}, {"losr": 1.0}])
def test_the_last_line_before_a_checkpoint_is_as_it_was_then(tmp_path: Path, change: Record) -> None:
    """What was added to it since is added again, for it may be damaged."""
    write_steps(tmp_path, 0, 3, run=1)
    whole = (tmp_path / FILE).read_bytes()
    sink = JsonLines(tmp_path, 3, known(3))
    sink.write(3, change)
    sink.close()
    assert (tmp_path / FILE).read_bytes() != whole
    JsonLines(tmp_path, 3, known(3)).close()
    assert (tmp_path / FILE).read_bytes() == whole


def test_a_line_that_was_changed_is_told(tmp_path: Path) -> None:
    """Any byte of the lines before a checkpoint, to something that is JSON still."""
    write_steps(tmp_path, 0, 5, run=1)
    path = tmp_path / FILE
    whole = path.read_bytes()
    start, end = (sum(map(len, whole.splitlines(keepends=True)[:n])) for n in (2, 3))
    told = 0
    for place in range(start, end):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"^{path}:3 is damaged|^{path} is damaged: ") as error:
            JsonLines(tmp_path, 4, known(4))
        told += "its first 3 lines are not those that it held" in str(error.value)
    assert told > 5


def test_a_checkpoint_before_the_first_logged_step_knows_the_evaluation(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path, 0, known(0))
    sink.write(0, {"eval_loss": 1.0})
    sink.write(3, {"eval_loss": 0.5})
    sink.close()
    JsonLines(tmp_path, 3, Known(1, {"step": 0, "eval_loss": 1.0}, 0)).close()
    assert lines(tmp_path) == [{"step": 0, "eval_loss": 1.0}]


def test_lines_that_are_lost_are_told(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 5, run=1)
    path = tmp_path / FILE
    first, _, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, *rest]))
    with pytest.raises(UserError, match=f"^{path} is damaged: its first 3 lines are not those that it held"):
        JsonLines(tmp_path, 4, known(4))
    assert len(lines(tmp_path)) == 4
    path.unlink()
    for _ in range(2):
        # Killed before its next checkpoint, a run comes here again.
        JsonLines(tmp_path, 4, known(4)).close()
        assert lines(tmp_path) == [{"step": 4, "loss": 1.0}]


def test_an_error_of_a_write_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = JsonLines(tmp_path, 0, known(0))
    sink.write(1, {"loss": 1.0})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        sink.flush()
    assert caught.value.filename == str(tmp_path / FILE)
    sink.close()


def test_without_a_file_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert read(tmp_path) == []
