import random
from pathlib import Path

import pytest
from command import Command


def command(tiny: Path, folder: Path, *changes: str) -> Command:
    places = (f"output_dir={folder}/run", f"reference.cache_dir={folder}/reference")
    return Command(folder, (str(tiny / "dpo.yaml"), *places, *changes))


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


@pytest.fixture
def moments() -> random.Random:
    return random.Random(0)
