import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxpo.errors import UserError
from jaxpo.models import native
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder, abstract_decoder, by_path, logical_axes
from jaxpo.models.export import export
from jaxpo.models.scratch import Scratch

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]
Model = Callable[..., Scratch]


def assert_same_bits(one: Decoder, other: Decoder) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def exported(model: Model, folder: Path, model_type: str = "llama", dtype: str = "float32", **options: Any) -> Scratch:
    """A random model, written to `folder`."""
    architecture = options.pop("architecture", {})
    scratch = model(model_type, dtype, **architecture)
    export(scratch.decoder, scratch.hf_config, folder, **options)
    return scratch


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rewrite_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_hf_of_to_hf_is_the_same_bits(model: Model, tmp_path: Path, model_type: str, dtype: str) -> None:
    scratch = exported(model, tmp_path / "hf", model_type, dtype, max_shard_bytes=10_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    checkpoint = read_checkpoint(tmp_path / "hf")
    assert checkpoint.decoder_config == scratch.config
    assert_same_bits(load_decoder(checkpoint, dtype), scratch.decoder)


def test_weights_are_cast_on_the_way(model: Model, tmp_path: Path) -> None:
    scratch = exported(model, tmp_path / "hf")
    bf16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), scratch.decoder)
    assert_same_bits(load_decoder(read_checkpoint(tmp_path / "hf"), "bfloat16"), bf16)


def test_loads_onto_a_mesh(model: Model, tmp_path: Path) -> None:
    scratch = exported(model, tmp_path / "hf")
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=auto, devices=jax.devices()[:4])
    rules = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}

    axes = jax.tree.leaves(logical_axes(scratch.config), is_leaf=lambda x: isinstance(x, tuple))
    shardings = [NamedSharding(mesh, PartitionSpec(*(rules.get(name or "") for name in names))) for names in axes]
    abstract = abstract_decoder(scratch.config, jnp.float32)
    placed = jax.tree.structure(abstract).unflatten(shardings)
    decoder = load_decoder(read_checkpoint(tmp_path / "hf"), "float32", placed)
    assert_same_bits(decoder, scratch.decoder)
    assert [leaf.sharding for leaf in jax.tree.leaves(decoder)] == shardings


def test_a_loaded_decoder_does_not_hang_on_the_file(model: Model, tmp_path: Path) -> None:
    scratch = exported(model, tmp_path / "hf")
    decoder = load_decoder(read_checkpoint(tmp_path / "hf"), "float32")
    with (tmp_path / "hf/model.safetensors").open("r+b") as file:
        file.write(b"\xff" * (tmp_path / "hf/model.safetensors").stat().st_size)
    assert_same_bits(decoder, scratch.decoder)


def test_a_stored_copy_of_a_tied_head_is_passed_over(model: Model, tmp_path: Path) -> None:
    scratch = exported(model, tmp_path / "hf", "qwen2")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert_same_bits(load_decoder(read_checkpoint(tmp_path / "hf"), "float32"), scratch.decoder)
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read_checkpoint(tmp_path / "hf")


def test_gpt2_without_prefix_and_with_masks(model: Model, tmp_path: Path) -> None:
    scratch = exported(model, tmp_path / "hf", "gpt2")

    def as_published(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)

    rewrite(tmp_path / "hf", as_published)
    checkpoint = read_checkpoint(tmp_path / "hf")
    assert any("2 tensors *.attn.bias are not read: the causal mask" in note for note in checkpoint.notes)
    assert_same_bits(load_decoder(checkpoint, "float32"), scratch.decoder)


def test_rotary_frequencies_in_old_checkpoints_are_passed_over(model: Model, tmp_path: Path) -> None:
    scratch = exported(model, tmp_path / "hf")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    assert_same_bits(load_decoder(read_checkpoint(tmp_path / "hf"), "float32"), scratch.decoder)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_s_own_files(model: Model, tmp_path: Path, sharded: bool) -> None:
    torch = pytest.importorskip("torch", reason="pytorch_model.bin is read by torch")
    scratch = exported(model, tmp_path / "hf", dtype="bfloat16", max_shard_bytes=30_000 if sharded else 10**9)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        tensors = pytest.importorskip("safetensors.torch").load_file(file)
        torch.save(tensors, tmp_path / "hf" / file.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        file.unlink()
    index = tmp_path / "hf/model.safetensors.index.json"
    if sharded:
        text = index.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
        (tmp_path / "hf/pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    checkpoint = read_checkpoint(tmp_path / "hf")
    assert all(file.suffix == ".bin" for file in checkpoint.weight_files)
    assert_same_bits(load_decoder(checkpoint, "bfloat16"), scratch.decoder)
    victim = checkpoint.weight_files[-1]
    victim.write_bytes(victim.read_bytes()[:-2000])
    with pytest.raises(UserError, match=f"{victim.name} is cut, damaged or no file of weights"):
        read_checkpoint(tmp_path / "hf")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # any import of it fails
from pathlib import Path
import numpy as np
from jaxpo.errors import UserError
from jaxpo.models import native
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.export import export
from jaxpo.models.generate import greedy

folder = Path(sys.argv[1])
checkpoint = read_checkpoint(folder)
decoder = load_decoder(checkpoint, "float32")
export(decoder, checkpoint.hf_config, folder / "again")
assert len(greedy(load_decoder(read_checkpoint(folder / "again"), "float32"), [np.array([3, 4])], 2, {2})[0])
(folder / "model.safetensors").rename(folder / "pytorch_model.bin")
try:
    read_checkpoint(folder)
except UserError as error:
    print(error)
"""


def test_torch_is_asked_for_by_its_own_files_only(model: Model, tmp_path: Path) -> None:
    exported(model, tmp_path / "hf")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "hf")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pytorch_model.bin is in torch's own format, and torch is not installed" in run.stdout


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"somebody/no-such-model at revision v1 .*hf download somebody/no-such-model"):
        read_checkpoint("somebody/no-such-model", "v1")


def test_the_hub_s_snapshot_is_used(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = exported(model, tmp_path / "snapshot")
    asked = []

    def snapshot(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision, "*.safetensors" in allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert_same_bits(load_decoder(read_checkpoint("somebody/model", "main"), "float32"), scratch.decoder)
    assert asked == [("somebody/model", "main", True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_reward_model_from_hf_of_to_hf_is_the_same_bits(
    model: Model, tmp_path: Path, model_type: str, dtype: str
) -> None:
    scratch = exported(model, tmp_path / "lm", model_type, dtype)
    start = read_checkpoint(tmp_path / "lm", head="score")
    decoder = load_decoder(start, dtype, seed=3)
    export(decoder, start.hf_config, tmp_path / "hf", max_shard_bytes=10_000)
    checkpoint = read_checkpoint(tmp_path / "hf", head="score")
    assert not checkpoint.has_new_head
    assert read_checkpoint(tmp_path / "hf", head="stored").decoder_config == checkpoint.decoder_config
    assert "score.weight" in checkpoint.tensors
    assert "lm_head.weight" not in checkpoint.tensors
    assert_same_bits(load_decoder(checkpoint, dtype), decoder)
    # All but the head is the language model's.
    params = by_path(scratch.decoder)
    for path, leaf in by_path(decoder).items():
        if path != "score":
            assert np.asarray(leaf).tobytes() == np.asarray(params[path]).tobytes()


def native_copy(folder: Path, head: Any, dtype: str = "float32", **options: Any) -> tuple[Path, Decoder]:
    """The checkpoint in jaxpo's own format beside it, and the decoder in it."""
    checkpoint = read_checkpoint(folder, head=head)
    decoder = load_decoder(checkpoint, dtype, **options)
    native.write(decoder, folder, [Path("config.json")], folder.with_name("native"))
    return folder.with_name("native"), decoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_new_score_head_on_jaxpo_s_own_format(model: Model, tmp_path: Path, tied: bool, dtype: str) -> None:
    exported(model, tmp_path / "hf", "llama", dtype, architecture={"tie_word_embeddings": tied})
    folder, _ = native_copy(tmp_path / "hf", "lm", dtype)
    from_hf = load_decoder(read_checkpoint(tmp_path / "hf", head="score"), dtype, seed=3)
    from_native = read_checkpoint(folder, head="score")
    assert from_native.has_new_head
    assert_same_bits(load_decoder(from_native, dtype, seed=3), from_hf)


def test_a_reward_model_in_jaxpo_s_own_format(model: Model, tmp_path: Path) -> None:
    exported(model, tmp_path / "lm")
    start = read_checkpoint(tmp_path / "lm", head="score")
    export(load_decoder(start, "float32", seed=3), start.hf_config, tmp_path / "hf")
    folder, decoder = native_copy(tmp_path / "hf", "stored")
    assert_same_bits(load_decoder(read_checkpoint(folder, head="score"), "float32"), decoder)
    with pytest.raises(UserError, match=r"native/config\.json: found architectures LlamaForSequenceClassification"):
        read_checkpoint(folder)


def test_a_new_score_head_is_drawn_from_the_seed(model: Model, tmp_path: Path) -> None:
    architecture = {"hidden_size": 512, "num_hidden_layers": 1, "initializer_range": 0.03}
    exported(model, tmp_path / "hf", "llama", architecture=architecture)
    checkpoint = read_checkpoint(tmp_path / "hf", head="score")

    def score(seed: int, dtype: str = "float32", shardings: Decoder | None = None) -> np.ndarray:
        decoder = load_decoder(checkpoint, dtype, shardings, seed=seed)
        assert decoder.score is not None
        return np.asarray(decoder.score[...])

    drawn = score(0)
    assert (drawn.shape, drawn.dtype) == ((1, 512), np.float32)
    np.testing.assert_allclose(drawn.std(), 0.03, rtol=0.1)
    np.testing.assert_allclose(drawn.mean(), 0.0, atol=0.005)
    np.testing.assert_array_equal(score(0), drawn)
    assert np.all(score(1) != drawn)
    np.testing.assert_array_equal(score(0, "bfloat16"), drawn.astype(ml_dtypes.bfloat16))
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spread = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    abstract = abstract_decoder(checkpoint.decoder_config, jnp.float32)
    last = jax.tree.map(
        lambda leaf: spread if leaf.shape == (1, 512) else NamedSharding(mesh, PartitionSpec()), abstract
    )
    np.testing.assert_array_equal(score(0, shardings=last), drawn)
    with pytest.raises(ValueError, match="no seed to draw one from"):
        load_decoder(checkpoint, "float32")


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_head_is_left_out_of_a_reward_model_and_said(model: Model, tmp_path: Path, tied: bool) -> None:
    exported(model, tmp_path / "hf", "llama", architecture={"tie_word_embeddings": tied})
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors["model.norm.weight"]}))
    checkpoint = read_checkpoint(tmp_path / "hf", head="score")
    assert checkpoint.notes == (
        f"{tmp_path / 'hf'}: lm_head.weight is not read: a score head stands in its place.",
        f"{tmp_path / 'hf'} is a language model: its score head is new, drawn at random.",
    )
    assert checkpoint.has_new_head
    assert not {"lm_head.weight", "score.weight"} & set(checkpoint.tensors)
    assert load_decoder(checkpoint, "float32", seed=0).head is None


def test_a_bare_model_becomes_a_reward_model(model: Model, tmp_path: Path) -> None:
    """A checkpoint of transformers' AutoModel: no head, no prefix."""
    exported(model, tmp_path / "hf", "gpt2", architecture={"tie_word_embeddings": False})
    whole = load_decoder(read_checkpoint(tmp_path / "hf", head="score"), "float32", seed=0)

    def bare(tensors: dict[str, np.ndarray]) -> None:
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(tmp_path / "hf", bare)
    checkpoint = read_checkpoint(tmp_path / "hf", head="score")
    assert not any("lm_head" in note for note in checkpoint.notes)
    assert_same_bits(load_decoder(checkpoint, "float32", seed=0), whole)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            "config.json: found id2label of 3 labels; expected num_labels 1",
        ),
        ({"id2label": None, "num_labels": 5}, "config.json: found num_labels of 5 labels; expected num_labels 1"),
        ({"id2label": None}, "found neither num_labels nor id2label, which means 2 labels; expected num_labels 1"),
        ({"architectures": ["LlamaForCausalLM"]}, "1 are unknown (score.weight)"),
    ],
)
def test_what_is_no_reward_model_is_told(model: Model, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    exported(model, tmp_path / "lm", "llama")
    start = read_checkpoint(tmp_path / "lm", head="score")
    export(load_decoder(start, "float32", seed=0), start.hf_config, tmp_path / "hf")
    assert not read_checkpoint(tmp_path / "hf", head="score").has_new_head
    rewrite_json(tmp_path / "hf/config.json", **values)
    with pytest.raises(UserError) as raised:
        read_checkpoint(tmp_path / "hf", head="score")
    assert words in str(raised.value)
    assert str(tmp_path / "hf") in str(raised.value)


def test_a_reward_model_without_its_head_is_not_given_a_new_one(model: Model, tmp_path: Path) -> None:
    exported(model, tmp_path / "lm", "llama")
    start = read_checkpoint(tmp_path / "lm", head="score")
    export(load_decoder(start, "float32", seed=0), start.hf_config, tmp_path / "hf")
    remove("score")(tmp_path / "hf")
    with pytest.raises(UserError, match=r"1 tensors are missing \(score\.weight\)"):
        read_checkpoint(tmp_path / "hf", head="score")


def cut(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def remove(words: str) -> Callable[[Path], None]:
    """Take away the tensors whose names have `words` in them."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if words in name]:
            del tensors[name]

    return lambda folder: rewrite(folder, change)


Q0 = "model.layers.0.self_attn.q_proj.weight"
BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config cut": (lambda f: cut(f / "config.json", 20), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "found a list; expected a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "weights cut": (lambda f: cut(f / "model.safetensors", 500), "model.safetensors is cut: its header promises"),
    "header cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x00\x10\0\0\0\0\0\0{}"),
        "is cut or no safetensors",
    ),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "it has 0 bytes"),
    "header no json": (lambda f: (f / "model.safetensors").write_bytes(b"\x04\0\0\0\0\0\0\0abcd"), "is damaged"),
    "lfs pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "git lfs pull"),
    "tensor missing": (remove(Q0), f"1 tensors are missing ({Q0})"),
    "many missing": (remove("mlp"), "6 tensors are missing (model.layers.0.mlp.gate_proj.weight"),
    "tensor unknown": (
        lambda f: rewrite(f, lambda t: t.update({"score.weight": np.ones(3)})),
        "1 are unknown (score.weight)",
    ),
    "wrong shape": (
        lambda f: rewrite_json(f / "config.json", vocab_size=99),
        "of shape [101, 32]; config.json asks for [99, 32]",
    ),
    "wrong depth": (lambda f: rewrite_json(f / "config.json", num_hidden_layers=3), "9 tensors are missing"),
    "integers": (lambda f: rewrite(f, lambda t: t.update({Q0: t[Q0].astype(np.int32)})), f"found {Q0} of type int32"),
    "another model": (
        lambda f: rewrite_json(f / "config.json", model_type="qwen2"),
        "are missing (model.layers.0.self_attn.q_proj.bias",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_checkpoint_says_what_is_wrong(model: Model, tmp_path: Path, breakage: str) -> None:
    exported(model, tmp_path / "hf")
    break_it, words = BREAKAGES[breakage]
    break_it(tmp_path / "hf")
    with pytest.raises(UserError) as raised:
        read_checkpoint(tmp_path / "hf")
    assert words in str(raised.value)
    assert str(tmp_path / "hf") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_broken_index_says_what_is_wrong(model: Model, tmp_path: Path) -> None:
    exported(model, tmp_path / "hf", max_shard_bytes=30_000)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{shards[1].name} is cut"):
        read_checkpoint(tmp_path / "hf")
    shards[1].unlink()
    with pytest.raises(UserError, match=f"of which 1 are missing: {shards[1].name}"):
        read_checkpoint(tmp_path / "hf")
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(UserError, match=f"is in {shards[1].name}; it is not there"):
        read_checkpoint(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="found no weight_map"):
        read_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize(
    ("path", "words"), [("./nowhere", "does not exist"), ("/no/such/folder", "does not exist"), ("file", "is a file")]
)
def test_no_checkpoint_at_all(tmp_path: Path, path: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        read_checkpoint(path)


MEASURE = """
import sys
from pathlib import Path
import jax
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.export import export

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

folder, dtype = sys.argv[1:]
checkpoint = read_checkpoint(folder)
# The interpreter, jax and the compiler have taken what they take; and no memory is free that the next could reuse.
held = jax.block_until_ready(load_decoder(checkpoint, dtype))
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts anew
decoder = jax.block_until_ready(load_decoder(checkpoint, dtype))
peak = status("VmHWM") - before
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
export(decoder, checkpoint.hf_config, Path(folder).parent / "again", dtype="float32")
print(sum(leaf.nbytes for leaf in jax.tree.leaves(decoder)), peak, status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about 200 MB in several files."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    architecture = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 7}
    exported(model, folder, architecture=architecture, max_shard_bytes=45_000_000)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads its peak memory from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_model_and_a_tensor_writing_a_tensor(large: Path, dtype: str) -> None:
    """On the CPU the host holds the model once; the rest is the largest tensor, mapped from the file and cast.

    Writing takes the largest tensor likewise, though all of the model goes into one file.
    """
    files = list(large.glob("*.safetensors"))
    assert len(files) > 4
    assert sum(file.stat().st_size for file in files) > 190_000_000
    command = [sys.executable, "-c", MEASURE, str(large), dtype]
    # Freed memory goes back to the system at once, so that what is measured is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    model_bytes, loading, writing = map(int, run.stdout.splitlines()[-1].split())
    largest = 512 * 4096 * 4
    print(f"{dtype}: {(loading - model_bytes) / 1e6:.1f} MB above the model to load, {writing / 1e6:.1f} MB to write")
    assert model_bytes * 0.9 < loading < model_bytes + 2 * largest + 16_000_000
    assert writing < 2 * largest + 16_000_000


def test_bfloat16_files_hold_bfloat16(model: Model, tmp_path: Path) -> None:
    exported(model, tmp_path / "hf", dtype="bfloat16")
    tensor = read_checkpoint(tmp_path / "hf").tensors["model.norm.weight"]
    assert tensor.dtype == ml_dtypes.bfloat16
    assert tensor.nbytes == 64
