"""A checksum in a small JSON file, by which one that was changed on disk is told from what was written."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

KEY = "crc32"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of it, whatever the order of its keys."""
    return {**content, KEY: zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def unseal(sealed: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `seal`. Raises ValueError where it is not what was written."""
    content = {name: value for name, value in sealed.items() if name != KEY}
    if dict(sealed) != seal(content):
        raise ValueError("it was changed since it was written")
    return content
