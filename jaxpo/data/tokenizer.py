"""Tokenizers: loaded from a checkpoint's folder or the hub, trained for a model from scratch, told apart by content.

The file tokenizer.json is taken as it stands. transformers' AutoTokenizer would import torch and, for some families,
rebuild the tokenizer from its parts.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxpo.data.chat import resolve_template
from jaxpo.data.templates import TEMPLATES
from jaxpo.errors import UserError

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja", "added_tokens.json"]
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder or a hub id. Raises UserError where there is none, or a damaged one."""
    folder = _local_folder(path, revision)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{path} has no tokenizer.json. Write one with transformers: "
            f"AutoTokenizer.from_pretrained({path!r}).save_pretrained(DIR)."
        )
    for config in (file, folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if config.is_file():
            _check_json(config)
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the Rust side of tokenizers raises nothing narrower
        raise UserError(f"{file} is no tokenizer: {' '.join(str(error).split())}") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything in the tokenizer that decides token ids; the chat template is not part of it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # What a caller switched on for its own batches; jaxpo uses neither.
    state["truncation"] = state["padding"] = None
    content = json.dumps([state, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int, chat_template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocab_size` tokens at most, special ones and all 256 bytes included.

    `chat_template` is a built-in name or a file, as data.chat_template; the markers of a built-in template are single
    tokens. BOS and padding are `<|endoftext|>`; EOS is what ends a turn.
    """
    known = TEMPLATES.get(chat_template)
    markers, end = (known.markers, known.end) if known else ((), END_OF_TEXT)
    special = list(dict.fromkeys([END_OF_TEXT, *markers]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>" if "<|begin_of_text|>" in special else END_OF_TEXT,
        eos_token=end,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = resolve_template(tokenizer, chat_template, "model.scratch.tokenizer.chat_template")
    return tokenizer


def _local_folder(path: str, revision: str | None) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path} (model.path) is no folder, so there is no tokenizer to load from it.")
    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"{path} (model.path) is no folder here, and its tokenizer cannot be fetched from the Hugging Face hub: "
            f"{' '.join(str(error).split())}"
        ) from error


def _check_json(file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not whole JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: found a {type(content).__name__}; expected a JSON object.")
