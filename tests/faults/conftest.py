import json
import random
from pathlib import Path

import pytest
from command import Command, Commands, command


@pytest.fixture
def interrupted(tiny: Path, tmp_path: Path) -> Command:
    """A command to interrupt."""
    return command(tiny, tmp_path)


@pytest.fixture(scope="session")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that was never interrupted."""
    undisturbed = command(tiny, tmp_path_factory.mktemp("whole"))
    undisturbed.run()
    return undisturbed.out


def commands(tiny: Path, folder: Path, *changes: str) -> Commands:
    return Commands(command(tiny, folder / "interrupted", *changes), command(tiny, folder / "undisturbed", *changes))


@pytest.fixture
def moving(tiny: Path, tmp_path: Path) -> Commands:
    """A run whose reference is an average that moves after every second step."""
    return commands(tiny, tmp_path, "reference.sync_steps=2", "reference.mixup_alpha=0.6", "training.save_every=3")


@pytest.fixture
def kto(tiny: Path, tmp_path: Path) -> Commands:
    """A run with a term of the whole batch, on labels, and a beta that adapts itself."""
    rows = tmp_path / "labels.jsonl"
    rows.write_text(labelled((tiny / "dpo.jsonl").read_text(encoding="utf-8")), encoding="utf-8")
    data = (f"data.train=[{{path: {rows}}}]", f"data.eval=[{{path: {rows}, limit: 8}}]")
    band = "control.adaptive_beta={kl_low: 1, kl_high: 2, rate: 0.5}"
    return commands(tiny, tmp_path, "objective={name: kto}", *data, band)


def labelled(pairs: str) -> str:
    """The first 48 of JSON Lines of pairs as answers that are desirable or not."""
    rows = [json.loads(line) for line in pairs.splitlines()[:48]]
    answers = [(row, "rejected" if n % 3 else "chosen") for n, row in enumerate(rows)]
    return "".join(
        json.dumps({"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}) + "\n"
        for row, which in answers
    )


@pytest.fixture
def moments() -> random.Random:
    return random.Random(0)
