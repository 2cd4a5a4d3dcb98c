"""What is wrong with a config, told to people: pydantic's errors as messages that name key, value and expectation."""

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from jaxpo.config import Run

Key = str | int
KeyPath = tuple[Key, ...]
Schema = dict[str, Any]

# How pydantic begins the message of a check between keys, which is our own.
VALUE_ERROR = "Value error, "


@cache
def adapter() -> TypeAdapter[Run]:
    return TypeAdapter(Run)


@cache
def schema() -> Schema:
    """The JSON schema of a config, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **adapter().json_schema()}


def explained(error: ValidationError, root: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """The path of the key and the message for each mistake in a config's values `root`."""
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        kind, location = detail["type"], detail["loc"]
        path, wanted = _follow(location)
        if kind == "value_error":
            # The message begins with the key below this one.
            text = detail["msg"].removeprefix(VALUE_ERROR)
            yield (*path, *text.split()[0].split(".")), f"{dotted(path)}.{text}"
        elif kind != "too_short" or len(_at(root, path) or ()) < wanted.get("minItems", 0):
            # Of a list whose items are wrong pydantic says besides that it has too few right ones.
            yield _explain(kind, location, root)


def _explain(kind: str, location: tuple[Key, ...], root: dict[str, Any]) -> tuple[KeyPath, str]:
    path, wanted = _follow(location)
    name, found = dotted(path), _at(root, path)
    if kind == "unexpected_keyword_argument":
        siblings = list(_resolve(_follow(location[:-1])[1])["properties"])
        return path, f"{name} is unknown; {_suggest(path, siblings, root)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        names, tag = list(wanted["discriminator"]["mapping"]), found.get("name")
        said = "is missing" if "name" not in found else f"is {shown(tag)}"
        return (*path, "name"), f"{name}.name {said}; expected one of {', '.join(names)}{_near(tag, names)}"
    if kind == "missing" and isinstance(location[-1], str):
        return path, f"{name} is missing; expected {_expected(wanted)}"
    if kind == "missing":
        return _explain("too_short", location[:-1], root)
    return path, f"{name} is {shown(found)}; expected {_expected(wanted)}{_hint(found, wanted)}"


def _resolve(node: Schema) -> Schema:
    """The schema itself where `node` is a reference to one, or one that allows null besides."""
    if "$ref" in node:
        return schema()["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" in node:
        return _resolve(next(option for option in node["anyOf"] if option.get("type") != "null"))
    return node


def _follow(location: tuple[Key, ...]) -> tuple[KeyPath, Schema]:
    """The path of keys of a location of pydantic's, which names the members of unions too, and the schema there."""
    path: KeyPath = ()
    node = schema()
    for key in location:
        inner = _resolve(node)
        if "discriminator" in inner:
            node = {"$ref": inner["discriminator"]["mapping"][key]}
            continue
        path = (*path, key)
        if isinstance(key, int):
            node = inner["prefixItems"][key] if "prefixItems" in inner else inner["items"]
        elif "properties" in inner:
            node = inner["properties"].get(key, {})
        else:
            node = inner["additionalProperties"]
    return path, node


def _suggest(path: KeyPath, siblings: Sequence[str], root: dict[str, Any]) -> str:
    """What may have been meant by an unknown key: one of that name elsewhere, a similar one here, or what there is."""
    key, parent = str(path[-1]), path[:-1]
    run = path[:2] if path[0] == "stages" and len(path) > 2 else ()
    everywhere = [(*run, *known) for known in _key_paths(schema()["$defs"]["Run"], _at(root, run))]
    elsewhere = [known for known in everywhere if known[-1] == key]
    below = [known for known in elsewhere if known[: len(parent)] == parent]
    nearest = [known for known in below if len(known) == min(map(len, below))]
    for found in (nearest, elsewhere):
        if len(found) == 1:
            return f"did you mean {dotted(found[0])}?"
    if near := get_close_matches(key, siblings, n=1, cutoff=0.6):
        return f"did you mean {dotted((*parent, near[0]))}?"
    return f"expected one of {', '.join(siblings)}"


def _key_paths(node: Schema, value: Any) -> Iterator[KeyPath]:
    """The paths of all keys below a schema but those of stages, where `value` is what a config says there.

    Of objects told apart by their names those of the named one, of all where there is no such name; of the items of a
    list those of the items that there are.
    """
    for key, below in node["properties"].items():
        yield (key,)
        yield from ((key, *path) for path in _paths_within(below, value.get(key) if isinstance(value, dict) else None))


def _paths_within(node: Schema, value: Any) -> Iterator[KeyPath]:
    inner = _resolve(node)
    if "discriminator" in inner:
        mapping = inner["discriminator"]["mapping"]
        name = value.get("name") if isinstance(value, dict) else None
        members = [mapping[name]] if isinstance(name, str) and name in mapping else mapping.values()
        yield from dict.fromkeys(path for ref in members for path in _key_paths(_resolve({"$ref": ref}), value))
    elif "properties" in inner:
        yield from _key_paths(inner, value)
    elif "items" in inner and isinstance(value, list):
        yield from ((i, *path) for i, item in enumerate(value) for path in _paths_within(inner["items"], item))


def _expected(node: Schema) -> str:
    """What a schema allows, in words."""
    if "anyOf" in node:
        return " or ".join(_expected(option) for option in node["anyOf"])
    node = _resolve(node)
    if "discriminator" in node:
        return f"a mapping with a name, one of {', '.join(node['discriminator']['mapping'])}"
    if "enum" in node or "const" in node:
        values = node.get("enum", [node.get("const")])
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    match node.get("type"):
        case "integer" | "number" as kind:
            signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
            bounds = " and ".join(f"{sign} {node[bound]:.12g}" for bound, sign in signs.items() if bound in node)
            return f"{'an integer' if kind == 'integer' else 'a number'} {bounds}".strip()
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "string" if node.get("format") == "path":
            return "a path"
        case "string":
            return "text that is not empty" if node.get("minLength") else "text"
        case "array" if "prefixItems" in node:
            return f"a list of {len(node['prefixItems'])}, each {_expected(node['prefixItems'][0])}"
        case "array":
            least = f" of at least {node['minItems']}" if "minItems" in node else ""
            return f"a list{least}, each item {_expected(node['items'])}"
    keys = list(node.get("properties", {}))
    return f"a mapping with keys such as {', '.join(keys[:3])}" if keys else "a mapping"


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"the mapping {text}" if isinstance(value, dict) else f"the list {text}" if isinstance(value, list) else text


def _hint(found: Any, wanted: Schema) -> str:
    """How to write what was probably meant."""
    inner = _resolve(wanted)
    if isinstance(found, str) and "enum" in inner:
        return _near(found, inner["enum"])
    if isinstance(found, int | float) and inner.get("type") == "string" and "enum" not in inner:
        return " (in quotes, if that is a name)"
    if isinstance(found, float) and inner.get("type") == "integer" and found.is_integer():
        return f" (written {int(found)})"
    if inner.get("type") == "boolean" and found in ("on", "yes", "off", "no"):
        return f" (written {'true' if found in ('on', 'yes') else 'false'})"
    return ""


def _near(found: Any, names: Sequence[str]) -> str:
    """A hint at the nearest name: what was found with its letters in another order, its begin, or a similar one."""
    text = str(found).lower()
    mixed_up = [name for name in names if sorted(name) == sorted(text)]
    begins = sorted((name for name in names if text.startswith(name) or name.startswith(text)), key=len)
    near = [*mixed_up, *(begins if len(text) > 2 else []), *get_close_matches(text, names, n=1, cutoff=0.6)]
    return f" (did you mean {near[0]}?)" if near else ""


def _at(root: Any, path: KeyPath) -> Any:
    """The value at a path; None if the path leads beyond what is there."""
    for key in path:
        if isinstance(root, list) and isinstance(key, int) and key < len(root):
            root = root[key]
        elif isinstance(root, dict):
            root = root.get(key)
        else:
            return None
    return root


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
