"""What a bad input is tried on: a folder with a good config, good rows and a good model, one thing in it made bad."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("cases")
CASES = {f"{folder.parent.name}/{folder.name}" for folder in FOLDER.glob("*/*")}

CONFIG = """\
model: {path: llama, compute_dtype: float32, remat: none}
data:
  train: [{path: pairs.jsonl}]
  eval: [{path: eval.jsonl}]
  max_length: 128
  cache_dir: cache/data
objective: {name: dpo}
reference: {cache_dir: cache/reference}
training: {batch_size: 4, row_length: 256, max_steps: 1}
samples: {prompts: 0}
output_dir: run
"""


@dataclass(frozen=True)
class Case:
    """A command with one thing wrong, and what its message has to say.

    name: the folder `cases/NAME`, where there is one, is laid over the good folder, file by file. change: what else is
    made bad, in the folder, by code. The command is `train config.yaml` with `overrides` unless `command` says another.
    mended: overrides or a change with which the same command then works, though the mistake came first.
    """

    name: str
    tells: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    change: Callable[[Path], object] | None = None
    command: tuple[str, ...] = ("train", "config.yaml")
    mended: tuple[str, ...] | Callable[[Path], object] | None = None

    @property
    def arguments(self) -> list[str]:
        return [*self.command, *self.overrides]


def check_paragraph(case: Case, told: str) -> None:
    """One paragraph that begins with `error: `, shows nothing of Python's, and says what the case expects."""
    assert told.startswith("error: "), told
    assert told.count("\n") == 1 and told.endswith("\n"), told
    assert "Traceback" not in told and not re.search(r"\.py\b|<function |object at 0x", told), told
    missing = [text for text in case.tells if text not in told]
    assert not missing, f"{missing} not in: {told}"
    assert len(told) < 2500, told
