"""The `plan` command: whether a run fits its devices, how fast it can be, and what to change, before it runs."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from jaxpo import atomic, compiler, console
from jaxpo.config import STAGE, Run
from jaxpo.conversion import of_same_shape
from jaxpo.errors import UserError
from jaxpo.models import scratch
from jaxpo.models.checkpoint import read_decoder_config
from jaxpo.models.decoder import DecoderConfig
from jaxpo.planning.compiled import Compiled, measured
from jaxpo.planning.hardware import FRACTIONS, GIB, Topology, parse, share_of
from jaxpo.planning.here import devices_here
from jaxpo.planning.lengths import lengths
from jaxpo.planning.memory import LAYER
from jaxpo.planning.search import MARGIN, Change, Estimate, changed, estimate, knobs, ranked, remedy
from jaxpo.planning.speed import ASSUMPTIONS, device_flops, seconds_of, useful_flops
from jaxpo.planning.traffic import collectives
from jaxpo.planning.work import Batches, Step, batches_of, parameters
from jaxpo.prepare import STAGES, attention_of, learns_rewards, stage_of
from jaxpo.training.mesh import axis_sizes

COLORS = {"fits": "bold green", "may fit": "bold yellow", "does not fit": "bold red"}
# Settings that `--search` shows, and changes that are offered where a run does not fit.
SHOWN = 12


def show(
    whole: Run,
    stage: str | None,
    topology: str | None,
    told: tuple[int, ...] | None,
    *,
    search: bool,
    compiles: bool,
    file: Path | None,
) -> None:
    """Print what a run, or one of its stages, takes on a topology (`hardware.parse`), or on the devices here.

    file: to write it to as JSON. told: tokens of a prompt and of each of its completions, see `lengths`.
    """
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"--json {file} cannot be written: expected the name of a file, in a folder that is there.")
    run = whole if stage is None else stage_of(whole, stage)
    compiler.set_up(run.model.compute_dtype)
    where = None if topology is None else parse(topology)
    model = model_of(run, whole)
    where = devices_here(run.model.compute_dtype) if where is None else where
    now = estimate(step_of(run, model, batches_for(run, model, told), where), where)
    offered = [] if now.verdict == "fits" else knobs(now)
    first = None if now.verdict == "fits" else remedy(now)
    found = ranked(now) if search else []
    _say_verdict(now, first)
    _show_memory(now)
    _show_step(now)
    if offered:
        _show_changes(offered)
    if search:
        _show_ranking(now, found)
    said = None
    if compiles:
        compiled_step, said = measured(now.step, where)
        _show_compiled(now, compiled_step, said)
    share, because = share_of(where.chip.platform)
    memory = f"memory: {share:.0%} of {_size(where.chip.memory)}"
    if where.chip.platform == "gpu":
        memory += f", as {because} says" if because else f", which jax takes unless {FRACTIONS[0]} says otherwise"
    for line in (f"{memory}; it fits with {MARGIN:.0%} to spare, what the estimate may be wrong by.", *ASSUMPTIONS):
        _say(Text(line, style="dim"))
    if file is not None:
        try:
            atomic.write_text(file, json.dumps(as_json(now, offered, first, found, said), indent=1))
        except OSError as error:
            raise UserError(f"--json {file} cannot be written: {error}.") from error


def model_of(run: Run, whole: Run) -> DecoderConfig:
    """The decoder that a run trains, which may be a stage of `whole`: from its configuration alone."""
    head = "score" if learns_rewards(run) else "lm"
    if run.model.scratch is not None:
        vocabulary = run.model.scratch.tokenizer.vocab_size
        config = scratch.configure(run.model.scratch.architecture, vocabulary, {})[1]
        return dataclasses.replace(config, head="score") if head == "score" else config
    path = run.model.path
    assert path is not None
    if not path.startswith(STAGE):
        assert whole.output_dir is not None
        known = of_same_shape(run, whole.output_dir.expanduser()).model
        assert known.path is not None
        return read_decoder_config(known.path, known.revision, head)
    name = path.removeprefix(STAGE)
    assert whole.output_dir is not None
    export = whole.output_dir.expanduser() / STAGES / name / "export"
    if (export / "config.json").is_file():
        return read_decoder_config(export, None, head)
    before = model_of(whole.stages[name], whole)
    return dataclasses.replace(before, head="score") if head == "score" else before


def batches_for(run: Run, model: DecoderConfig, told: tuple[int, ...] | None) -> Batches:
    prompts, completions, origin = lengths(run, told)
    return batches_of(prompts, completions, run, model.window, origin)


def step_of(run: Run, model: DecoderConfig, batches: Batches, where: Topology) -> Step:
    """The step of a run on some devices, its mesh resolved."""
    platform = where.chip.platform
    sizes = axis_sizes(run.mesh, where.devices, "devices")
    run = changed(run, [(f"mesh.{axis}", size) for axis, size in sizes.items()])
    return Step(run, model, batches, platform, attention_of(run, platform, model.head_dim))


def _say_verdict(now: Estimate, first: Change | None) -> None:
    """The lines that answer the question."""
    step, chip, training = now.step, now.topology.chip, now.step.run.training
    mesh = ", ".join(f"{axis} {size}" for axis, size in step.sizes.items() if size > 1) or "one device"
    room = f"{_size(now.memory.peak)} of {_size(chip.usable)} on each device"
    speed = f"a step of {training.batch_size} examples takes {_time(now.times.total)} at best"
    _say(Text.assemble((now.verdict, COLORS[now.verdict]), f": {room}; {speed}, bound by {now.times.bound_by}"))
    if first is not None:
        rest = f"{_size(first.estimate.memory.peak)}, {_time(first.estimate.times.total)}"
        _say(Text.assemble(("change first", "bold"), f": {' '.join(first.overrides)}  ({rest})"))
    elif now.verdict != "fits":
        _say("no three of the changes below make it fit: expected more devices, or larger ones")
    _say(f"{parameters(step.model):,} parameters, {step.run.objective.name}, on {now.topology}: {mesh}")
    _say(f"lengths: {step.batches.origin}")
    console.say("")


def _say(text: Text | str) -> None:
    """A line, broken between words at the width of the terminal."""
    console.console.print(Text(text) if isinstance(text, str) else text)


def _show_memory(now: Estimate) -> None:
    kinds = now.memory.phases[now.memory.phase]
    rows = [(kind, _size(size), f"{size / now.memory.peak:.0%}") for kind, size in kinds.items() if size]
    rows.append((f"at most, {now.memory.phase}", _size(now.memory.peak), "100%"))
    if now.memory.host:
        rows.append(("in the host's memory besides", _size(now.memory.host), "-"))
    console.table("memory of a device", ("kind", "bytes", "share"), rows)


def _show_step(now: Estimate) -> None:
    step, times, M = now.step, now.times, now.step.microbatches
    done = device_flops(step)
    more = f"{done * step.devices / useful_flops(step):.2f} x the useful"
    rows: list[tuple[str, str, str]] = [
        ("compute", f"{_amount(done)}FLOP, {more}", _time(times.products)),
        ("memory", f"{_amount(times.memory * now.topology.chip.bandwidth)}B read and written", _time(times.memory)),
    ]
    for one in collectives(step):
        said = f"{one.kind} of {one.what}, {_amount(M * one.bytes)}B"
        rows.append((f"over {'+'.join(one.axes)}", said, _time(M * seconds_of(one, step, now.topology))))
    if times.host:
        rows.append(("host", "activations there and back", _time(times.host)))
    rows.append(("update", "norms, moments and weights", _time(times.update)))
    if times.moments:
        rows.append(("host", "moments here and back", _time(times.moments)))
    tokens = f"{step.batches.counts.tokens:,.0f} tokens, {M:.3g} microbatches, rows {step.batches.fill:.0%} full"
    _say(f"a step: {tokens}, {_amount(useful_flops(step))}FLOP useful")
    console.table("time of a step", ("part", "of a device", "at best"), rows)


def _show_changes(offered: Sequence[Change]) -> None:
    rows = [
        (
            " ".join(one.overrides),
            _size(one.estimate.memory.peak),
            _time(one.estimate.times.total),
            one.estimate.verdict,
        )
        for one in offered[:SHOWN]
    ]
    console.table("one change at a time", ("change", "memory", "step", ""), rows)


def _show_ranking(now: Estimate, found: Sequence[Change]) -> None:
    if not found:
        _say("no mesh, rows_per_device and remat fit; see the changes above")
        return
    axes = tuple(now.step.sizes)
    rows = []
    for one in found[:SHOWN]:
        step, seconds = one.estimate.step, one.estimate.times.total
        share = useful_flops(step) / step.devices / now.topology.chip.peak(step.run.model.compute_dtype) / seconds
        rows.append(
            (
                _time(seconds),
                f"{share:.0%}",
                *(str(step.sizes[axis]) for axis in axes),
                str(step.run.training.rows_per_device),
                step.run.model.remat,
                _size(one.estimate.memory.peak),
                one.estimate.verdict,
            )
        )
    title = f"the fastest of {len(found):,} settings that fit; mfu at best"
    console.table(title, ("step", "mfu", *axes, "rows", "remat", "memory", ""), rows)


def _show_compiled(now: Estimate, step: Step, said: Compiled) -> None:
    """XLA's figures beside those of the plan for the same platform."""
    planned = estimate(step, now.topology).memory
    if said.platform != now.topology.chip.platform:
        _say(
            f"--compile: there is no compiler for {now.topology} here (for one slice of TPUs it is libtpu, installed "
            f"or in the folder that JAXPO_LIBTPU names); compiled for {step.devices} simulated CPU devices"
        )
    if said.peak is None:
        _say(Text.assemble(("does not fit", COLORS["does not fit"]), f", says XLA: {said.message}"))
        return
    on_device = planned.weights + planned.batch + planned.phases[LAYER]["moments"]
    rows = [
        ("state and batch", _size(said.arguments), _size(on_device)),
        ("at most", _size(said.peak), _size(planned.peak)),
        ("in the host's memory", _size(said.host), _size(planned.host)),
    ]
    ratio = planned.peak / said.peak
    console.table(f"compiled for {said.platform}: planned over compiled {ratio:.2f}", ("", "XLA", "plan"), rows)


def as_json(
    now: Estimate, offered: Sequence[Change], first: Change | None, found: Sequence[Change], said: Compiled | None
) -> dict[str, Any]:
    """All figures: bytes, seconds, FLOP."""
    step = now.step

    def brief(one: Change) -> dict[str, Any]:
        return {
            "overrides": list(one.overrides),
            "verdict": one.estimate.verdict,
            "peak_bytes": one.estimate.memory.peak,
            "step_s": one.estimate.times.total,
        }

    return {
        "topology": str(now.topology),
        "mesh": dict(step.sizes),
        "parameters": parameters(step.model),
        "verdict": now.verdict,
        "margin": MARGIN,
        "usable_bytes": now.topology.chip.usable,
        "peak_bytes": now.memory.peak,
        "peak_phase": now.memory.phase,
        "bytes": {phase: dict(kinds) for phase, kinds in now.memory.phases.items()},
        "host_bytes": now.memory.host,
        "lengths": step.batches.origin,
        "tokens": step.batches.counts.tokens,
        "microbatches": step.microbatches,
        "useful_flops": useful_flops(step),
        "device_flops": device_flops(step),
        "step_s": now.times.total,
        "bound_by": now.times.bound_by,
        "seconds": now.times._asdict(),
        "collectives": [
            {**dataclasses.asdict(one), "bytes": step.microbatches * one.bytes} for one in collectives(step)
        ],
        "change_first": None if first is None else brief(first),
        "changes": [brief(one) for one in offered],
        "ranking": [brief(one) for one in found],
        "compiled": None if said is None else dataclasses.asdict(said),
        "assumptions": list(ASSUMPTIONS),
    }


def _size(size: float) -> str:
    """GiB, or MiB of what is small."""
    value, unit = (size / GIB, "GiB") if size >= GIB / 10 else (1024 * size / GIB, "MiB")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _amount(value: float) -> str:
    """Three digits, and the prefix of a thousand's power."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"
