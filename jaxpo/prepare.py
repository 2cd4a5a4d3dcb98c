"""From a config to the parts of a run: the model's checkpoint, the tokenised data, the mesh."""

import dataclasses
import decimal
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxpo import atomic, compiler, config_file, console, processes
from jaxpo.batch import DeviceBatch, HostBatch, Objective
from jaxpo.config import STAGE, DataSource, ModelConfig, Run, Scratch
from jaxpo.data import dataset, formats, sources
from jaxpo.data.loader import Corpus, batches
from jaxpo.data.mismatch import Mismatched
from jaxpo.data.pack import Packing, bucket, shorter_rows
from jaxpo.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from jaxpo.errors import UserError
from jaxpo.models import attention
from jaxpo.models.checkpoint import Checkpoint, read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder, Learned, abstract_decoder
from jaxpo.models.export import export
from jaxpo.models.scratch import build
from jaxpo.objectives.score import Scorer, head_blocks
from jaxpo.objectives.unpaired import KTO, APOZeroUnpaired
from jaxpo.reference.fingerprint import weights_fingerprint
from jaxpo.training.checkpoint import latest_step
from jaxpo.training.mesh import Layout, make_mesh

# Where in a run's folder a model from scratch is made, and the file in it that says what it was made of.
INIT = "init"
MADE_OF = "made_of.json"
# Where in a run's folder its stages have theirs.
STAGES = "stages"
# Places of a device's rows that are nobody's mistake, however small the data.
MANY_PLACES = 1 << 20
# Batches whose packing decides on the lengths of rows.
BATCHES_TO_SUIT = 64


@dataclass(frozen=True)
class Parts:
    """What a run works with, before any weight is on a device."""

    run: Run
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerFast
    train: Corpus
    eval: Corpus | None
    layout: Layout
    packing: Packing
    scorer: Scorer

    @property
    def corpora(self) -> list[Corpus]:
        return [self.train] if self.eval is None else [self.train, self.eval]

    def put(self, batch: HostBatch) -> DeviceBatch:
        """A packed batch on the devices."""
        return self.layout.put(batch)

    def load(self, checkpoint: Checkpoint) -> Decoder:
        """A checkpoint's decoder, in the run's dtype, on the mesh."""
        abstract = abstract_decoder(checkpoint.decoder_config, self.run.model.dtype)
        shardings = self.layout.decoder(checkpoint.decoder_config, abstract)
        return load_decoder(checkpoint, self.run.model.dtype, shardings, self.run.training.seed)


def prepare(run: Run, folder: Path) -> Parts:
    """Find the model (make it, if it is from scratch), tokenise the data, lay out the mesh."""
    compiler.set_precision(run.model.compute_dtype)
    layout = Layout(make_mesh(run.mesh))
    say_devices(layout)
    path, revision = initial_model(run, folder), run.model.revision
    checkpoint = read_checkpoint(path, revision, head="score" if learns_rewards(run) else "lm")
    for note in checkpoint.notes:
        console.say(note)
    tokenizer = load_tokenizer(path, revision)
    packing = packing_of(run, layout.batch_devices)
    parts = Parts(
        run=run,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        train=corpus(run, run.data.train, tokenizer),
        eval=corpus(run, run.data.eval, tokenizer) if run.data.eval else None,
        layout=layout,
        packing=packing,
        scorer=scorer_of(run, layout, attention_of(run, layout.platform, checkpoint.decoder_config.head_dim)),
    )
    for key, one in zip(("data.train", "data.eval"), parts.corpora, strict=False):
        warn_of_one_kind(run, one, key)
    return dataclasses.replace(parts, packing=suited(packing, run, parts.train))


def packing_of(run: Run, devices: int) -> Packing:
    """How the run's examples lie in rows that are split over so many devices."""
    training = run.training
    return Packing(
        row_length=training.row_length,
        rows=training.rows_per_device * devices,
        devices=devices,
        packed=training.packing,
        share_prompt=training.share_prompt,
        score_prompt="prompt" in run.objective.statistics,
    )


def scorer_of(run: Run, layout: Layout, implementation: attention.Implementation) -> Scorer:
    """The numerics of the run's forward pass."""
    training = run.training
    row_part = -(-training.row_length // layout.row_devices)
    return Scorer(
        compute_dtype=run.model.compute_dtype,
        remat=run.model.remat,
        unroll=run.model.unroll,
        blocks=head_blocks(row_part, training.rows_per_device, layout.platform, layout.number),
        statistics=run.objective.statistics,
        attention=implementation,
        devices=layout,
    )


def suited(packing: Packing, run: Run, corpus: Corpus) -> Packing:
    """`packing` with the row lengths and the number of microbatches that the corpus asks for."""
    training = run.training
    sizes = packing.size(corpus.prompt_lengths, corpus.completion_lengths)
    usual = np.ceil(training.batch_size * sizes.mean() / packing.row_length / packing.rows)
    packing = dataclasses.replace(packing, microbatches=bucket(int(usual)))
    if training.row_shapes == 1 or sizes.max() > packing.row_length:
        return packing
    order = batches(corpus, training.batch_size, 1, run.data.shuffle, training.seed)
    first = [sizes[order[n]].tolist() for n in range(min(len(order), BATCHES_TO_SUIT))]
    return dataclasses.replace(packing, shorter=shorter_rows(packing, first, training.row_shapes))


def attention_of(run: Run, platform: str, head_dim: int) -> attention.Implementation:
    """The implementation that the run asks for, or the fastest one. Raises UserError if it does not run there."""
    wanted, dtype = run.model.attention, run.model.compute_dtype
    fastest = attention.choose(platform, dtype, head_dim)
    if wanted == "auto":
        return fastest
    if (reason := attention.why_not(wanted, platform, dtype, head_dim)) is not None:
        raise UserError(f"model.attention {wanted} cannot be used here: {reason}. Expected auto, which is {fastest}.")
    return wanted


def learns_rewards(run: Run) -> bool:
    """Whether the run trains a reward model: a decoder whose head gives a score."""
    return "rewards" in run.objective.statistics


def check_examples(parts: Parts) -> None:
    """Raise UserError unless every example fits into a row and into the model, and rows are no larger than of use."""
    check_places(parts.run, parts.train)
    for one in parts.corpora:
        one.check_fits(parts.packing)
        check_positions(one, parts.checkpoint)
        check_vocabulary(one, parts.tokenizer, parts.checkpoint)


def check_places(run: Run, corpus: Corpus) -> None:
    """Raise UserError where rows of a microbatch have more places than all of the data could fill, and many."""
    training, tokens = run.training, int(corpus.prompt_lengths.sum() + corpus.completion_lengths.sum())
    places = training.rows_per_device * training.row_length
    if places > (most := max(MANY_PLACES, tokens)):
        raise UserError(
            f"training.row_length is {training.row_length} and training.rows_per_device {training.rows_per_device}: a "
            f"device would compute {places} places at once, but data.train has {tokens} tokens in all. Expected a "
            f"product of at most {most}."
        )


def check_positions(corpus: Corpus, checkpoint: Checkpoint) -> None:
    """Raise UserError if a prompt with one of its completions is longer than a table of learned positions."""
    positions = checkpoint.decoder_config.positions
    lengths = corpus.prompt_lengths + corpus.completion_lengths.max(axis=1)
    longest = int(lengths.argmax())
    if isinstance(positions, Learned) and lengths[longest] > positions.max_positions:
        raise UserError(
            f"example {corpus[longest].id} is {lengths[longest]} tokens long with its longest completion, but the "
            f"model in {checkpoint.folder} has {positions.max_positions} positions. Expected a data.max_length of at "
            f"most {positions.max_positions}."
        )


def check_vocabulary(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, checkpoint: Checkpoint) -> None:
    """Raise UserError if an example has a token that the model has no embedding for: jax would read another's."""
    size = checkpoint.decoder_config.vocab_size
    if max(tokenizer.get_vocab().values()) < size:
        return
    for example in corpus:
        largest = max(int(part.max(initial=0)) for part in (example.prompt, *example.completions))
        if largest >= size:
            raise UserError(
                f"example {example.id} holds the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but "
                f"the model in {checkpoint.folder} has embeddings for {size} tokens (vocab_size). Expected the "
                "tokenizer that the model was trained with."
            )


def corpus(run: Run, wanted: tuple[DataSource, ...], tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """Tokenised sources, each from the cache or made now."""
    objective = run.objective
    fingerprint = tokenizer_fingerprint(tokenizer)
    # Of a labelled answer the data has one completion; the second is another row's.
    K = 1 if objective.feedback == "label" else objective.num_completions
    tokenised = tuple(
        dataset.prepare(source, run.data, tokenizer, fingerprint, objective.feedback, K) for source in wanted
    )
    for source in tokenised:
        check_judgements(run, source)
    if objective.feedback == "label" and objective.num_completions == 2:
        tokenised = tuple(Mismatched(source, run.data.max_length) for source in tokenised)
    weights = tuple(source.weight for source in wanted if source.weight is not None)
    return Corpus(tokenised, weights or None)


def check_judgements(run: Run, source: dataset.TokenizedDataset) -> None:
    """Raise UserError where the objective has no use for what the rows say of their answers, or needs more."""
    if run.objective.uses_scores and source.scores is None:
        raise UserError(
            f"{source.path} has no ratings, but objective {run.objective.name} is configured to use their gaps. "
            "Expected columns such as chosen_score and rejected_score, or margin."
        )
    if run.objective.uses_scores and source.unrated:
        raise UserError(
            f"{source.path}: {source.unrated} of {len(source)} examples have no ratings, but objective "
            f"{run.objective.name} is configured to use their gaps. Expected ratings in every row."
        )
    if source.soft and not run.objective.uses_labels:
        raise UserError(
            f"{source.path} has soft labels (chosen_probability), but objective {run.objective.name}, as it is "
            "configured, has no use for them. Expected an objective such as dpo, ipo or exo, without score_labels, or "
            "rows without that column."
        )


def kinds(corpus: Corpus) -> tuple[float, float]:
    """How many labelled answers are desirable and how many are not; a soft label counts as what it is."""
    desirable = sum(float(source.labels.sum()) for source in corpus.sources)
    return desirable, len(corpus) - desirable


def warn_of_one_kind(run: Run, corpus: Corpus, key: str) -> None:
    """Warn where the labelled answers of `key`, data.train or data.eval, are all desirable or all undesirable."""
    if run.objective.feedback == "label" and 0.0 in (of := kinds(corpus)):
        console.warn(
            f"{key} has {of[0]:g} desirable and {of[1]:g} undesirable answers: objective {run.objective.name} has "
            "nothing to tell apart; expected answers of both kinds"
        )


def advise_weights(run: Run, corpus: Corpus) -> None:
    """Say how desirable and undesirable answers weigh against each other; warn where KTO's authors advise otherwise.

    Ethayarajh et al. 2024 (arXiv 2402.01306v1), eq. 8: desirable_weight * n_D : undesirable_weight * n_U is best
    between 1 and 4/3 (v4, eq. 9: 3/2). Of sources with a weight, n_D and n_U are shares of an epoch; a soft label
    counts as what it is.
    """
    objective = run.objective
    if not isinstance(objective, KTO | APOZeroUnpaired) or 0.0 in (of := kinds(corpus)):
        return
    sums = [float(source.labels.sum()) for source in corpus.sources]
    sizes = [len(source) for source in corpus.sources]
    times = corpus.weights or sizes
    desirable = sum(t * n / size for t, n, size in zip(times, sums, sizes, strict=True)) / sum(times)
    undesirable = 1.0 - desirable
    counted = f"data.train has {of[0]:g} desirable and {of[1]:g} undesirable answers"
    ours, theirs = objective.desirable_weight * desirable, objective.undesirable_weight * undesirable
    counted += f", {desirable:.1%} of an epoch desirable" if corpus.weights else ""
    stand = f"{counted}; with their weights they stand {ours / theirs:.3g} to 1"
    if 1.0 - 1e-6 <= ours / theirs <= 4 / 3 + 1e-6:
        console.say(stand)
        return
    up, down = decimal.ROUND_CEILING, decimal.ROUND_FLOOR
    low, high = rounded(theirs / desirable, up), rounded(4 / 3 * theirs / desirable, down)
    least, most = rounded(0.75 * ours / undesirable, up), rounded(ours / undesirable, down)
    console.warn(
        f"{stand}, where KTO's authors advise 1 to 4/3: an objective.desirable_weight of {low} to {high}, or an "
        f"objective.undesirable_weight of {least} to {most}"
    )


def rounded(value: float, direction: str) -> str:
    """Three significant digits of a number."""
    return f"{decimal.Context(3, direction).create_decimal(value).normalize():f}"


def initial_model(run: Run, folder: Path) -> str:
    """The folder or hub id of the weights to start from; a model from scratch is made in `folder`/init.

    It is made once, and again only if the run describes another one now, before the first step that is saved.
    """
    if run.model.scratch is None:
        assert run.model.path is not None
        return run.model.path
    made = folder / INIT
    if processes.is_first():
        make_once(run, run.model.scratch, made)
    processes.wait(f"model {made}")
    return str(made)


def make_once(run: Run, scratch: Scratch, made: Path) -> None:
    """The model from scratch in the folder `made`, unless it is there."""
    folder, described = made.parent, description(run)
    if made.exists() and not ((made / MADE_OF).exists() and (made / MADE_OF).read_text(encoding="utf-8") == described):
        if latest_step(folder) is not None:
            raise UserError(
                f"{made} holds a model that was made otherwise than model.scratch, model.dtype, training.seed and "
                "data.train say now, and a run has been trained from it; expected another output_dir."
            )
        shutil.rmtree(made)
    if not made.exists():
        make_from_scratch(run, run.model, scratch, made)
        atomic.write_text(made / MADE_OF, described)


def description(run: Run) -> str:
    """All that a run says of its model from scratch, as JSON."""
    said = config_file.as_mapping(run)
    parts = {"scratch": said["model"]["scratch"], "dtype": run.model.dtype, "seed": run.training.seed}
    parts |= {"train": said["data"]["train"], "feedback": run.objective.feedback}
    return json.dumps(parts, sort_keys=True, indent=1)


def make_from_scratch(run: Run, model: ModelConfig, scratch: Scratch, folder: Path) -> None:
    """Train a tokenizer on the training rows, draw weights from the seed, and write both as a Hugging Face folder."""
    console.say(f"training a tokenizer of {scratch.tokenizer.vocab_size} tokens on data.train")
    texts = (text for source in run.data.train for text in source_texts(source, run.objective))
    tokenizer = train_tokenizer(texts, scratch.tokenizer.vocab_size, scratch.tokenizer.chat_template)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    new = build(scratch.architecture, len(tokenizer), special, jax.random.key(run.training.seed), dtype=model.dtype)
    export(new.decoder, new.hf_config, folder, tokenizer=tokenizer)


def source_texts(source: DataSource, objective: Objective) -> Iterator[str]:
    """The texts of a source's rows, in order: what a tokenizer learns from."""
    shape = None
    for where, row in sources.read(source):
        record = formats.Record(where, row)
        shape = shape or formats.detect(record, source.format, objective.feedback, objective.num_completions)
        parsed = formats.parse(record, shape, objective.num_completions)
        if not isinstance(parsed, formats.Drop):
            for preference in parsed:
                yield from formats.texts(preference)


def say_devices(layout: Layout) -> None:
    devices = layout.mesh.devices.flat
    axes = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1)
    among = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.say(f"on {len(devices)} {devices[0].device_kind} device(s){among}{', mesh ' if axes else ''}{axes}")


def weights_of(run: Run, checkpoint: Checkpoint) -> str:
    """The fingerprint of a checkpoint's weights."""
    cache_dir = run.reference.cache_dir.expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"reference.cache_dir {cache_dir} cannot be used: {error}.") from error
    return weights_fingerprint(checkpoint.weight_files, cache_dir / "weights.json")


def stage_of(run: Run, name: str) -> Run:
    """A stage of the run, as --stage names it."""
    if name not in run.stages:
        known = ", ".join(run.stages) or "none, for the config has no stages"
        raise UserError(f"--stage is {name}; expected one of the config's stages: {known}.")
    return run.stages[name]


def at_stage(run: Run, folder: Path) -> Run:
    """The run with `stage:NAME` paths resolved to the exports of earlier stages in the whole run's `folder`."""

    def resolve(path: str | None) -> str | None:
        if path is None or not path.startswith(STAGE):
            return path
        export = folder / STAGES / path.removeprefix(STAGE) / "export"
        if not export.exists():
            raise UserError(
                f"{path} is not trained yet: {export} does not exist; expected `train` to have run that stage."
            )
        return str(export)

    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, path=resolve(run.model.path)),
        reference=dataclasses.replace(run.reference, path=resolve(run.reference.path)),
    )
