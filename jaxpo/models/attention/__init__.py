"""Attention over packed rows: a token sees its own prompt and its own completion, never a sibling or a neighbour.

One function, `packed_attention`, and implementations of it that are checked against each other. All see packed rows;
what a kernel needs instead of them (a mask, tiles) is made inside.
"""

from jaxpo.models.attention.interface import Attention, Context, Implementation, choose, packed_attention, why_not

__all__ = ["Attention", "Context", "Implementation", "choose", "packed_attention", "why_not"]
