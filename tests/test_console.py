"""Progress, lines and tables, on a terminal and off it."""

import os
import pty
import subprocess
import sys

import pytest

from jaxpo import console


class Clock:
    """A time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_plain_lines_come_at_the_start_every_ten_seconds_and_at_the_end(capsys, clock: Clock):
    with console.progress("Tokenising", 1000, "rows") as progress:
        assert printed(capsys) == ["Tokenising: 0/1,000 rows"]
        for _ in range(9):
            clock.now += 1.0
            progress.advance(10)
        assert printed(capsys) == []
        clock.now += 1.0
        progress.advance(10)
        assert printed(capsys) == ["Tokenising: 100/1,000 rows, 10%, 10.0 rows/s, 1:30 left"]
        clock.now += 9.5
        progress.advance(300)
        assert printed(capsys) == []
        progress.describe("loss 0.5")
        clock.now += 0.5
        progress.advance(0)
        assert printed(capsys) == ["Tokenising: 400/1,000 rows, 40%, 20.0 rows/s, 0:30 left, loss 0.5"]
        progress.advance(600)
    assert printed(capsys) == ["Tokenising: 1,000/1,000 rows, done in 0:20, 50.0 rows/s, loss 0.5"]


def test_the_rate_leaves_out_what_was_done_before_a_resume(capsys, clock: Clock):
    with console.progress("training", 100, "step", completed=90) as progress:
        clock.now += 20.0
        progress.advance(5)
    assert printed(capsys)[1] == "training: 95/100 step, 95%, 4.0 s/step, 0:20 left"


def test_bytes_and_unknown_totals(capsys, clock: Clock):
    with console.progress("loading", 3_000_000_000, "B") as progress:
        clock.now += 2.0
        progress.advance(3_000_000_000)
    assert printed(capsys)[-1] == "loading: 3.0 GB/3.0 GB, done in 0:02, 1.5 GB/s"
    with console.progress("reading", None, "rows") as progress:
        clock.now += 3700.0
        progress.advance(7400)
    assert printed(capsys) == [
        "reading: 0 rows",
        "reading: 7,400 rows, 2.0 rows/s",
        "reading: 7,400 rows, done in 1:01:40, 2.0 rows/s",
    ]


def test_a_failure_is_not_reported_as_done(capsys, clock: Clock):
    with pytest.raises(ValueError, match="broken"), console.progress("reading", 10, "rows") as progress:
        progress.advance(3)
        raise ValueError("broken")
    assert printed(capsys)[-1] == "reading: 3/10 rows, stopped after 0:00"


def test_lines_keep_brackets_and_lose_control_characters(capsys):
    console.say("[bold]x[/bold] \x1b[31mred\x07 " + "long " * 60)
    console.warn("[careful]\x1b")
    out, err = capsys.readouterr()
    assert out == "[bold]x[/bold] \ufffd[31mred\ufffd " + "long " * 60 + "\n"
    assert err == "warning: [careful]\ufffd\n"


def test_a_table_aligns_numbers_and_keeps_every_character(capsys):
    console.table("Dropped", ("reason", "rows"), [("equal [answers]", 7), ("空的回答", 1234), ("x" * 100, 0.5)])
    out = capsys.readouterr().out
    assert "equal [answers]" in out
    assert "│    7 │" in out
    assert out.count("x") == 100


SCRIPT = """
import sys, time
from jaxpo.console import progress, say, warn
with progress("outer", 40, "rows") as outer:
    for i in range(40):
        time.sleep(0.01)
        outer.advance()
        if i == 10:
            say("a line")
            warn("a warning")
        if i == 20:
            with progress("inner", 3, "batches") as inner:
                inner.advance(3)
                inner.describe("a note")
"""


def on_terminal(script: str, stderr: int | None) -> tuple[str, str]:
    """What a script writes to a terminal of 100 columns, and to stderr if that is a pipe."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=follower,
        stderr=follower if stderr is None else stderr,
        stdin=follower,
        env=environment,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(leader)
    _, err = process.communicate()
    assert process.returncode == 0, shown
    return shown.decode(), (err or b"").decode()


def test_a_terminal_gets_a_bar_with_rate_and_time_and_whole_lines_above_it():
    shown, _ = on_terminal(SCRIPT, None)
    assert "40/40 rows" in shown
    assert "rows/s" in shown
    assert "left" in shown
    assert "in 0:00" in shown
    assert "inner" in shown
    lines = [line.rpartition("\x1b[2K")[2] for line in shown.replace("\r", "\n").splitlines()]
    assert "a line" in lines
    assert any(line.endswith("a warning") and "outer" not in line for line in lines)


def test_warnings_go_to_stderr_when_that_is_a_file():
    shown, err = on_terminal(SCRIPT, subprocess.PIPE)
    assert err == "warning: a warning\n"
    assert "a warning" not in shown
