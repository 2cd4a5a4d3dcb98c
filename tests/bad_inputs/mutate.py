"""Inputs that are almost right: random changes to good ones, the same for the same seed."""

import random
from typing import Any

NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "0",
    "~",
    "stage:",
    "jaxpo:",
    "é\u4e2d\U0001f600",
    "\ud83d",
    "\x00",
    "a\nb",
    "x" * 300,
    [],
    [None],
    [[]],
    ["x", 1],
    {},
    {"": None},
    {"role": "user", "content": "x"},
    [{"role": "assistant", "content": "x"}],
    {"name": {"name": "x"}},
)


def value(source: random.Random, good: Any) -> Any:
    """A JSON value with one part of it changed, taken out, doubled or put elsewhere."""
    if isinstance(good, dict) and good and source.random() < 0.85:
        key = source.choice(list(good))
        match source.randrange(8):
            case 0:
                return {name: item for name, item in good.items() if name != key}
            case 1:
                return {**good, key + source.choice(("s", " ", "_", "\u00e9")): good[key]}
            case 2:
                return {**good, key: source.choice(list(good.values()))}
            case _:
                return {**good, key: value(source, good[key])}
    if isinstance(good, list) and good and source.random() < 0.8:
        at = source.randrange(len(good))
        match source.randrange(4):
            case 0:
                return good[:at] + good[at + 1 :]
            case 1:
                return [*good[: at + 1], *good[at:]]
            case _:
                return [*good[:at], value(source, good[at]), *good[at + 1 :]]
    return source.choice(NASTY)


def content(source: random.Random, good: bytes, alphabet: bytes = bytes(range(256))) -> bytes:
    """Bytes with a few of them changed, taken out, put in, doubled or cut off."""
    changed = bytearray(good)
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(changed) + 1)
        end = min(len(changed), at + source.choice((1, 1, 1, 4, 40)))
        match source.randrange(6):
            case 0:
                del changed[at:end]
            case 1:
                changed[at:at] = changed[at:end]
            case 2 if source.random() < 0.3:
                del changed[at:]
            case 3:
                changed[at:end] = bytes(source.choice(alphabet) for _ in range(end - at))
            case _:
                changed[at:at] = bytes([source.choice(alphabet)])
    return bytes(changed)
