"""Fixtures every test may use. The suite runs on eight simulated CPU devices."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/jaxpo/xla-tests").expanduser()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared, the real models and data beside the project, which is absent here")
    return folder


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """SmolLM2-135M-Instruct with its weights, as ../shared/models/get_smollm2.py writes it."""
    folder = Path("~/.cache/jaxpo-models/smollm2-135m-instruct").expanduser()
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"needs the weights that {shared / 'models/get_smollm2.py'} writes")
    return folder
