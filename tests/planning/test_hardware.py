"""Topologies by their names, and what joins the devices of a mesh on them."""

import re

import pytest

from jaxpo.config import MeshConfig
from jaxpo.errors import UserError
from jaxpo.planning.hardware import Link, parse
from jaxpo.training.flops import PEAK
from jaxpo.training.mesh import axis_sizes


@pytest.mark.parametrize(
    ("text", "shape", "islands"),
    [
        ("v5e:8x8", (8, 8), 1),
        ("v5ex64", (8, 8), 1),
        ("v5ex128", (8, 16), 1),
        ("v5ex1024", (16, 16), 4),
        ("v5p:2x2x2", (2, 2, 2), 1),
        ("v5px1024", (8, 8, 16), 1),
        ("V4X32", (2, 4, 4), 1),
        ("h100x8", (8,), 1),
        ("h100x4", (4,), 1),
        ("h100x64", (8,), 8),
        ("a100-40gbx16", (8,), 2),
    ],
)
def test_a_name_says_the_shape(text: str, shape: tuple[int, ...], islands: int) -> None:
    found = parse(text)
    assert (found.shape, found.islands) == (shape, islands)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", "expected a kind of chip, and the shape of a slice or a number of chips, such as v5e:8x8"),
        ("h100", "expected a kind of chip"),
        ("h100:8", "expected a number of chips, such as h100x8"),
        ("v5e:8x8x8", "expected 2 sizes of a torus, such as v5e:4x4"),
        ("v5e:0x8", "expected 2 sizes of a torus"),
        ("v5e:32x32", "a slice of v5e has at most 256: for more of them expected a number, v5ex1024"),
        ("v5ex300", "expected a multiple of 256, or fewer"),
        ("v5ex12", "form no torus of powers of two"),
        ("v5px16384", "expected at most 8960"),
        ("h100x12", "expected a multiple of 8, or fewer"),
        ("h100x0", "expected 1 or more"),
    ],
)
def test_another_name_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(text)


def test_a_mesh_over_a_torus_and_hosts() -> None:
    """By hand. A v5e's links are of 50 GB/s one way; an axis of 16 closes to a ring, which both ways serve."""
    links = parse("v5e:16x16").links({"data": 1, "fsdp": 256, "tensor": 1})
    assert links["fsdp"] == Link(256, 4 * 50e9, 1, 3.125e9)
    assert links["fsdp"].seconds(256e9) == pytest.approx(255e9 / 200e9)
    links = parse("v5e:16x16").links({"data": 16, "fsdp": 16, "tensor": 1})
    assert (links["data"].bandwidth, links["fsdp"].bandwidth) == (100e9, 100e9)
    links = parse("v5e:4x8").links({"data": 1, "fsdp": 8, "tensor": 4})
    assert (links["fsdp"].bandwidth, links["tensor"].bandwidth) == (50e9, 50e9)
    links = parse("v5ex1024").links({"data": 4, "fsdp": 256, "tensor": 1})
    assert (links["data"].inside, links["data"].islands) == (1, 4)
    assert links["data"].seconds(4e9) == pytest.approx(3e9 / 3.125e9)
    # Of 16 neighbours two hosts have 8 each: what a host lacks comes in by its eight ports.
    links = parse("h100x16").links({"data": 1, "fsdp": 16, "tensor": 1})
    assert (links["fsdp"].inside, links["fsdp"].islands) == (8, 2)
    assert links["fsdp"].seconds(16e9) == pytest.approx(max(15e9 / 450e9, 8e9 / (8 * 50e9)))
    links = parse("h100x16").links({"data": 2, "fsdp": 4, "tensor": 2})
    assert (links["data"].inside, links["fsdp"].inside, links["tensor"].inside) == (1, 4, 2)
    assert links["data"].seconds(2e9) == pytest.approx(1e9 / 50e9)


def test_a_mesh_has_to_cover_the_devices() -> None:
    found = axis_sizes(MeshConfig(data=2, fsdp=-1, sequence=4, tensor=2), 64, "devices")
    assert found == {"data": 2, "fsdp": 4, "sequence": 4, "tensor": 2}
    with pytest.raises(UserError, match="data=3, fsdp=-1, sequence=1, tensor=1, which cannot cover the 64 devices"):
        axis_sizes(MeshConfig(data=3), 64, "devices")


def test_one_table_of_peaks() -> None:
    """What the trainer takes for a device's peak; figures that vendors publish, by jax's names."""
    assert PEAK["NVIDIA H100 80GB HBM3"] == 989e12
    assert PEAK["TPU v5 lite"] == 197e12
    assert PEAK["TPU7x"] == 2307e12 / 2
    assert len(PEAK) == 12
