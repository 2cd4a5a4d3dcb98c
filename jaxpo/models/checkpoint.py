"""A Hugging Face checkpoint, found and checked before a weight is read: what is wrong with it is said at once."""

import importlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import huggingface_hub
import ml_dtypes
import numpy as np

from jaxpo.errors import UserError
from jaxpo.models import families, native
from jaxpo.models.decoder import DecoderConfig
from jaxpo.models.safetensors_files import name_some, read_header

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# The head that a decoder is to have: a language model's, a score head (drawn anew if the checkpoint is a language
# model's), or whichever the checkpoint has.
WantedHead = Literal["lm", "score", "stored"]
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*")
WEIGHTS_AND_SMALL_FILES = ((*SMALL_FILES, "*.safetensors"), (*SMALL_FILES, "pytorch_model*.bin"))


class StoredTensor(Protocol):
    """A tensor that lies in a file until it is read."""

    @property
    def file(self) -> Path: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a pytorch_model*.bin file, mapped from it by torch."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    value: Any

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        value = self.value.detach().contiguous()
        if self.dtype == ml_dtypes.bfloat16:
            return value.view(importlib.import_module("torch").int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that holds every weight of its decoder, in the right shape, but for a score head that is new.

    stored_config: the decoder that the checkpoint is of; decoder_config: the one to load, which may have a score head
    in place of a language model's. tensors: by the names of `families.tensors`; none in jaxpo's own format (`native`).
    generation_config: None where the folder has none. notes: what was left out on purpose, a sentence each, for people.
    """

    folder: Path
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    stored_config: DecoderConfig
    decoder_config: DecoderConfig
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]

    @property
    def native(self) -> bool:
        """Whether the weights are in jaxpo's own format."""
        return native.is_native(self.folder)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files the weights lie in, sorted."""
        if self.native:
            return native.weight_files(self.folder)
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def stored_dtype(self) -> str:
        """The dtype to keep the weights in: float32 unless all of them are bfloat16."""
        if self.native:
            return native.stored_dtype(self.folder)
        dtypes = {np.dtype(tensor.dtype).name for tensor in self.tensors.values()}
        return "bfloat16" if dtypes == {"bfloat16"} else "float32"

    @property
    def has_new_head(self) -> bool:
        """Whether the score head is to be drawn, because the checkpoint has a language model's."""
        return self.decoder_config.head != self.stored_config.head

    @property
    def wanted(self) -> list[families.Tensor]:
        """The tensors to read, with the parameters each of them holds."""
        return _wanted(self.hf_config, self.stored_config, self.decoder_config, str(self.folder))


def read_checkpoint(path: str | Path, revision: str | None = None, head: WantedHead = "lm") -> Checkpoint:
    """Find a checkpoint (a folder, or a hub id at a revision) and check it without reading the weights.

    UserError where there is none, where its configuration is not one jaxpo computes, where a tensor is missing, unknown
    or of another shape, where a file is cut, and where `head` asks for a language model and it is none.
    """
    folder = resolve(path, revision)
    hf_config, stored, config = _configured(folder, head)
    source = folder / "config.json"
    tensors, notes = {}, ()
    if native.is_native(folder):
        native.check(folder)
    else:
        tensors, notes = _match(folder, hf_config, stored, config, _stored_tensors(folder))
    if config.head != stored.head:
        notes += (f"{folder} is a language model: its score head is new, drawn at random.",)
    return Checkpoint(
        folder=folder,
        hf_config=hf_config,
        generation_config=_generation_config(folder / "generation_config.json"),
        stored_config=stored,
        decoder_config=config,
        tensors=tensors,
        notes=families.notes(hf_config, str(source)) + notes,
    )


def read_decoder_config(path: str | Path, revision: str | None = None, head: WantedHead = "lm") -> DecoderConfig:
    """The decoder of a checkpoint by its config.json alone: weights need not be there, and of a hub id nothing more is
    fetched. UserError as of `read_checkpoint`.
    """
    return _configured(resolve(path, revision, (("config.json",),)), head)[2]


def _configured(folder: Path, head: WantedHead) -> tuple[dict[str, Any], DecoderConfig, DecoderConfig]:
    """A checkpoint's Hugging Face configuration, the decoder that it is of, and the one to load."""
    source = folder / "config.json"
    if not source.is_file():
        export = folder / "export"
        hint = f" Did you mean {export}?" if (export / "config.json").is_file() else ""
        raise UserError(f"{folder} has no config.json; expected a Hugging Face checkpoint.{hint}")
    hf_config = _read_json(source)
    if head == "lm" and families.is_classifier(hf_config):
        raise UserError(
            f"{source}: found architectures {', '.join(map(str, hf_config['architectures']))}, a reward model or a "
            "classifier, which has no language-model head; expected a language model (a CausalLM)."
        )
    stored = families.decoder_config(hf_config, str(source))
    config = replace(stored, head="score") if head == "score" else stored
    return hf_config, stored, config


def _wanted(
    hf_config: Mapping[str, Any], stored: DecoderConfig, config: DecoderConfig, source: str
) -> list[families.Tensor]:
    """The tensors of the decoder `config` that a checkpoint of the decoder `stored` has."""
    names = {tensor.name for tensor in families.tensors(hf_config, stored, source)}
    return [tensor for tensor in families.tensors(hf_config, config, source) if tensor.name in names]


def resolve(
    path: str | Path, revision: str | None = None, patterns: Sequence[tuple[str, ...]] = WEIGHTS_AND_SMALL_FILES
) -> Path:
    """The folder of a checkpoint: `path` itself, or where huggingface_hub puts (or has put) the hub id it names.

    patterns: of the files to fetch; the later ones where the ones before find nothing of what they name last.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"{path} is a folder, which has no revision {revision!r}; leave model.revision (or reference.revision) "
                "out, or name a hub id."
            )
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file; expected the folder of a Hugging Face checkpoint, or a hub id.")
    if not HUB_ID.fullmatch(str(path)):
        raise UserError(f"{path} does not exist; expected the folder of a Hugging Face checkpoint, or a hub id.")
    for some in patterns:
        folder = _download(str(path), revision, some)
        if any(folder.glob(some[-1])):
            break
    return folder


def _download(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # network, authorisation, names: huggingface_hub and httpx have no common type for them
        at = f" at revision {revision}" if revision else ""
        reason = " ".join(str(error).split())
        raise UserError(
            f"{hub_id}{at} is no folder here and cannot be fetched from the Hugging Face hub ({reason}). Check the "
            f"name; for a private or gated model run `hf auth login`; without a network run `hf download {hub_id}` "
            "where there is one and give the folder (and unset HF_HUB_OFFLINE where it is set by mistake)."
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: found a {type(value).__name__}; expected a JSON object.")
    return value


def _generation_config(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    config = _read_json(file)
    eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and abs(i) < 2**31 for i in ids):
        raise UserError(f"{file}: eos_token_id is {eos!r}; expected the id of a token, or a list of ids.")
    return config


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's weights by their names there; safetensors go before .bin, as in transformers."""
    for single, reader in (("model.safetensors", read_header), ("pytorch_model.bin", _read_bin)):
        if (folder / single).is_file():
            return _read(reader, folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _sharded(index, reader)
    raise UserError(
        f"{folder} holds no weights; expected model.safetensors, model.safetensors.index.json with its shards, or "
        "pytorch_model.bin likewise."
    )


def _sharded(index: Path, reader: Any) -> dict[str, StoredTensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: found no weight_map of names to files; expected the index of a sharded checkpoint.")
    files = sorted(set(weight_map.values()))
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        raise UserError(f"{index} lists {len(files)} files, of which {len(absent)} are missing: {name_some(absent)}.")
    shards = {name: _read(reader, index.parent / name) for name in files}
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise UserError(f"{index} says that {tensor} is in {name}; it is not there.")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def _read(reader: Callable[[Path], Mapping[str, StoredTensor]], file: Path) -> dict[str, StoredTensor]:
    try:
        return {**reader(file)}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error


def _read_bin(file: Path) -> dict[str, TorchTensor]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"{file} is in torch's own format, and torch is not installed: install torch, or convert the checkpoint to "
            "safetensors."
        ) from error
    dtypes = {
        torch.float64: np.dtype(np.float64),
        torch.float32: np.dtype(np.float32),
        torch.float16: np.dtype(np.float16),
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
        torch.uint8: np.dtype(np.uint8),
        torch.bool: np.dtype(np.bool_),
    }
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {
            name: TorchTensor(file, dtypes[value.dtype], tuple(value.shape), value) for name, value in state.items()
        }
    except Exception as error:  # torch raises pickle, zip, runtime and end-of-file errors for a bad file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is cut, damaged or no file of weights: torch cannot read it ({reason}).") from error


def _match(
    folder: Path,
    hf_config: Mapping[str, Any],
    stored_config: DecoderConfig,
    config: DecoderConfig,
    stored: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The stored tensors by the names the family gives them, and notes on those that are left out."""
    family = families.family(hf_config, str(folder))
    wanted = {tensor.name: tensor for tensor in _wanted(hf_config, stored_config, config, str(folder))}
    if not any(name.startswith(family.prefix) for name in stored):
        stored = {name if name in wanted else family.prefix + name: tensor for name, tensor in stored.items()}
    unknown = [name for name in stored if name not in wanted]
    notes = []
    for suffix, reason in family.ignored.items():
        ignored = [name for name in unknown if name.endswith(suffix)]
        unknown = [name for name in unknown if not name.endswith(suffix)]
        if ignored:
            notes.append(f"{folder}: {len(ignored)} tensors *{suffix} are not read: {reason}.")
    if config.head != "own" and (head := _language_head(unknown, family.prefix)):
        if config.head == "score":
            notes.append(f"{folder}: {head} is not read: a score head stands in its place.")
        else:
            _check_tied(folder, wanted, stored, head)
        unknown.remove(head)
    missing = [name for name in wanted if name not in stored]
    if missing or unknown:
        found = [f"{len(missing)} tensors are missing ({name_some(missing)})"] if missing else []
        found += [f"{len(unknown)} are unknown ({name_some(unknown)})"] if unknown else []
        raise UserError(
            f"{folder} does not fit its config.json (model_type {hf_config['model_type']}): {'; '.join(found)}."
        )
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"{stored[name].file}: found {name} of shape {list(stored[name].shape)}; config.json asks for "
                f"{list(tensor.shape)}."
            )
        if stored[name].dtype.kind not in "fV":
            raise UserError(
                f"{stored[name].file}: found {name} of type {stored[name].dtype}; expected floating-point weights."
            )
    return {name: stored[name] for name in wanted}, tuple(notes)


def _language_head(unknown: list[str], prefix: str) -> str | None:
    return next((name for name in ("lm_head.weight", f"{prefix}lm_head.weight") if name in unknown), None)


def _check_tied(
    folder: Path, wanted: Mapping[str, families.Tensor], stored: Mapping[str, StoredTensor], head: str
) -> None:
    embedding = next(name for name, tensor in wanted.items() if tensor.params == ("embedding",))
    if embedding in stored and not _same(stored[embedding], stored[head]):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding, but {head} differs from {embedding}; set "
            "tie_word_embeddings to false if the head is a matrix of its own."
        )


def _same(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = a.read(), b.read()
    return all(np.array_equal(left[i : i + rows], right[i : i + rows]) for i in range(0, len(left), rows))
