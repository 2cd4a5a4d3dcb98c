"""YAML with `a.b=c` overrides → `Run`, and back. Every mistake is told at once, with its key, place, value and remedy.

Scalars are those of YAML 1.2: `5e-7` is a number, `on` and `yes` are text. Types are strict: nothing is converted.
"""

import json
import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from jaxpo.config import Run
from jaxpo.config_checks import check
from jaxpo.config_mistakes import Key, KeyPath, adapter, dotted, explained, shown
from jaxpo.config_mistakes import schema as schema
from jaxpo.errors import UserError

MAX_DEPTH = 32


def load(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run that a YAML file describes, with overrides such as `training.batch_size=8` or `data.train.0.limit=100`.

    Raises UserError that lists every mistake in the file and the overrides.
    """
    tree = _Tree(str(path))
    root = tree.value(_compose(_read(path), str(path)))
    if not isinstance(root, dict):
        found = "is empty" if root is None else f"holds {shown(root)}"
        raise UserError(f"{path} {found}; expected a mapping of keys such as model, data and training.")
    for order, text in enumerate(overrides, 1):
        tree.override(root, text, order)
    try:
        # JSON because, in strict mode, pydantic makes dataclasses, tuples and paths of JSON but not of Python values.
        run = adapter().validate_json(json.dumps(root))
    except ValidationError as error:
        for key_path, text in explained(error, root):
            # A value that could not be read is also one of the wrong type.
            if not tree.is_mistaken(key_path):
                tree.mistake(key_path, text)
        raise UserError(tree.paragraph()) from None
    for key_path, text in [] if tree.mistakes else check(run):
        tree.mistake(key_path, text)
    if tree.mistakes:
        raise UserError(tree.paragraph())
    return run


def as_mapping(run: Run) -> dict[str, Any]:
    """The run as JSON's types, every default written out."""
    return adapter().dump_python(run, mode="json")


def dump(run: Run) -> str:
    """YAML from which `load` makes an equal run; every default is written out."""
    return yaml.dump(
        as_mapping(run), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120
    )


# Reading YAML


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2 does; PyYAML's own resolvers are those of YAML 1.1."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else; keeps a line to its length."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        if node.flow_style and len(str(mapping)) > 110:
            node.flow_style = False
        return node


_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^([-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$"), list("-+0123456789")),
    "float": (
        re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        list("-+.0123456789"),
    ),
}
_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(_TAG + "merge", re.compile("^<<$"), ["<"])
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, there, n=1, cutoff=0.6)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path} does not exist; expected a YAML config.{hint}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = f"the byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{path}:{line}: {found} is not UTF-8; expected a YAML config in UTF-8.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected a YAML config.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a YAML config.") from None


def _compose(text: str, source: str, *, lines: bool = True) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}" if lines else ""
        raise UserError(f"{source}{line}: the character {chr(error.character)!r} is not allowed in YAML.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in what:
            what = "a tab where YAML allows spaces only"
        line = f":{mark.line + 1}" if lines and mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {what}.") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; expected {MAX_DEPTH} levels at most.") from None


def _scalar(node: yaml.ScalarNode) -> Any:
    """The value of a scalar; ValueError, a message to follow the key, where there is none."""
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind == "str":
        if "\0" in text:
            raise ValueError(f"is {text!r}, which holds a NUL character; expected text")
        try:
            return text.encode().decode()
        except UnicodeEncodeError:
            raise ValueError(f"is {text!r}, half of a surrogate pair; expected text") from None
    if kind not in _SCALARS or not _SCALARS[kind][0].match(text):
        raise ValueError(f"is {json.dumps(text)} tagged {node.tag}; expected a plain value without a tag")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        value = int(text, 0 if text.startswith(("0x", "0o")) else 10) if len(text) < 25 else math.inf
    else:
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value) or (kind == "int" and abs(value) >= 2**63):
        raise ValueError(f"is {text}; expected a number of a sensible size")
    return value


class _Place(NamedTuple):
    """Where a key is said: a line of the file (order 0) or an override (from 1). Sorts in the order of reading."""

    order: int
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class _Tree:
    """The values of a file and its overrides, the places they come from, and the mistakes so far."""

    def __init__(self, source: str):
        self.source = source
        self.places: dict[KeyPath, _Place] = {(): _Place(0, 0, source)}
        self.mistakes: list[tuple[_Place, KeyPath, str]] = []

    def mistake(self, path: KeyPath, text: str) -> None:
        """Note a mistake at a key or, where that is not in the tree, at the nearest key above it."""
        place = next(self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places)
        self.mistakes.append((place, path, text))

    def is_mistaken(self, path: KeyPath) -> bool:
        return any(known == path for _, known, _ in self.mistakes)

    def paragraph(self) -> str:
        mistakes = sorted(self.mistakes, key=lambda mistake: mistake[0])
        told = [f"{place}: {text}{'' if text.endswith('?') else '.'}" for place, _, text in mistakes]
        if len(told) == 1:
            return told[0]
        return f"{self.source}: {len(told)} mistakes. " + " ".join(f"({n}) {text}" for n, text in enumerate(told, 1))

    def value(self, node: yaml.Node | None, path: KeyPath = (), override: _Place | None = None) -> Any:
        """The value of the node at a path, where an override may have put it; notes places and mistakes."""
        if len(path) > MAX_DEPTH:
            name = dotted(path[:3])
            raise UserError(f"{self.source}: {name}… is nested too deeply; expected {MAX_DEPTH} levels at most.")
        if node is not None:
            self.places.setdefault(path, override or _Place(0, node.start_mark.line + 1, self.source))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, override)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index), override) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            return None
        try:
            return _scalar(node)
        except ValueError as error:
            self.mistake(path, f"{dotted(path)} {error}")
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, override: _Place | None) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = override or _Place(0, key_node.start_mark.line + 1, self.source)
            if key_node.tag == _TAG + "merge":
                bases = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for base in bases:
                    found = self.value(base, path, override)
                    if isinstance(found, dict):
                        merged = {**found, **merged}
                    else:
                        text = f"{dotted((*path, '<<'))} is {shown(found)}; expected a mapping to merge"
                        self.mistakes.append((place, (*path, "<<"), text))
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                text = f"{written or 'null'} is no key; expected text, in quotes where it looks like a number"
                self.mistakes.append((place, (), text))
                continue
            key = key_node.value
            if key in values:
                before = self.places[(*path, key)]
                where = "" if override else f", in lines {before.line} and {place.line}"
                text = f"{dotted((*path, key))} is there twice{where}; expected it once"
                self.mistakes.append((place, (*path, key), text))
                continue
            # A merge may have noted other places.
            self._forget((*path, key))
            self.places[(*path, key)] = place
            values[key] = self.value(value_node, (*path, key), override)
        return {**merged, **values}

    def _forget(self, path: KeyPath) -> None:
        for below in [known for known in self.places if known[: len(path)] == path]:
            del self.places[below]

    def override(self, root: dict[str, Any], text: str, order: int) -> None:
        """Put the value of `a.b=value`, the order-th override, into the tree."""
        place = _Place(order, 0, f"override {text}")
        keys, equals, source = text.partition("=")
        parts = keys.strip().split(".")
        if not equals or not all(parts):
            expected = "expected KEY=VALUE, such as training.batch_size=8 or data.train.0.limit=100"
            self.mistakes.append((place, (), expected))
            return
        at: Any = root
        path: KeyPath = ()
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            key = _enter(at, part)
            if key is None:
                self.mistakes.append((place, (), f"{dotted(path)} is {shown(at)}, which has no {part}"))
                return
            path = (*path, key)
            if following is None:
                self._forget(path)
                at[key] = self.value(_compose(source, str(place), lines=False), path, place)
            elif at[key] is None:
                at[key] = [] if following.isdecimal() else {}
            self.places.setdefault(path, place)
            at = at[key]


def _enter(at: Any, part: str) -> Key | None:
    """The key of a mapping or list that a part of an override means, which makes room for it; None if there is none."""
    if isinstance(at, dict):
        at.setdefault(part, None)
        return part
    if isinstance(at, list) and part.isdecimal() and int(part) <= len(at):
        at.extend([None] if int(part) == len(at) else [])
        return int(part)
    return None
