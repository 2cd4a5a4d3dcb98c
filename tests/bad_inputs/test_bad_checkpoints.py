"""Bad models: weights, configurations and tokenizers that are cut, damaged, missing, or of another model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Case

from jaxpo.models.safetensors_files import read_header, write

BAD = "bad"
WEIGHTS = "model.safetensors"


def model(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A copy of the good model as `bad`, changed."""

    def make(folder: Path) -> None:
        shutil.copytree(folder / "llama", folder / BAD)
        change(folder / BAD)

    return make


def bad(name: str, *tells: str, change: Callable[[Path], object], **fields: Any) -> Case:
    return Case(name, tells, ("model.path=bad",), model(change), **fields)


def config(**changes: object) -> Callable[[Path], None]:
    """Other values in config.json; None takes a key out."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        merged = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))

    return change


def replaced(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another header on the same data."""

    def make(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        changed = change(entries)
        raw = json.dumps(entries if changed is None else changed).encode()
        (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])

    return make


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Other tensors."""

    def make(folder: Path) -> None:
        file = folder / WEIGHTS
        values = {name: np.array(tensor.read()) for name, tensor in read_header(file).items()}
        change(values)
        write(file, {name: (value.dtype, value.shape) for name, value in values.items()}, values.values())

    return make


def sharded(folder: Path, lost: bool = False, wrong: bool = False) -> None:
    """The weights in two files with an index."""
    values = {name: np.array(tensor.read()) for name, tensor in read_header(folder / WEIGHTS).items()}
    names = list(values)
    (folder / WEIGHTS).unlink()
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    weight_map = {name: file for file, listed in files.items() for name in listed}
    for file, listed in files.items():
        write(folder / file, {n: (values[n].dtype, values[n].shape) for n in listed}, [values[n] for n in listed])
    if lost:
        (folder / "model-2.safetensors").unlink()
    if wrong:
        weight_map[names[0]] = "model-2.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tokenizer(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def more_tokens(folder: Path) -> None:
    """A tokenizer with words that the embedding has no row for."""
    from transformers import PreTrainedTokenizerFast

    known = PreTrainedTokenizerFast.from_pretrained(str(folder))
    known.add_tokens(["kettle", "lamp"])
    known.save_pretrained(str(folder))


def other_tokens(folder: Path) -> None:
    """A tokenizer of as many tokens whose ids are others."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (token for token, i in vocabulary.items() if i in (100, 101))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


def gpt2(folder: Path) -> None:
    """A GPT-2 with 16 positions, fewer than the examples have."""
    import jax

    from jaxpo.models.export import export
    from jaxpo.models.scratch import build

    architecture = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    new = build(architecture, rows, {}, jax.random.key(0))
    export(new.decoder, new.hf_config, folder / "new", tokenizer=folder)
    for file in (folder / "new").iterdir():
        file.replace(folder / file.name)
    (folder / "new").rmdir()


def nan_weights(values: dict[str, np.ndarray]) -> None:
    values["model.norm.weight"][3] = np.nan


def swapped(entries: dict[str, Any], field: str, value: object, name: str = "model.norm.weight") -> None:
    entries[name][field] = value


def torch_file(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


SAFETENSORS = [
    bad(
        "weights cut",
        "bad/model.safetensors is cut",
        "Fetch it again",
        change=cut(WEIGHTS, 50_000),
        mended=("model.path=llama",),
    ),
    bad(
        "weights cut in the header",
        "bad/model.safetensors is cut or no safetensors file",
        "500 bytes",
        change=cut(WEIGHTS, 500),
    ),
    bad(
        "weights of no bytes",
        "bad/model.safetensors is cut or no safetensors file: it has 0 bytes",
        change=cut(WEIGHTS, 0),
    ),
    bad(
        "weights of text",
        "bad/model.safetensors is cut or no safetensors file",
        change=replaced(WEIGHTS, "not weights at all"),
    ),
    bad(
        "weights that Git LFS keeps",
        "bad/model.safetensors is a Git LFS pointer",
        "git lfs pull",
        change=replaced(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
    ),
    bad(
        "header damaged",
        "bad/model.safetensors is damaged: its header cannot be read",
        change=lambda f: replaced(WEIGHTS, (f / WEIGHTS).read_bytes().replace(b'"dtype"', b'"dtype:', 1))(f),
    ),
    bad(
        "header nested",
        "bad/model.safetensors is damaged",
        change=replaced(WEIGHTS, (100_000).to_bytes(8, "little") + b"[" * 100_000),
    ),
    bad("header is a list", "bad/model.safetensors is damaged", change=header(lambda entries: [entries])),
    bad(
        "header of offsets below zero",
        "bad/model.safetensors is damaged",
        "model.norm.weight",
        change=header(lambda e: swapped(e, "data_offsets", [-64, 64])),
    ),
    bad(
        "header of a shape below zero",
        "bad/model.safetensors",
        "model.norm.weight",
        change=header(lambda e: swapped(e, "shape", [-4, -8])),
    ),
    bad(
        "header of half a row",
        "bad/model.safetensors is damaged",
        "model.norm.weight",
        change=header(lambda e: swapped(e, "shape", [32.0])),
    ),
    bad(
        "header of tensors that overlap",
        "bad/model.safetensors is damaged",
        "model.norm.weight",
        change=header(lambda e: swapped(e, "data_offsets", [0, 128])),
    ),
    bad(
        "header of a type unknown",
        "bad/model.safetensors: found model.norm.weight of type F8_E4M3",
        "F32",
        change=header(lambda e: swapped(e, "dtype", "F8_E4M3")),
    ),
    bad(
        "weights of integers",
        "found model.norm.weight of type int32; expected floating-point weights",
        change=tensors(lambda v: v.update({"model.norm.weight": np.ones(32, np.int32)})),
    ),
    bad(
        "tensor missing",
        "bad does not fit its config.json (model_type llama): 1 tensors are missing (model.norm.weight)",
        change=tensors(lambda v: v.pop("model.norm.weight")),
    ),
    bad(
        "tensor unknown",
        "1 are unknown (model.extra.weight)",
        change=tensors(lambda v: v.update({"model.extra.weight": np.ones(3, np.float32)})),
    ),
    bad(
        "tensor of another shape",
        "found model.norm.weight of shape [31]; config.json asks for [32]",
        change=tensors(lambda v: v.update({"model.norm.weight": np.ones(31, np.float32)})),
    ),
    bad(
        "a head that differs from the embedding it is tied to",
        "ties the head to the embedding, but lm_head.weight differs",
        "tie_word_embeddings",
        change=tensors(lambda v: v.update({"lm_head.weight": v["model.embed_tokens.weight"] + 1})),
    ),
    bad(
        "a mixture of experts in a dense model",
        "6 tensors are missing (model.layers.0.mlp.gate_proj.weight",
        change=tensors(
            lambda v: [v.update({n.replace("mlp", "mlp.experts.0"): v.pop(n)}) for n in list(v) if "mlp" in n]
        ),
    ),
    bad(
        "weights that are NaN",
        "The reference model gives row 0 (pairs.jsonl:1) a log-prob of nan",
        "check the weights",
        change=tensors(nan_weights),
    ),
    bad(
        "shard missing",
        "model.safetensors.index.json lists 2 files, of which 1 are missing: model-2.safetensors",
        change=lambda f: sharded(f, lost=True),
    ),
    bad(
        "index of another shard",
        "says that",
        "is in model-2.safetensors; it is not there",
        change=lambda f: sharded(f, wrong=True),
    ),
    bad(
        "index that is no index",
        "found no weight_map",
        change=lambda f: (sharded(f), replaced("model.safetensors.index.json", "{}")(f)),
    ),
    bad(
        "index of numbers",
        "found no weight_map",
        change=lambda f: (sharded(f), replaced("model.safetensors.index.json", '{"weight_map": {"a": 3}}')(f)),
    ),
    bad(
        "index cut",
        "model.safetensors.index.json is not JSON",
        change=lambda f: (sharded(f), cut("model.safetensors.index.json", 60)(f)),
    ),
    bad("no weights", "bad holds no weights; expected model.safetensors", change=lambda f: (f / WEIGHTS).unlink()),
    bad(
        "a pickle of garbage", "bad/pytorch_model.bin is", "torch", change=lambda f: torch_file(f, b"\x80\x04 garbage")
    ),
    bad(
        "a pickle that would run code",
        "bad/pytorch_model.bin is",
        "torch",
        change=lambda f: torch_file(f, b"cos\nsystem\n(S'touch harmed'\ntR."),
    ),
    bad(
        "weights of jaxpo's format, empty",
        "bad/weights",
        change=lambda f: ((f / WEIGHTS).unlink(), (f / "weights").mkdir()),
    ),
    bad(
        "weights of jaxpo's format, damaged",
        "bad/weights",
        change=lambda f: ((f / WEIGHTS).unlink(), (f / "weights").mkdir(), (f / "weights/_METADATA").write_text("{")),
    ),
]

CONFIGS = [
    bad("no config.json", "bad has no config.json", change=lambda f: (f / "config.json").unlink()),
    bad("config.json cut", "bad/config.json is not JSON", change=cut("config.json", 100)),
    bad(
        "config.json of UTF-16",
        "bad/config.json is not JSON",
        change=lambda f: (f / "config.json").write_text("{}", encoding="utf-16"),
    ),
    bad(
        "config.json a list",
        "bad/config.json: found a list; expected a JSON object",
        change=replaced("config.json", "[]"),
    ),
    bad("config.json nested", "bad/config.json is not JSON", change=replaced("config.json", "[" * 100_000)),
    bad("config.json empty", "bad/config.json is not JSON", change=replaced("config.json", "")),
    bad(
        "model type missing",
        "bad/config.json: found no model_type; jaxpo knows llama, mistral",
        change=config(model_type=None),
    ),
    bad("model type unsupported", "found model_type 'mamba'; jaxpo knows llama", change=config(model_type="mamba")),
    bad(
        "mixture of experts",
        "found model_type 'mixtral'; jaxpo knows llama",
        change=config(model_type="mixtral", num_local_experts=8),
    ),
    bad("model type a list", "found model_type ['llama']; jaxpo knows llama", change=config(model_type=["llama"])),
    bad(
        "sizes missing", "bad", "does not fit its config.json", change=config(hidden_size=None, num_hidden_layers=None)
    ),
    bad("width of text", "bad/config.json", "hidden_size", change=config(hidden_size="thirty-two")),
    bad("width below zero", "bad/config.json", "hidden_size", change=config(hidden_size=-32, head_dim=8)),
    bad("no heads", "bad/config.json", "num_attention_heads", change=config(num_attention_heads=0)),
    bad(
        "heads that do not divide",
        "bad/config.json",
        "4 attention heads and 3 key-value heads",
        change=config(num_key_value_heads=3),
    ),
    bad("odd heads", "bad/config.json", "`head_dim`=7", "even", change=config(head_dim=7)),
    bad("no layers", "bad/config.json", "num_hidden_layers", change=config(num_hidden_layers=0)),
    bad(
        "vocabulary null",
        "bad/config.json",
        "vocab_size",
        change=lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "vocab_size": None})
        ),
    ),
    bad("norm of text", "bad/config.json", "rms_norm_eps", change=config(rms_norm_eps="1e-5")),
    bad("tied with a word", "bad/config.json", "tie_word_embeddings", change=config(tie_word_embeddings="yes")),
    bad("activation unknown", "found hidden_act 'xielu'; jaxpo knows silu", change=config(hidden_act="xielu")),
    bad(
        "rope scaling unsupported",
        "found rope_type 'yarn'; jaxpo knows default, linear and llama3",
        change=config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}),
    ),
    bad(
        "rope scaling without its factor",
        "bad/config.json",
        "factor",
        change=config(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0}),
    ),
    bad("rope scaling a number", "bad/config.json", "rope", change=config(rope_parameters=3)),
    bad(
        "rope theta of text",
        "bad/config.json",
        "rope_theta",
        change=config(rope_parameters={"rope_type": "default", "rope_theta": "big"}),
    ),
    bad(
        "partial rotary",
        "bad/config.json: found partial_rotary_factor 0.5; jaxpo knows 1.0",
        change=config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    ),
    bad(
        "quantised",
        "found quantization_config (method gptq)",
        change=config(quantization_config={"quant_method": "gptq"}),
    ),
    bad("quantised with a word", "found quantization_config", change=config(quantization_config="int8")),
    bad(
        "layers of two kinds",
        "mix full and sliding attention",
        change=config(model_type="mistral", sliding_window=16, layer_types=["full_attention", "sliding_attention"]),
    ),
    bad("generation config cut", "bad/generation_config.json is not JSON", change=cut("generation_config.json", 10)),
    bad(
        "generation config with an eos beyond all numbers",
        "bad/generation_config.json: eos_token_id is 1000000000000; expected the id of a token",
        change=replaced("generation_config.json", '{"eos_token_id": 1000000000000}'),
    ),
    bad(
        "generation config with a word for eos",
        "bad/generation_config.json: eos_token_id is 'end'",
        "expected",
        change=replaced("generation_config.json", '{"eos_token_id": "end"}'),
    ),
    bad("fewer positions than tokens", "pairs.jsonl:", "16 positions", "data.max_length", change=gpt2),
]

TOKENIZERS = [
    bad(
        "no tokenizer", "bad has no tokenizer.json", "save_pretrained", change=lambda f: (f / "tokenizer.json").unlink()
    ),
    bad("tokenizer cut", "bad/tokenizer.json is not whole JSON", change=cut("tokenizer.json", 3000)),
    bad("tokenizer nested", "bad/tokenizer.json is not whole JSON", change=replaced("tokenizer.json", "[" * 100_000)),
    bad("tokenizer of nothing", "bad/tokenizer.json is no tokenizer", change=replaced("tokenizer.json", "{}")),
    bad(
        "tokenizer without a vocabulary", "bad/tokenizer.json is no tokenizer", change=tokenizer(model={"type": "BPE"})
    ),
    bad("tokenizer settings a list", "bad/tokenizer", change=replaced("tokenizer_config.json", "[]")),
    bad("end token of a number", "bad/tokenizer", change=replaced("tokenizer_config.json", '{"eos_token": 5}')),
    bad(
        "more tokens than the embedding has rows",
        "tokenizer",
        "vocab_size",
        "400",
        change=more_tokens,
    ),
]

OTHERS = [
    Case(
        "no such model",
        ("./lama does not exist; expected the folder of a Hugging Face checkpoint, or a hub id",),
        ("model.path=./lama",),
    ),
    Case(
        "hub model without a network",
        ("org/model is no folder here and cannot be fetched", "hf download org/model"),
        ("model.path=org/model",),
    ),
    Case("model a file", ("pairs.jsonl is a file; expected the folder",), ("model.path=pairs.jsonl",)),
    Case("model a name too long", ("model.path", "too long"), ("model.path=" + "x" * 300,)),
    Case("model of the home of nobody", ("model.path", "~nobody-here"), ("model.path=~nobody-here/llama",)),
    Case("stage not there", ('model.path is "stage:sft", which names no earlier stage',), ("model.path=stage:sft",)),
    Case("reference cut", ("bad/model.safetensors is cut",), ("reference.path=bad",), model(cut(WEIGHTS, 50_000))),
    Case(
        "reference of another tokenizer",
        ("reference.path is bad, whose tokenizer is not that of the model", "the same token ids"),
        ("reference.path=bad",),
        model(other_tokens),
    ),
    Case(
        "reference of fewer tokens",
        ("pairs.jsonl:", "the model in bad has embeddings for 300 tokens (vocab_size)"),
        ("reference.path=bad",),
        model(
            lambda f: (
                config(vocab_size=300)(f),
                tensors(lambda v: v.update({"model.embed_tokens.weight": v["model.embed_tokens.weight"][:300]}))(f),
            )
        ),
    ),
]


def scratch(name: str, *tells: str, architecture: str, tokenizer: str = "{vocab_size: 300}") -> Case:
    override = (
        f"model={{scratch: {{architecture: {{{architecture}}}, tokenizer: {tokenizer}}}, compute_dtype: float32}}"
    )
    return Case(name, ("model.scratch", *tells), (override,))


SCRATCH = [
    scratch("new model of no type", "found no model_type", architecture="hidden_size: 32"),
    scratch(
        "new model with a typing mistake",
        "found hiden_size",
        "did you mean hidden_size?",
        architecture="model_type: llama, hiden_size: 32",
    ),
    scratch(
        "new model of rotary positions that it does not have",
        "found rope_theta, which no gpt2 configuration has",
        architecture="model_type: gpt2, n_embd: 16, n_head: 2, rope_theta: 1e6",
    ),
    scratch(
        "new model that sets its vocabulary",
        "found vocab_size; it comes from the tokenizer",
        architecture="model_type: llama, vocab_size: 32",
    ),
    scratch("new model of text", "hidden_size", architecture="model_type: llama, hidden_size: wide"),
    scratch("new model without width", "hidden_size", architecture="model_type: llama, hidden_size: 0"),
    scratch(
        "new model of heads that do not divide",
        "hidden size (30) is not a multiple of the number of attention heads (4)",
        architecture="model_type: llama, hidden_size: 30, num_attention_heads: 4, num_hidden_layers: 1",
    ),
    scratch(
        "new model of tiny vocabulary",
        "model.scratch.tokenizer.vocab_size is 100",
        ">= 260",
        architecture="model_type: llama",
        tokenizer="{vocab_size: 100}",
    ),
    scratch(
        "new model with a template unknown",
        "chat_template",
        "chatmll",
        architecture="model_type: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4",
        tokenizer="{chat_template: chatmll}",
    ),
]

CASES = SAFETENSORS + CONFIGS + TOKENIZERS + OTHERS + SCRATCH


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_checkpoints(case: Case, refused: Callable[[Case], None], bench: Path):
    refused(case)
    assert not (bench / "harmed").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_weights_that_may_not_be_read(refused: Callable[[Case], None]):
    refused(bad("unreadable", "bad/model.safetensors", "Permission denied", change=lambda f: (f / WEIGHTS).chmod(0)))
