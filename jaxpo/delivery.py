"""What a run gives back: a Hugging Face folder that speaks the chat format it was trained in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from jaxpo.config import Run
from jaxpo.data.chat import resolve_template
from jaxpo.data.templates import TEMPLATES
from jaxpo.models.checkpoint import Checkpoint
from jaxpo.models.decoder import Decoder
from jaxpo.models.export import export


def deliver(
    run: Run, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, decoder: Decoder, folder: Path, dtype: Any
) -> None:
    """Export a decoder that a run has trained from `checkpoint`, in `dtype` (None: its own)."""
    export(
        decoder,
        checkpoint.hf_config,
        folder,
        dtype=dtype,
        tokenizer=checkpoint.folder,
        chat_template=resolve_template(tokenizer, run.data.chat_template) if run.data.chat_template else None,
        generation_config=generation_config(run, checkpoint, tokenizer),
        max_shard_bytes=int(run.export.max_shard_gb * 1e9),
    )


def generation_config(run: Run, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> Mapping[str, Any] | None:
    """The checkpoint's, with the end of a turn of data.chat_template among the tokens that end an answer."""
    ends = end_ids(run, checkpoint, tokenizer)
    declared = checkpoint.generation_config
    if run.data.chat_template is None or not ends:
        return declared
    return {**(declared or {}), "eos_token_id": ends if len(ends) > 1 else ends[0]}


def end_ids(run: Run, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end an answer, sorted: the generation config's, the tokenizer's and the chat template's."""
    declared = (checkpoint.generation_config or {}).get("eos_token_id")
    template = TEMPLATES.get(run.data.chat_template or "")
    turn = tokenizer.get_vocab().get(template.end) if template else None
    ids = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id, turn]
    return sorted({i for i in ids if i is not None})
