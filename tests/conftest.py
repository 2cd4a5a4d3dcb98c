"""Fixtures every test may use. The suite runs on eight simulated CPU devices."""

import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest
from hypothesis import settings

from jaxpo import compiler

ROOT = Path(__file__).resolve().parent.parent

# The same inputs every time: what a random one finds shall not fail an innocent change.
settings.register_profile("suite", derandomize=True)
settings.load_profile("suite")

jax.config.update("jax_num_cpu_devices", 8)
# Both dtypes are tested in one process: the flags of one that are sound for the other too.
compiler.set_up("bfloat16")
# The threads of eight devices are none of the business of processes that tests start with one.
jax.devices()
os.environ.pop("NPROC", None)
jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/jaxpo/xla-tests").expanduser()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# What starts processes, again and again, takes the longest: left to the end, one worker would wait for another.
FIRST = ("distributed", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in FIRST)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        _lacking("needs ../shared, the real models and data beside the project, which is absent here")
    return folder


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """SmolLM2-135M-Instruct with its weights, as ../shared/models/get_smollm2.py writes it."""
    folder = Path("~/.cache/jaxpo-models/smollm2-135m-instruct").expanduser()
    if not (folder / "model.safetensors").exists():
        _lacking("needs the weights that ../shared/models/get_smollm2.py writes")
    return folder


def _lacking(what: str) -> None:
    """Skip; but where ../shared is known to be there, a test that does not use it is a failure."""
    if os.environ.get("JAXPO_REQUIRE_SHARED"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run of seconds needs: dpo.yaml and sft.yaml, their rows, and llama/, a random model.

    The configs have every key but output_dir; tests give that, and what else they want otherwise, as overrides.
    """
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


TINY_CONFIG = """\
model: {{path: {folder}/llama, compute_dtype: float32, remat: none}}
data:
  train: [{{path: {folder}/{kind}.jsonl}}]
  eval: [{{path: {folder}/{kind}-eval.jsonl}}]
  max_length: 128
  cache_dir: {folder}/data
objective: {{name: {kind}}}
reference: {{cache_dir: {folder}/reference}}
training: {{batch_size: 8, row_length: 256, max_steps: 6, eval_every: 3, save_every: 2}}
optimizer: {{learning_rate: 1.0e-2, schedule: cosine, warmup_ratio: 0.2, weight_decay: 0.1}}
mesh: {{data: 1, fsdp: -1, tensor: 1}}
logging: {{every: 1}}
samples: {{prompts: 0}}
"""
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def make_tiny(folder: Path) -> None:
    """Write the folder of `tiny`. 80 pairs make two chunks of the reference table, so that a kill can come between."""
    from jaxpo.data import world
    from jaxpo.data.tokenizer import train_tokenizer
    from jaxpo.models.export import export
    from jaxpo.models.scratch import build

    def english(split: str, count: int) -> list[dict[str, Any]]:
        return list(islice((row for row in world.rows("customer-service", split) if str(row).isascii()), count))

    rows = {
        "dpo": english("train", 80),
        "dpo-eval": english("test", 16),
        "sft": english("sft-train", 64),
        "sft-eval": english("sft-test", 16),
    }
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    for kind in ("dpo", "sft"):
        (folder / f"{kind}.yaml").write_text(TINY_CONFIG.format(folder=folder, kind=kind), encoding="utf-8")
    texts = (message["content"] for row in rows["dpo"] for part in row.values() for message in part)
    tokenizer = train_tokenizer(texts, 400, "chatml")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    new = build(TINY_LLAMA, len(tokenizer), special, jax.random.key(0))
    export(new.decoder, new.hf_config, folder / "llama", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`reward_model(**config)`: the folder of a random reward model with the tokenizer of `tiny`."""
    import numpy as np

    from jaxpo.models.checkpoint import read_checkpoint
    from jaxpo.models.convert import load_decoder
    from jaxpo.models.export import export

    def make(**config: Any) -> Path:
        checkpoint = read_checkpoint(tiny / "llama", head="score")
        decoder = load_decoder(checkpoint, "float32", seed=0)
        decoder = jax.tree.map(lambda leaf: leaf + 0.1 * np.sin(np.arange(leaf.size)).reshape(leaf.shape), decoder)
        folder = tmp_path_factory.mktemp("reward") / "hf"
        export(decoder, {**checkpoint.hf_config, **config}, folder, tokenizer=tiny / "llama")
        return folder

    return make


@pytest.fixture(scope="session")
def small_decoder() -> Any:
    """A random `Decoder` of two layers with NumPy arrays for leaves; its heads divide by 4, its widths by 8."""
    import numpy as np

    from jaxpo.models.decoder import Decoder, DecoderConfig, Rotary

    config = DecoderConfig(
        vocab_size=96,
        width=32,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        mlp_width=48,
        mlp="gated",
        activation="silu",
        norm="rms",
        norm_eps=1e-5,
        positions=Rotary(10_000.0),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        head="tied",
        std=0.1,
        residual_std=0.1,
    )
    return jax.tree.map(np.asarray, Decoder(config, jax.random.key(0), np.float32))


@pytest.fixture(scope="session")
def pairs() -> list[Any]:
    """Sixteen `Example`s of 3 to 100 random tokens, for `small_decoder`."""
    import numpy as np

    from jaxpo.batch import Example

    rng = np.random.default_rng(0)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(0, 96, rng.integers(1, longest), dtype=np.int32)

    return [Example(f"pairs.jsonl:{n + 1}", ids(40), (ids(30), ids(30))) for n in range(16)]
