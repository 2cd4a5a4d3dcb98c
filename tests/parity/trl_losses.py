"""TRL 1.16.0's trainers beside jaxpo, on one small Llama: losses and parameter gradients of both, on the same examples.

TRL's side is the real thing: the trainer is constructed, its own collator pads the batch, its own `compute_loss` is
called and torch differentiates it. jaxpo's side is its real path too: the checkpoint is read, examples are packed
several to a row with the prompt stored once, the reference is a table, and gradients come back through `Scorer`.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from jaxpo.batch import Completions, DeviceBatch, Example, Objective
from jaxpo.data.pack import Packing, pack
from jaxpo.models import families
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder, by_path
from jaxpo.objectives.score import Scorer, Scores, completions_of, head_blocks
from jaxpo.reference.compute import completion_logps
from jaxpo.training.control import Control
from jaxpo.training.step import (
    all_scores,
    as_float32,
    initial_carry,
    pull_back,
    sum_of_shares,
    whole_batch,
)

VOCAB, PAD, EOS = 32, 31, 30
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
ROW, ROWS = 40, 2


class Result(NamedTuple):
    """A loss and its gradient: by the names of the tensors in a Hugging Face checkpoint, in its layout."""

    loss: float
    grads: dict[str, np.ndarray]


class Distance(NamedTuple):
    """Relative distances: of the losses, of the gradients as a whole, and of the tensor that is furthest away."""

    loss: float
    gradient: float
    worst: float
    where: str


def distance(ours: Result, theirs: Result) -> Distance:
    assert ours.grads.keys() == theirs.grads.keys()
    pairs = {name: (ours.grads[name].astype(np.float64), theirs.grads[name]) for name in theirs.grads}
    gaps = {name: float(np.linalg.norm(a - b)) for name, (a, b) in pairs.items()}
    sizes = {name: float(np.linalg.norm(b.astype(np.float64))) for name, (_, b) in pairs.items()}
    apart = {name: gaps[name] / sizes[name] for name in gaps}
    worst = max(apart, key=lambda name: apart[name])
    return Distance(
        loss=abs(ours.loss - theirs.loss) / abs(theirs.loss),
        gradient=math.hypot(*gaps.values()) / math.hypot(*sizes.values()),
        worst=apart[worst],
        where=worst,
    )


def write_models(folder: Path, pad_token_id: int | None = None) -> tuple[Path, Path]:
    """Two checkpoints, `policy` and `reference`: both far from an initialisation, and each a little from the other."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=pad_token_id))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.2 + (1.0 if param.ndim == 1 else 0.0))
        model.lm_head.weight.mul_(0.5)
        model.save_pretrained(folder / "reference")
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.04)
        model.save_pretrained(folder / "policy")
    return folder / "policy", folder / "reference"


# Of a prompt, a chosen and a rejected completion: none of them alike, single tokens among them. Completions are short:
# the rounding of a sum of log-probs grows with it (TRL's log-ratios of a dozen tokens are off by up to 9e-6).
PAIR_LENGTHS = [(2, 3, 4), (7, 4, 2), (3, 1, 2), (20, 5, 4), (1, 4, 3), (15, 3, 4), (4, 4, 3), (30, 2, 5)]


def random_examples(lengths: Sequence[tuple[int, ...]], seed: int = 0, labels: Sequence[float] = ()) -> list[Example]:
    """Examples of random tokens: lengths of the prompt and of each completion."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, EOS, length, dtype=np.int32)

    shapes = [(ids(prompt), tuple(map(ids, completions))) for prompt, *completions in lengths]
    wanted = labels or [1.0] * len(shapes)
    return [Example(f"random:{n}", *shape, label) for n, (shape, label) in enumerate(zip(shapes, wanted, strict=True))]


# jaxpo.


@partial(jax.jit, static_argnums=0)
def scored(scorer: Scorer, decoder: Decoder, batch: DeviceBatch) -> Scores:
    return all_scores(scorer, decoder, batch)


pulled_back = jax.jit(pull_back, static_argnums=0)


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def without_references(batch: DeviceBatch) -> DeviceBatch:
    """What a forward pass needs of a batch, in a shape that is the same for every objective: nothing compiles twice."""
    return batch._replace(references=batch.references[..., :1, :])


def scorer_for(statistics: frozenset[Any]) -> Scorer:
    return Scorer("float32", "none", head_blocks(ROW, ROWS, "cpu", 1), statistics)


# With all that an objective over log-probs can ask for, so that one compiled program serves them all.
EVERYTHING = scorer_for(frozenset({"shared", "confidence", "prompt"}))
REWARDS = scorer_for(frozenset({"rewards"}))


class Ours:
    """jaxpo's side: a policy, and a reference or none."""

    def __init__(self, policy: Path, reference: Path | None = None, scorer: Scorer = EVERYTHING):
        checkpoint = read_checkpoint(policy, head="stored")
        self.hf_config, self.source = checkpoint.hf_config, str(policy)
        self.decoder = load_decoder(checkpoint, "float32")
        self.reference = None if reference is None else load_decoder(read_checkpoint(reference), "float32")
        self.scorer = scorer
        self._scores: dict[tuple[int, bool], Scores] = {}

    def batch(self, examples: Sequence[Example], objective: Objective) -> DeviceBatch:
        """The examples packed for an objective, the reference's statistics with them where it uses them."""
        packing = Packing(ROW, ROWS, score_prompt="prompt" in objective.statistics)
        table = self.table(examples) if objective.uses_reference else None
        if table is not None and "shared" not in objective.statistics:
            table = table[:, :1]
        return on_device(pack(examples, table, packing)[0])

    def table(self, examples: Sequence[Example]) -> np.ndarray:
        assert self.reference is not None
        compute = completion_logps(self.reference, examples, EVERYTHING, Packing(ROW, ROWS), on_device)
        return compute(range(len(examples)))

    def carry(self, objective: Objective) -> dict[str, jax.Array]:
        return as_float32(initial_carry(objective, Control()))

    def __call__(self, objective: Objective, examples: Sequence[Example]) -> Result:
        """As a step computes it, but for the objective itself, which is not compiled: there are hundreds of them."""
        batch, carry = self.batch(examples, objective), self.carry(objective)

        def loss_of(scores: Scores) -> jax.Array:
            return objective(completions_of(scores, batch, carry))[0]

        tokens = without_references(batch)
        scores = scored(self.scorer, self.decoder, tokens)
        loss, slopes = jax.value_and_grad(loss_of)(scores)
        # Committed to a device one and all, whichever scores the loss depends on: another mix would compile anew.
        slopes = jax.device_put(slopes, jax.devices()[0])
        return Result(float(loss), self.named(pulled_back(self.scorer, self.decoder, tokens, slopes)))

    def compiled(self, objective: Objective, examples: Sequence[Example]) -> Result:
        """By the very function a training step calls, compiled whole, with what the objective asks for and no more."""
        gradients = whole_batch if objective.couples_examples else sum_of_shares
        run = jax.jit(gradients(objective, scorer_for(objective.statistics)))
        (loss, _), grads = run(self.decoder, self.batch(examples, objective), self.carry(objective))
        return Result(float(loss), self.named(grads))

    def seen(self, objective: Objective, examples: Sequence[Example]) -> Completions:
        """What the objective sees of the examples."""
        batch = self.batch(examples, objective)
        scores = scored(self.scorer, self.decoder, without_references(batch))
        return completions_of(scores, batch, self.carry(objective))

    def metrics(self, objective: Objective, examples: Sequence[Example]) -> dict[str, float]:
        metrics = objective(self.seen(objective, examples))[1]
        return {name: float(metric.sum / metric.weight) for name, metric in metrics.items()}

    def named(self, grads: Any) -> dict[str, np.ndarray]:
        """Gradients as the tensors of a checkpoint, as an export would write them."""
        params = {path: np.asarray(leaf) for path, leaf in by_path(grads).items()}
        tensors = families.tensors(self.hf_config, self.decoder.config, self.source)
        return {
            tensor.name: tensor.join(
                [params[name] if tensor.layer is None else params[name][tensor.layer] for name in tensor.params]
            )
            for tensor in tensors
        }


# TRL.

# What transformers and datasets warn of when TRL 1.16.0 uses them: names that are to change.
WARNINGS = (
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token: TRL wants one, though the examples are token ids already."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"t{PAD}", eos_token=f"t{EOS}")


# Rows that a trainer can be constructed with; what it is asked the loss of are other examples.
ROWS_OF_TEXT = {
    "pair": [{"prompt": "t1 t2 ", "chosen": "t3 ", "rejected": "t4 t5 "}] * 2,
    "label": [{"prompt": "t1 t2 ", "completion": "t3 ", "label": n > 0} for n in range(2)],
    "completion": [{"prompt": "t1 t2 ", "completion": "t3 "}] * 2,
}
ARGUMENTS = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
}


class Theirs:
    """TRL's side: trainers constructed with the settings of a case, so that it refuses what it refuses."""

    def __init__(self, policy: Path, reference: Path | None = None):
        self.policy, self.reference = policy, reference

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer()

    @cached_property
    def rows(self) -> dict[str, datasets.Dataset]:
        return {name: datasets.Dataset.from_list(rows) for name, rows in ROWS_OF_TEXT.items()}

    @cached_property
    def output_dir(self) -> str:
        return tempfile.mkdtemp()

    def language_model(self, folder: Path | None) -> Any:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()

    def trainer(self, kind: Any, config: Any, rows: str, settings: Mapping[str, Any], **more: Any) -> Any:
        args = config(output_dir=self.output_dir, **{**ARGUMENTS, **settings})
        return kind(args=args, train_dataset=self.rows[rows], processing_class=self.tokenizer, **more)

    def dpo(self, settings: Mapping[str, Any]) -> Any:
        models = {"model": self.language_model(self.policy), "ref_model": self.language_model(self.reference)}
        return self.trainer(DPOTrainer, DPOConfig, "pair", settings, **models)

    def kto(self, settings: Mapping[str, Any]) -> Any:
        models = {"model": self.language_model(self.policy), "ref_model": self.language_model(self.reference)}
        return self.trainer(KTOTrainer, KTOConfig, "label", settings, **models)

    def cpo(self, settings: Mapping[str, Any]) -> Any:
        return self.trainer(CPOTrainer, CPOConfig, "pair", settings, model=self.language_model(self.policy))

    def orpo(self, settings: Mapping[str, Any]) -> Any:
        return self.trainer(ORPOTrainer, ORPOConfig, "pair", settings, model=self.language_model(self.policy))

    def sft(self, settings: Mapping[str, Any]) -> Any:
        return self.trainer(SFTTrainer, SFTConfig, "completion", settings, model=self.language_model(self.policy))

    def reward(self, settings: Mapping[str, Any]) -> Any:
        model = LlamaForSequenceClassification.from_pretrained(
            self.policy, dtype=torch.float32, attn_implementation="eager"
        )
        return self.trainer(RewardTrainer, RewardConfig, "pair", settings, model=model.train())


class Sides(NamedTuple):
    """Both sides, of the same policy and reference, and pairs to compare them on."""

    ours: Ours
    theirs: Theirs
    pairs: list[Example]

    @staticmethod
    def of(policy: Path, reference: Path) -> "Sides":
        return Sides(Ours(policy, reference), Theirs(policy, reference), random_examples(PAIR_LENGTHS))


def sure_of_chosen(sides: Sides, scale: float, folder: Path) -> tuple[Path, list[Example]]:
    """The policy with a head `scale` times as large, and pairs whose chosen answers are its own, greedily."""
    model = sides.theirs.language_model(sides.theirs.policy).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    model.save_pretrained(folder)

    def greedy(example: Example) -> np.ndarray:
        tokens = torch.tensor(example.prompt[None], dtype=torch.long)
        for _ in example.completions[0]:
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        return tokens[0, len(example.prompt) :].numpy().astype(np.int32)

    with torch.no_grad():
        pairs = [Example(e.id, e.prompt, (greedy(e), e.completions[1])) for e in sides.pairs]
    return folder, pairs


def ids(*parts: np.ndarray) -> list[int]:
    return np.concatenate(parts).tolist()


def pairs_for_dpo(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": ids(e.prompt), "chosen_ids": ids(e.completions[0]), "rejected_ids": ids(e.completions[1])}
        for e in examples
    ]


def labels_for_kto(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Completion 1 is what TRL takes for its estimate of the KL divergence."""
    return [
        {
            "prompt_ids": ids(e.prompt),
            "completion_ids": ids(e.completions[0]),
            "KL_completion_ids": ids(e.completions[-1]),
            "label": e.label == 1.0,
        }
        for e in examples
    ]


def pairs_for_cpo(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """As CPO's and ORPO's `tokenize_row` leaves a row: whole sequences, the prompt's labels masked."""

    def sequence(kind: str, prompt: np.ndarray, completion: np.ndarray) -> dict[str, list[int]]:
        whole = ids(prompt, completion)
        return {
            f"{kind}_input_ids": whole,
            f"{kind}_attention_mask": [1] * len(whole),
            f"{kind}_labels": [-100] * len(prompt) + ids(completion),
        }

    return [
        {
            **sequence("chosen", e.prompt, e.completions[0]),
            **sequence("rejected", e.prompt, e.completions[1]),
            "prompt_input_ids": ids(e.prompt),
            "prompt_attention_mask": [1] * len(e.prompt),
        }
        for e in examples
    ]


def sequences_for_sft(examples: Sequence[Example], everything: bool) -> list[dict[str, Any]]:
    """Prompt and completion 0; labels of all tokens, or of the completion's only."""
    return [
        {
            "input_ids": ids(e.prompt, e.completions[0]),
            "labels": (ids(e.prompt) if everything else [-100] * len(e.prompt)) + ids(e.completions[0]),
        }
        for e in examples
    ]


def pairs_for_reward(examples: Sequence[Example], margins: bool) -> list[dict[str, Any]]:
    """Whole sequences; the margin is the gap of the ratings."""

    def margin(e: Example) -> dict[str, float]:
        return {"margin": float(e.scores[0] - e.scores[1])} if margins and e.scores is not None else {}

    return [
        {
            "chosen_ids": ids(e.prompt, e.completions[0]),
            "rejected_ids": ids(e.prompt, e.completions[1]),
            **margin(e),
        }
        for e in examples
    ]


def accumulated(parts: Sequence[Result], weight: float) -> Result:
    """The sum of microbatches, each times a weight."""
    grads = {name: weight * np.sum([part.grads[name] for part in parts], axis=0) for name in parts[0].grads}
    return Result(weight * math.fsum(part.loss for part in parts), grads)


def differentiated(trainer: Any, rows: list[dict[str, Any]], **more: Any) -> Result:
    """The loss of a batch by TRL's own `compute_loss`, and what torch makes of it."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows), **more)
    loss.backward()
    grads = {name: param.grad.numpy().copy() for name, param in trainer.model.named_parameters()}
    return Result(loss.item(), grads)
