"""Decoder to Hugging Face folder: what `transformers` loads with no key missing and none too many.

A tensor at a time leaves the devices, so host memory stays at the largest tensor whatever the size of the shards.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxpo import atomic, processes
from jaxpo.console import Progress, progress
from jaxpo.errors import UserError
from jaxpo.models import families
from jaxpo.models.decoder import Decoder, Head, by_path
from jaxpo.models.safetensors_files import name_some, write

MARK = ".jaxpo-export.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


class Saveable(Protocol):
    """A tokenizer of transformers."""

    def save_pretrained(self, save_directory: str) -> Any: ...


def export(
    decoder: Decoder,
    hf_config: Mapping[str, Any],
    folder: Path,
    *,
    dtype: Any = None,
    tokenizer: Saveable | Path | None = None,
    chat_template: str | None = None,
    pad_token: str | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `decoder` to `folder` as a Hugging Face checkpoint in `dtype` (None: the decoder's own).

    hf_config: that of the checkpoint the decoder came from, or of `scratch`. tokenizer: saved, or copied from the
    folder given, chat template included. chat_template, pad_token: Jinja and a token to take the place of its own.
    generation_config: by default the special tokens of hf_config; a reward model has none.

    transformers reads the reward of a text from the last token that is not hf_config's pad_token_id: of a decoder with
    a score head that must be a token that ends no text, or None, with which transformers scores one text at a time.

    The folder appears at once and complete: it is written beside itself under another name and then renamed. An earlier
    export of jaxpo to which nothing was added is replaced; any other folder that is not empty is a UserError.
    """
    leaves = jax.tree.leaves(decoder)
    dtype = np.dtype(leaves[0].dtype if dtype is None else dtype)
    # A decoder on the devices of several processes leaves them tensor by tensor, with all processes at hand.
    together = not all(leaf.is_fully_addressable for leaf in leaves)
    first, writes = (processes.is_first(), processes.writes) if together else (True, _always)
    with _folder_of_all(folder) if together else _new_folder(folder) as new:
        # The tokenizer goes first: what it writes beside its own files must not replace ours.
        if first:
            _write_tokenizer(new, tokenizer, pad_token)
        index = _write_weights(new, decoder, hf_config, dtype, max_shard_bytes, writes)
        if together:
            processes.wait(f"weights of {folder}")
        if not first:
            return
        if index is not None:
            _write_json(new / "model.safetensors.index.json", index)
        if chat_template is not None:
            # transformers and vLLM take this file before what the tokenizer's config may say.
            (new / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        _write_json(new / "config.json", _config(decoder.config.head, hf_config, dtype))
        if decoder.config.head != "score":
            _write_json(new / "generation_config.json", generation_config or _special_tokens(hf_config))
        files = sorted(str(file.relative_to(new)) for file in new.rglob("*") if file.is_file())
        _write_json(new / MARK, {"files": files})


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    _check_free(folder)
    with atomic.new_folder(folder) as new:
        yield new


@contextmanager
def _folder_of_all(folder: Path) -> Iterator[Path]:
    """The folder to fill, for all processes; it takes its name when the first one has left the block."""
    if processes.is_first():
        with _new_folder(folder) as new:
            processes.same(lambda: str(new))
            yield new
    else:
        new = Path(processes.same(str))
        with atomic.writable(folder):
            yield new
    processes.wait(f"{folder} is there")


def _check_free(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder to export to, new or empty.")
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    if not present:
        return
    try:
        ours = {MARK, *json.loads((folder / MARK).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if others := sorted(present - ours):
        raise UserError(
            f"{folder} holds files that no export of jaxpo wrote ({name_some(others)}); expected a new or empty "
            "folder, or an earlier export. Nothing was changed."
        )


def _config(head: Head, hf_config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    config = {key: value for key, value in hf_config.items() if key not in ("torch_dtype", "_name_or_path")}
    config |= {"architectures": [families.architecture(hf_config, head, "config.json")], "dtype": dtype.name}
    if head == "score":
        config = {key: value for key, value in config.items() if key not in ("num_labels", "problem_type")}
        # transformers counts the labels of id2label, and takes two where it finds none.
        if len(config.get("id2label") or ()) != 1:
            config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def _write_weights(
    folder: Path,
    decoder: Decoder,
    hf_config: Mapping[str, Any],
    dtype: np.dtype,
    max_shard_bytes: int,
    writes: Callable[[int], bool],
) -> dict[str, Any] | None:
    """Write those files of the weights whose number `writes` is true of; returns the index, None of a single file."""
    params = by_path(decoder)
    tensors = families.tensors(hf_config, decoder.config, str(folder))
    shards = _shards(tensors, dtype, max_shard_bytes)
    total = sum(_nbytes(tensor, dtype) for tensor in tensors)
    weight_map: dict[str, str] = {}
    with progress(f"writing {folder.parent.name}", total, "B") as bar:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            announced = {tensor.name: (dtype, tensor.shape) for tensor in shard}
            values = _values(shard, params, dtype, bar)
            if writes(number):
                write(folder / file, announced, values)
            else:
                # What another process writes leaves the devices of this one all the same.
                deque(values, maxlen=0)
            weight_map |= dict.fromkeys(announced, file)
    if len(shards) == 1:
        return None
    count = sum(np.prod(tensor.shape, dtype=int) for tensor in tensors)
    return {"metadata": {"total_parameters": int(count), "total_size": total}, "weight_map": weight_map}


def _always(number: int) -> bool:
    return True


def _values(
    shard: list[families.Tensor], params: Mapping[str, jax.Array], dtype: np.dtype, bar: Progress
) -> Iterator[np.ndarray]:
    for tensor in shard:
        yield tensor.join(
            [processes.whole(_layer(params[name], tensor.layer)).astype(dtype, copy=False) for name in tensor.params]
        )
        bar.advance(_nbytes(tensor, dtype))


def _layer(param: jax.Array, layer: int | None) -> jax.Array:
    return param if layer is None else jax.lax.dynamic_index_in_dim(param, layer, keepdims=False)


def _shards(tensors: list[families.Tensor], dtype: np.dtype, max_bytes: int) -> list[list[families.Tensor]]:
    """Tensors in order, split before the one that would pass `max_bytes`; a larger tensor is a shard of its own."""
    shards: list[list[families.Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _nbytes(tensor, dtype)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _nbytes(tensor: families.Tensor, dtype: np.dtype) -> int:
    return int(np.prod(tensor.shape, dtype=int)) * dtype.itemsize


def _special_tokens(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: hf_config[name] for name in names if hf_config.get(name) is not None}


def _write_tokenizer(folder: Path, tokenizer: Saveable | Path | None, pad_token: str | None) -> None:
    if isinstance(tokenizer, Path):
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_dir():
                shutil.copytree(tokenizer / name, folder / name)
            elif (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    elif tokenizer is not None:
        try:
            tokenizer.save_pretrained(str(folder))
        except OSError:
            raise
        except Exception as error:  # tokenizers has no type for what its file system refuses
            raise UserError(f"the tokenizer cannot be written to {folder}: {error}.") from error
    if pad_token is not None:
        for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
            if file.is_file():
                _write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "pad_token": pad_token})


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
