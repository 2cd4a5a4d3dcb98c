from pathlib import Path

import cluster
import pytest


@pytest.fixture(scope="session")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    cluster.run(folder / "logs", 1, 1, *cluster.training(tiny, folder))
    return folder / "run"
