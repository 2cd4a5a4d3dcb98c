import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import CASES, CONFIG, FOLDER, Case, check_paragraph

from jaxpo import launch


@pytest.fixture
def bench(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: config.yaml, pairs.jsonl, eval.jsonl and the model llama/, all of them good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    (tmp_path / "config.yaml").write_text(CONFIG)
    for name, of, rows in (("pairs", "dpo", 8), ("eval", "dpo-eval", 4), ("answers", "sft", 8)):
        lines = (tiny / f"{of}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    (tmp_path / "llama").symlink_to(tiny / "llama")
    return tmp_path


@pytest.fixture
def lay(bench: Path) -> Callable[[Case], None]:
    """Make the good folder bad."""

    def make(case: Case) -> None:
        if case.name in CASES:
            shutil.copytree(FOLDER / case.name, bench, dirs_exist_ok=True)
        if case.change is not None:
            case.change(bench)

    return make


@pytest.fixture
def refused(
    bench: Path, lay: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Case], None]:
    """Try a case: it must be refused as it should, before a step is taken, and work once it is mended."""

    def step(*_: Any) -> None:
        raise AssertionError("a training step was taken")

    def check(case: Case) -> None:
        lay(case)
        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr("jaxpo.run.make_train_step", lambda *_: step)
            code = launch.main(case.arguments)
        told = capsys.readouterr().err.splitlines(keepends=True)
        check_paragraph(case, "".join(line for line in told if not line.startswith("warning: ")))
        assert code == 2
        if case.mended is None:
            return
        if callable(case.mended):
            case.mended(bench)
            code = launch.main(case.arguments)
        else:
            code = launch.main([*case.arguments, *case.mended])
        assert code == 0, capsys.readouterr().err
        assert list(bench.glob("*/summary.json"))

    return check
