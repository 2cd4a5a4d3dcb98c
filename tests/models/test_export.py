import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from jaxpo.errors import UserError
from jaxpo.models import export as export_module
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder
from jaxpo.models.export import MARK, export
from jaxpo.models.scratch import Scratch

Model = Callable[..., Scratch]


def write(scratch: Scratch, folder: Path, **options: Any) -> None:
    export(scratch.decoder, scratch.hf_config, folder, **options)


def test_shards_stay_below_their_size_and_the_index_names_them(model: Model, tmp_path: Path) -> None:
    scratch = model()
    write(scratch, tmp_path / "hf", max_shard_bytes=15_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    names: dict[str, str] = {}
    for file in sorted((tmp_path / "hf").glob("*.safetensors")):
        with safe_open(file, "np") as shard:
            assert shard.metadata() == {"format": "pt"}
            names |= dict.fromkeys(shard.keys(), file.name)
            assert sum(shard.get_tensor(name).nbytes for name in shard.keys()) <= 15_000  # noqa: SIM118
    assert index["weight_map"] == names
    leaves = jax.tree.leaves(scratch.decoder)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in leaves)
    assert index["metadata"]["total_parameters"] == sum(leaf.size for leaf in leaves)
    assert max(names.values()) == f"model-{len(set(names.values())):05d}-of-{len(set(names.values())):05d}.safetensors"


def test_the_configuration_tells_dtype_and_architecture(model: Model, tmp_path: Path) -> None:
    scratch = model("qwen3")
    hf_config = {**scratch.hf_config, "torch_dtype": "float16", "_name_or_path": "/somewhere", "architectures": None}
    export(scratch.decoder, hf_config, tmp_path / "hf", dtype="bfloat16")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert (written["dtype"], written["architectures"]) == ("bfloat16", ["Qwen3ForCausalLM"])
    assert not {"torch_dtype", "_name_or_path"} & set(written)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 16, 101)


def test_generation_configuration(model: Model, tmp_path: Path) -> None:
    scratch = model()
    write(scratch, tmp_path / "default")
    config = GenerationConfig.from_pretrained(tmp_path / "default")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    write(
        scratch, tmp_path / "given", generation_config={"eos_token_id": [2, 5], "temperature": 0.5, "do_sample": True}
    )
    config = GenerationConfig.from_pretrained(tmp_path / "given")
    assert (config.eos_token_id, config.temperature) == ([2, 5], 0.5)


def reward_model(model: Model, folder: Path, **values: Any) -> tuple[Decoder, dict[str, Any]]:
    """A decoder with a new score head, and its configuration."""
    scratch = model()
    export(scratch.decoder, {**scratch.hf_config, **values}, folder)
    checkpoint = read_checkpoint(folder, head="score")
    return load_decoder(checkpoint, "float32", seed=0), {**checkpoint.hf_config}


def test_the_configuration_of_a_reward_model(model: Model, tmp_path: Path) -> None:
    values = {"num_labels": 4, "id2label": None, "label2id": None, "problem_type": "single_label_classification"}
    decoder, hf_config = reward_model(model, tmp_path / "lm", **values)
    export(decoder, hf_config, tmp_path / "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert (written["id2label"], written["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    assert not {"num_labels", "problem_type"} & set(written)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.num_labels, config.pad_token_id) == (1, 0)
    assert not (tmp_path / "hf/generation_config.json").exists()


def test_a_label_keeps_its_name(model: Model, tmp_path: Path) -> None:
    decoder, hf_config = reward_model(model, tmp_path / "lm")
    names = {"id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}}
    export(decoder, {**hf_config, **names}, tmp_path / "hf")
    assert AutoConfig.from_pretrained(tmp_path / "hf").id2label == {0: "REWARD"}


def test_a_padding_token_takes_the_place_of_the_tokenizer_s(model: Model, tmp_path: Path, shared: Path) -> None:
    source = shared / "models/smollm2-135m-instruct"
    decoder, hf_config = reward_model(model, tmp_path / "lm")
    export(decoder, {**hf_config, "pad_token_id": 0}, tmp_path / "hf", tokenizer=source, pad_token="<|endoftext|>")
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(source)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert original.pad_token_id == original.eos_token_id == tokenizer.eos_token_id == 2
    text = "a<|im_end|> b<|endoftext|> c"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_tokenizer_and_its_chat_template_come_along(
    model: Model, tmp_path: Path, shared: Path, as_folder: bool
) -> None:
    source = shared / "models/smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(source)
    write(model(), tmp_path / "hf", tokenizer=source if as_folder else tokenizer)
    copy = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "你好, how are you?"}]
    assert copy.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == 101


def test_an_earlier_export_is_replaced(model: Model, tmp_path: Path) -> None:
    first, second = model(), model("gpt2")
    write(first, tmp_path / "hf", max_shard_bytes=10_000)
    write(second, tmp_path / "hf")
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        MARK,
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    assert read_checkpoint(tmp_path / "hf").decoder_config == second.config


def test_a_folder_with_other_files_is_left_alone(model: Model, tmp_path: Path) -> None:
    scratch = model()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files that no export of jaxpo wrote \(thesis\.txt\)"):
        write(scratch, tmp_path / "notes")
    write(scratch, tmp_path / "hf")
    (tmp_path / "hf/README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md"):
        write(scratch, tmp_path / "hf")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        write(scratch, tmp_path / "file")
    assert (tmp_path / "notes/thesis.txt").read_text() == "years of work"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "hf", "notes"]


def test_an_empty_folder_is_filled(model: Model, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    write(model(), tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").is_file()
    assert (tmp_path / "hf").stat().st_mode & 0o777 == tmp_path.joinpath(
        "hf/config.json"
    ).stat().st_mode & 0o777 | 0o111


def test_a_failed_export_leaves_the_earlier_one(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = model()
    write(scratch, tmp_path / "hf")
    before = (tmp_path / "hf/model.safetensors").read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export_module, "_write_json", full_disk)
    with pytest.raises(UserError, match="hf cannot be written: No space left"):
        write(model("gpt2"), tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_what_a_killed_export_left_is_taken_away(model: Model, tmp_path: Path) -> None:
    for name in (".hf.new-abc", ".hf.old-abc", ".hf2.new-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    write(model(), tmp_path / "hf")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".hf2.new-abc", "hf"]


def test_a_sharded_decoder_is_written_whole(model: Model, tmp_path: Path) -> None:
    scratch = model()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(leaf: jax.Array) -> jax.Array:
        last = "fsdp" if leaf.shape[-1] % 8 == 0 else None
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), last)))

    write(scratch._replace(decoder=jax.tree.map(spread, scratch.decoder)), tmp_path / "hf")
    jax.tree.map(
        np.testing.assert_array_equal, load_decoder(read_checkpoint(tmp_path / "hf"), "float32"), scratch.decoder
    )


def test_a_tokenizer_that_cannot_be_written_is_told(model: Model, tmp_path: Path) -> None:
    """tokenizers raises Exception itself, with the words of its file system."""

    class Full:
        def save_pretrained(self, save_directory: str) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"the tokenizer cannot be written to .*: No space left on device"):
        write(model(), tmp_path / "hf", tokenizer=Full())
    assert [*tmp_path.iterdir()] == []
