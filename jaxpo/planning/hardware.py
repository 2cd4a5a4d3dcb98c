"""The chips that train, and what joins them: figures that their vendors publish.

TPUs: the system architecture pages of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x). GPUs: NVIDIA's data sheets
of A100, H100, H200 and HGX/DGX B200; hosts of eight, each GPU with an InfiniBand port as in NVIDIA's DGX systems.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from jaxpo.errors import UserError

GIB = 1 << 30
# XLA makes a float32 product at the precision `highest` of six products of bfloat16 on a TPU.
PASSES = 6
# Of a TPU's 16 GiB a program gets 15.75; of a GPU's memory jax takes three quarters, unless one of FRACTIONS says
# otherwise.
SHARE = {"gpu": 0.75, "tpu": 0.98, "cpu": 0.9}
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def share_of(platform: str) -> tuple[float, str | None]:
    """The share of a device's memory that a program gets, and the variable of the environment that says so, if any.

    Raises UserError where it is no such number.
    """
    name = next((name for name in FRACTIONS if os.environ.get(name)), None)
    if platform != "gpu" or name is None:
        return SHARE[platform], None
    try:
        share = float(os.environ[name])
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise UserError(f"{name} is {os.environ[name]!r}; expected a number above 0 and no more than 1.")
    return share, name


@dataclass(frozen=True)
class Chip:
    """One device as jax counts them.

    kinds: its names in jax. memory: bytes. bandwidth: of that memory, bytes/s. flops, flops32: dense products of
    bfloat16, and of float32 that is not rounded, FLOP/s. torus: axes of the torus that chips form; 0 for a host whose
    chips all reach each other. ring: lengths of a torus's axis that close to a ring are multiples of it. link: bytes/s
    one way, of a link of the torus, or of all that a chip of a host has. island: how many chips such links join at
    most. between: bytes/s one way for each chip between islands, None where nothing is published. host: bytes/s one way
    to the host's memory.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    memory: float
    bandwidth: float
    flops: float
    flops32: float
    link: float
    island: int
    between: float | None
    host: float
    torus: int = 0
    ring: int = 0

    def peak(self, compute_dtype: str) -> float:
        return self.flops if compute_dtype == "bfloat16" else self.flops32

    @property
    def usable(self) -> float:
        """Bytes that a program gets of the memory."""
        return self.memory * share_of(self.platform)[0]


def _gpu(
    name: str,
    kinds: tuple[str, ...],
    gib: int,
    bandwidth: float,
    flops: float,
    flops32: float,
    link: float,
    between: float,
    host: float,
) -> Chip:
    return Chip(name, "gpu", kinds, gib * GIB, bandwidth, flops, flops32, link, 8, between, host)


def _tpu(
    name: str,
    kind: str,
    gib: int,
    bandwidth: float,
    flops: float,
    link: float,
    island: int,
    between: float | None,
    torus: int,
) -> Chip:
    # 16 GB/s to the host: Austin et al. 2025, How to Scale Your Model (jax-ml.github.io/scaling-book), ch. 2.
    return Chip(
        name=name,
        platform="tpu",
        kinds=(kind,),
        memory=gib * GIB,
        bandwidth=bandwidth,
        flops=flops,
        flops32=flops / PASSES,
        link=link,
        island=island,
        between=between,
        host=16e9,
        torus=torus,
        ring=16 if torus == 2 else 4,
    )


# NVLink and PCIe are published for both directions together; half of that here. So are the links of TPUs: 400 GB/s of
# a v5e's four, 1,200 GB/s of a v5p's six. Data-center networks: 6.4 Tb/s a pod of v5e, 25.6 Tb/s a pod of v6e.
CHIPS = (
    _gpu("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 40, 1555e9, 312e12, 19.5e12, 300e9, 25e9, 32e9),
    _gpu("a100", ("NVIDIA A100-SXM4-80GB",), 80, 2039e9, 312e12, 19.5e12, 300e9, 25e9, 32e9),
    _gpu("a100-pcie", ("NVIDIA A100 80GB PCIe",), 80, 1935e9, 312e12, 19.5e12, 32e9, 25e9, 32e9),
    _gpu("h100", ("NVIDIA H100 80GB HBM3",), 80, 3350e9, 989e12, 67e12, 450e9, 50e9, 64e9),
    _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 80, 2000e9, 756e12, 51e12, 64e9, 50e9, 64e9),
    _gpu("h200", ("NVIDIA H200",), 141, 4800e9, 989e12, 67e12, 450e9, 50e9, 64e9),
    _gpu("b200", ("NVIDIA B200",), 180, 8000e9, 2250e12, 75e12, 900e9, 50e9, 64e9),
    _tpu("v4", "TPU v4", 32, 1200e9, 275e12, 50e9, 4096, None, torus=3),
    _tpu("v5e", "TPU v5 lite", 16, 819e9, 197e12, 50e9, 256, 6.4e12 / 8 / 256, torus=2),
    _tpu("v5p", "TPU v5", 95, 2765e9, 459e12, 100e9, 8960, None, torus=3),
    _tpu("v6e", "TPU v6 lite", 32, 1640e9, 918e12, 100e9, 256, 25.6e12 / 8 / 256, torus=2),
    # A chip is two devices, which share its links.
    _tpu("v7x", "TPU7x", 96, 7380e9 / 2, 2307e12 / 2, 50e9, 2 * 9216, None, torus=3),
)
BY_KIND = {kind: chip for chip in CHIPS for kind in chip.kinds}


@dataclass(frozen=True)
class Link:
    """How the devices along an axis of a mesh reach each other.

    inside: devices of the axis in one island, each of which takes in `bandwidth` bytes/s from the others. islands: how
    many such there are, joined at `between` bytes/s for each device.
    """

    inside: int
    bandwidth: float
    islands: int
    between: float

    def seconds(self, size: float) -> float:
        """Time at least to gather an array of `size` bytes, whole, from its parts on all devices, or to sum as many up.

        Rings within islands, and every device's own way out at once between them: an island takes in what it lacks
        through all of its devices' ports.
        """
        n = self.inside * self.islands
        within = size * (n - 1) / n / self.bandwidth if self.inside > 1 else 0.0
        across = size * (1 - 1 / self.islands) / (self.inside * self.between) if self.islands > 1 else 0.0
        return max(within, across)


@dataclass(frozen=True)
class Topology:
    """Devices of one kind: `islands` of them, in each of which chips are joined in a torus of this shape, or a host."""

    chip: Chip
    shape: tuple[int, ...]
    islands: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.islands

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        if self.chip.torus:
            return (
                f"{self.chip.name}:{shape}"
                if self.islands == 1
                else f"{self.islands} slices of {self.chip.name}:{shape}"
            )
        return f"{self.chip.name}x{self.devices}"

    def links(self, sizes: Mapping[str, int]) -> dict[str, Link]:
        """What joins the devices along each axis of a mesh, the last axis being that of neighbours.

        Whole axes of a torus are taken where they fit, which are rings if they are long enough to close; else a part of
        one, which is a line. What an island has no room for goes between islands.
        """
        free = list(self.shape)
        found: dict[str, Link] = {}
        for axis in reversed(list(sizes)):
            rest, used = sizes[axis], []
            for place in _places(free, rest):
                part = math.gcd(rest, free[place])
                used.append((part, self._closes(place, part)))
                rest //= part
                free[place] //= part
            ways = sum((2 if ring else 1) for part, ring in used if part > 1)
            bandwidth = self.chip.link * (ways if self.chip.torus else 1)
            between = self.chip.between or self.chip.link
            found[axis] = Link(sizes[axis] // rest, bandwidth, rest, between)
        return {axis: found[axis] for axis in sizes}

    def _closes(self, place: int, part: int) -> bool:
        return bool(self.chip.ring) and part == self.shape[place] and part % self.chip.ring == 0


def _places(free: list[int], size: int) -> list[int]:
    """The axes of a torus to lay devices along: whole ones if their product is `size`, else all, the longest first."""
    places = [place for place in range(len(free)) if free[place] > 1]
    for count in range(1, len(places) + 1):
        for some in combinations(places, count):
            if math.prod(free[place] for place in some) == size:
                return list(some)
    return sorted(places, key=lambda place: -free[place])


def parse(text: str) -> Topology:
    """`v5e:8x8`, `v5px64`, `h100x16`: a kind of chip, and the shape of one slice or a number of chips."""
    names = sorted((chip.name for chip in CHIPS), key=len, reverse=True)
    given = re.fullmatch(rf"({'|'.join(names)})(?::(\d+(?:x\d+)*)|x(\d+))", text.lower())
    if given is None:
        raise UserError(
            f'--topology is "{text}"; expected a kind of chip, and the shape of a slice or a number of chips, such as '
            f"v5e:8x8, v5px64 or h100x16. Known are {', '.join(chip.name for chip in CHIPS)}."
        )
    name, shape, count = given.groups()
    chip = next(chip for chip in CHIPS if chip.name == name)
    if shape is None:
        return of_count(chip, int(count))
    sizes = tuple(map(int, shape.split("x")))
    if chip.torus != len(sizes) or 0 in sizes:
        expected = f"{chip.torus} sizes of a torus, such as {chip.name}:{'x'.join(['4'] * chip.torus)}"
        raise UserError(
            f'--topology is "{text}"; expected {expected if chip.torus else f"a number of chips, such as {name}x8"}.'
        )
    if math.prod(sizes) > chip.island:
        raise UserError(
            f'--topology is "{text}", {math.prod(sizes)} chips; a slice of {name} has at most {chip.island}: for more '
            f"of them expected a number, {name}x{math.prod(sizes)}."
        )
    return Topology(chip, sizes)


def of_count(chip: Chip, count: int) -> Topology:
    """So many chips: one island where they fit, else several of the largest size. UserError where there is none."""
    each = math.gcd(count, chip.island) if count > chip.island else count
    islands = count // each if each else 0
    if islands > 1 and (each < chip.island or chip.between is None):
        at_most = f"at most {chip.island}" if chip.between is None else f"a multiple of {chip.island}, or fewer"
        raise UserError(f"--topology is {count} chips of {chip.name}; expected {at_most}.")
    if not chip.torus:
        if count < 1:
            raise UserError(f"--topology is {count} chips of {chip.name}; expected 1 or more.")
        return Topology(chip, (each,), islands)
    if each < 1 or each & (each - 1):
        raise UserError(
            f"--topology is {count} chips of {chip.name}, which form no torus of powers of two; expected its shape, "
            f"such as {chip.name}:{'x'.join(['4'] * chip.torus)}."
        )
    return Topology(chip, even(each, chip.torus), islands)


def even(count: int, axes: int) -> tuple[int, ...]:
    """A power of two as a product of `axes` powers of two, as even as possible, the smaller ones first."""
    exponent = count.bit_length() - 1
    return tuple(1 << (exponent + place) // axes for place in range(axes))
