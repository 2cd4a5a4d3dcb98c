"""The kinds of faults of the campaign, each drawn from a seed: what happens before, in and after the first start."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainee import METRICS, Ended, Trainee


@dataclass(frozen=True)
class Whole:
    """What is known of the undisturbed run of a variant: how long it takes, and how much it writes.

    seconds: from the moment that its folder is claimed to its end. renames: how often something takes its name in the
    process. sizes: bytes of its folder, its reference tables and its tokenised data.
    """

    folder: Path
    seconds: float
    renames: int
    sizes: dict[str, int]


@dataclass
class Fault:
    """One fault. prepare: before the first start, which is `first`; damage: after it; undo: what a person does who
    reads that a folder cannot be written, or that metrics.jsonl is damaged."""

    detail: str
    first: Callable[[Trainee], Ended] = Trainee.to_its_end
    prepare: Callable[[Trainee], None] = lambda trainee: None
    damage: Callable[[Trainee], str] = lambda trainee: ""
    undo: Callable[[Trainee], None] = lambda trainee: None
    damages_metrics: bool = False


Kind = Callable[[random.Random, Whole], Fault]


def killed_at(point: str, count: int, delay: float = 0.0, victim: int = 0) -> Callable[[Trainee], Ended]:
    return lambda trainee: trainee.to_its_end({victim: (point, str(count), str(delay))})


def at(point: str, count: int = 1, delay: float = 0.0, after: str = "") -> Fault:
    later = f", {delay:.3f} s later" if delay else ""
    return Fault(f"at {point} {count}{later}{after}", killed_at(point, count, delay))


def after_claim(seconds: float) -> Callable[[Trainee], bool]:
    """The moment some seconds after the run has its folder."""
    since: list[float] = []

    def come(trainee: Trainee) -> bool:
        if not since and (trainee.run / "config.yaml").exists():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + seconds

    return come


def after_line(step: int) -> Callable[[Trainee], bool]:
    """The moment that a step has been logged."""
    return lambda trainee: step in trainee.logged()


# Processes that end.


def kill(draw: random.Random, whole: Whole) -> Fault:
    moment = draw.uniform(0.0, whole.seconds)
    return Fault(
        f"{moment:.1f} s after the claim",
        lambda trainee: trainee.signalled(signal.SIGKILL, [0], after_claim(moment)),
    )


def kill_at_rename(draw: random.Random, whole: Whole) -> Fault:
    return at(draw.choice(["rename", "renamed"]), draw.randint(1, whole.renames))


def kill_in_commit(draw: random.Random, _: Whole) -> Fault:
    return at("checkpoint", draw.randint(1, 3), draw.choice([0.0, draw.uniform(0.0, 0.01), draw.uniform(0.0, 0.1)]))


def kill_in_export(draw: random.Random, _: Whole) -> Fault:
    points = ["plots", "weights", "small files", "export", "exported", "summary"]
    point = draw.choice(points)
    return at(point, draw.randint(1, 3) if point == "small files" else 1)


def kill_in_reference(draw: random.Random, _: Whole) -> Fault:
    return at("reference", draw.randint(1, 3), draw.uniform(0.0, 0.01))


def kill_in_tokenising(draw: random.Random, _: Whole) -> Fault:
    return at("tokens", draw.randint(1, 2))


def kill_in_scratch(draw: random.Random, _: Whole) -> Fault:
    return draw.choice([at("scratch"), at("small files", draw.randint(1, 3)), at("export")])


def kill_in_sync(draw: random.Random, _: Whole) -> Fault:
    return at("sync", draw.randint(1, 2))


def terminate(draw: random.Random, whole: Whole) -> Fault:
    if draw.random() < 0.5:
        step = draw.randint(0, 5)
        return Fault(
            f"once step {step} is logged", lambda trainee: trainee.signalled(signal.SIGTERM, [0], after_line(step))
        )
    moment = draw.uniform(0.0, whole.seconds)
    return Fault(
        f"{moment:.1f} s after the claim",
        lambda trainee: trainee.signalled(signal.SIGTERM, [0], after_claim(moment)),
    )


def kill_one_of_two(draw: random.Random, whole: Whole) -> Fault:
    victim = draw.randint(0, 1)
    if draw.random() < 0.5:
        step = draw.randint(0, 5)
        when, moment = f"once step {step} is logged", after_line(step)
    else:
        seconds = draw.uniform(0.0, whole.seconds)
        when, moment = f"{seconds:.1f} s after the claim", after_claim(seconds)
    return Fault(f"process {victim}, {when}", lambda trainee: trainee.signalled(signal.SIGKILL, [victim], moment))


def kill_both(draw: random.Random, whole: Whole) -> Fault:
    seconds = draw.uniform(0.0, whole.seconds)
    return Fault(
        f"{seconds:.1f} s after the claim",
        lambda trainee: trainee.signalled(signal.SIGKILL, [0, 1], after_claim(seconds)),
    )


def terminate_one_of_two(draw: random.Random, _: Whole) -> Fault:
    victim, step = draw.randint(0, 1), draw.randint(0, 5)
    return Fault(
        f"process {victim}, once step {step} is logged",
        lambda trainee: trainee.signalled(signal.SIGTERM, [victim], after_line(step)),
    )


def kill_one_of_two_in_commit(draw: random.Random, _: Whole) -> Fault:
    victim, count, delay = draw.randint(0, 1), draw.randint(1, 3), draw.uniform(0.0, 0.05)
    return Fault(
        f"process {victim}, at checkpoint {count}, {delay:.3f} s later", killed_at("checkpoint", count, delay, victim)
    )


# Disks that take nothing.


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=False, stderr=subprocess.DEVNULL)


PLACES: dict[str, Callable[[Trainee], Path]] = {
    "run": lambda trainee: trainee.run,
    "reference": lambda trainee: trainee.reference,
    "data": lambda trainee: trainee.data,
}


def full_disk(draw: random.Random, whole: Whole) -> Fault:
    place = draw.choice(["run", "run", "run", "run", "reference", "data"])
    pages = draw.randint(1, max(1, int(0.9 * whole.sizes[place]) // 4096))

    def small(trainee: Trainee) -> None:
        folder = PLACES[place](trainee)
        folder.mkdir(parents=True)
        mount("-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", str(folder))

    return Fault(
        f"{4 * pages} KiB for {place}, which takes {whole.sizes[place] // 1024}",
        prepare=small,
        undo=lambda trainee: mount("-o", "remount,size=256m", str(PLACES[place](trainee))),
    )


def read_only(draw: random.Random, _: Whole) -> Fault:
    """A place that becomes read-only after a first start was killed, or is from the beginning."""
    place = draw.choice([*PLACES])
    point = draw.choice([None, "reference", "step", "checkpoint"])
    lower = draw.choice(["", "checkpoints"]) if place == "run" and point == "checkpoint" else ""

    def folder(trainee: Trainee) -> Path:
        return PLACES[place](trainee) / lower

    def close(trainee: Trainee) -> str:
        folder(trainee).mkdir(parents=True, exist_ok=True)
        mount("--bind", str(folder(trainee)), str(folder(trainee)))
        mount("-o", "remount,ro,bind", str(folder(trainee)))
        return ""

    def undo(trainee: Trainee) -> None:
        unmount(folder(trainee))

    what = f"{place}/{lower}" if lower else place
    if point is None:
        return Fault(f"{what} from the beginning", prepare=lambda trainee: void(close(trainee)), undo=undo)
    return Fault(f"{what} after a kill at {point} 2", killed_at(point, 2), damage=close, undo=undo)


def void(_: object) -> None:
    return None


def in_the_way(draw: random.Random, _: Whole) -> Fault:
    """A file where a folder is to be."""
    name = draw.choice(["run/checkpoints", "run/export", "run/plots", "reference", "data", "run"])
    point = draw.choice(["config", "reference", "checkpoint"]) if name.startswith("run/") else None

    def put(trainee: Trainee) -> str:
        path = trainee.folder / name
        if path.is_dir():
            path.rename(path.with_name(f"{path.name}-moved-away"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a folder")
        return ""

    def undo(trainee: Trainee) -> None:
        path = trainee.folder / name
        away = path.with_name(f"{path.name}-moved-away")
        path.unlink()
        if away.exists():
            away.rename(path)

    if point is None:
        return Fault(f"{name} from the beginning", prepare=lambda trainee: void(put(trainee)), undo=undo)
    return Fault(f"{name} after a kill at {point} 1", killed_at(point, 1), damage=put, undo=undo)


# Files that are damaged.


def damage(path: Path, draw: random.Random) -> str:
    """Cut a file, change a byte of it, or take it away; says what was done."""
    content = path.read_bytes()
    how = draw.choice(["cut", "cut", "changed", "removed"]) if content else "removed"
    if how == "removed":
        path.unlink()
        return f"{path.name} removed"
    place = draw.randrange(len(content))
    if how == "cut":
        path.write_bytes(content[:place])
        return f"{path.name} cut to {place} of {len(content)} bytes"
    path.write_bytes(content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :])
    return f"{path.name} changed at {place} of {len(content)} bytes"


def damaged(
    point: str, count: int, delay: float, choose: Callable[[Trainee], list[Path]], draw: random.Random
) -> Fault:
    """A kill, after which one of the chosen files is damaged."""

    def hurt(trainee: Trainee) -> str:
        files = sorted(path for path in choose(trainee) if path.is_file())
        if not files:
            return "nothing there to damage"
        path = draw.choice(files)
        return f"{path.relative_to(trainee.folder).parent}/{damage(path, draw)}"

    return Fault(f"after a kill at {point} {count}", killed_at(point, count, delay), damage=hurt)


def damaged_checkpoint(draw: random.Random, _: Whole) -> Fault:
    def last(trainee: Trainee) -> list[Path]:
        saved = trainee.saved()
        return [*(trainee.run / "checkpoints" / str(saved[-1])).rglob("*")] if saved else []

    return damaged("checkpoint", draw.randint(2, 3), 1.0, last, draw)


def damaged_reference(draw: random.Random, _: Whole) -> Fault:
    point = draw.choice(["reference", "step", "checkpoint"])
    return damaged(point, 1, 0.0, lambda trainee: [*trainee.reference.rglob("*")], draw)


def damaged_data(draw: random.Random, _: Whole) -> Fault:
    point = draw.choice(["reference", "step", "checkpoint"])
    return damaged(point, 1, 0.5, lambda trainee: [*trainee.data.rglob("*")], draw)


def damaged_small_file(draw: random.Random, _: Whole) -> Fault:
    name = draw.choice(["inputs.json", "samples.json", "dropped.jsonl"])
    return damaged("checkpoint", draw.randint(1, 3), 0.5, lambda trainee: [trainee.run / name], draw)


def damaged_metrics(draw: random.Random, _: Whole) -> Fault:
    """The end of metrics.jsonl is cut or zeros, as by a machine that loses power, or any line has another byte."""

    whole: list[bytes] = []

    def put_back(trainee: Trainee) -> None:
        (trainee.run / METRICS).write_bytes(whole[0])

    def hurt(trainee: Trainee) -> str:
        path = trainee.run / METRICS
        content = path.read_bytes()
        whole.append(content)
        start = content.rstrip(b"\n").rfind(b"\n") + 1
        how = draw.choice(["cut", "zeros", "changed", "changed"])
        place = draw.randrange(0 if how == "changed" else start, len(content))
        if how == "cut":
            path.write_bytes(content[:place])
        elif how == "zeros":
            path.write_bytes(content[:place] + bytes(len(content) - place - 1) + b"\n")
        else:
            path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        return f"{how} at {place} of {len(content)} bytes, the last line from {start} on"

    point, count, delay = draw.choice(
        [("checkpoint", 2, 1.0), ("checkpoint", 3, 1.0), ("step", 4, 0.5), ("plots", 1, 0.0)]
    )
    detail = f"after a kill at {point} {count}"
    return Fault(detail, killed_at(point, count, delay), damage=hurt, undo=put_back, damages_metrics=True)
