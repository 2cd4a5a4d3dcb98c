"""Decoder to Hugging Face folder: what `transformers` loads with no key missing and none too many.

A tensor at a time leaves the devices, so host memory stays at the largest tensor whatever the size of the shards.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxpo.console import Progress, progress
from jaxpo.errors import UserError
from jaxpo.models import families
from jaxpo.models.decoder import Decoder, map_params
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
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `decoder` to `folder` as a Hugging Face checkpoint in `dtype` (None: the decoder's own).

    hf_config: that of the checkpoint the decoder came from, or of `scratch`. tokenizer: saved, or copied from the
    folder given, chat template included. chat_template: Jinja to take the place of that one. generation_config: by
    default the special tokens of hf_config.

    The folder appears at once and complete: it is written beside itself under another name and then renamed. An earlier
    export of jaxpo to which nothing was added is replaced; any other folder that is not empty is a UserError.
    """
    _check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, "new")
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)
        dtype = np.dtype(jax.tree.leaves(decoder)[0].dtype if dtype is None else dtype)
        # The tokenizer goes first: what it writes beside its own files must not replace ours.
        _write_tokenizer(new, tokenizer)
        if chat_template is not None:
            # transformers and vLLM take this file before what the tokenizer's config may say.
            (new / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        _write_weights(new, decoder, hf_config, dtype, max_shard_bytes)
        config = {key: value for key, value in hf_config.items() if key not in ("torch_dtype", "_name_or_path")}
        config |= {"architectures": [families.family(hf_config, str(folder)).architecture], "dtype": dtype.name}
        _write_json(new / "config.json", config)
        _write_json(new / "generation_config.json", generation_config or _special_tokens(hf_config))
        files = sorted(str(file.relative_to(new)) for file in new.rglob("*") if file.is_file())
        _write_json(new / MARK, {"files": files})
        _replace(folder, new)
        _remove_leftovers(folder, "old")
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {error}.") from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


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


def _replace(folder: Path, new: Path) -> None:
    """`new` takes the name `folder`; a kill between the two renames leaves the earlier export as .NAME.old-*."""
    if folder.exists():
        folder.rename(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    new.rename(folder)


def _remove_leftovers(folder: Path, kind: str) -> None:
    """Take away what exports that were killed have left beside the folder, a model's size each."""
    for sibling in folder.parent.iterdir():
        if sibling.name.startswith(f".{folder.name}.{kind}-"):
            shutil.rmtree(sibling)


def _write_weights(
    folder: Path, decoder: Decoder, hf_config: Mapping[str, Any], dtype: np.dtype, max_shard_bytes: int
) -> None:
    params: dict[str, jax.Array] = {}
    map_params(params.setdefault, decoder)
    tensors = families.tensors(hf_config, decoder.config, str(folder))
    shards = _shards(tensors, dtype, max_shard_bytes)
    total = sum(_nbytes(tensor, dtype) for tensor in tensors)
    weight_map: dict[str, str] = {}
    with progress(f"writing {folder.parent.name}", total, "B") as bar:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            announced = {tensor.name: (dtype, tensor.shape) for tensor in shard}
            write(folder / file, announced, _values(shard, params, dtype, bar))
            weight_map |= dict.fromkeys(announced, file)
    if len(shards) > 1:
        count = sum(np.prod(tensor.shape, dtype=int) for tensor in tensors)
        metadata = {"total_parameters": int(count), "total_size": total}
        _write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def _values(
    shard: list[families.Tensor], params: Mapping[str, jax.Array], dtype: np.dtype, bar: Progress
) -> Iterator[np.ndarray]:
    for tensor in shard:
        yield tensor.join(
            [np.asarray(_layer(params[name], tensor.layer)).astype(dtype, copy=False) for name in tensor.params]
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


def _write_tokenizer(folder: Path, tokenizer: Saveable | Path | None) -> None:
    if isinstance(tokenizer, Path):
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_dir():
                shutil.copytree(tokenizer / name, folder / name)
            elif (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
