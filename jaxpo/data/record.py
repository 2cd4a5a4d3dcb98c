"""A row and its columns, read with care: the wrong type is a UserError that names row and column."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxpo.data.files import Row, Where
from jaxpo.errors import UserError

Message = dict[str, Any]
Said = str | list[Message]
T = TypeVar("T")

# Ratings and margins go into losses as they are: none of a person's is as large, and a sum of these is far from inf.
LARGEST = 1e6

# What people call the speakers, and what chat templates do.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Record:
    """A row with its place; accessors raise UserError on a column of the wrong type. A null column counts as absent."""

    where: Where
    row: Row

    def columns(self) -> set[str]:
        return {name for name, value in self.row.items() if value is not None}

    def wrong(self, column: str, expected: str) -> UserError:
        return self._wrong(column, self.row[column], expected)

    def text(self, column: str) -> str:
        value = self.row[column]
        if not isinstance(value, str):
            raise self.wrong(column, "a string")
        return self.encodable(column, value)

    def turns(self, column: str) -> list[Message]:
        return self._turns(column, self.row[column], "a list of messages")

    def said(self, column: str) -> Said:
        return self._said(column, self.row[column])

    def number(self, column: str) -> float:
        return self._number(column, self.row[column])

    def probability(self, column: str) -> float:
        return self._probability(column, self.row[column], "a probability, from 0 to 1")

    def label(self, column: str) -> float:
        """Whether an answer is desirable: 1 for true, 0 for false, and any probability between."""
        return self._label(column, self.row[column])

    def answers(self, column: str) -> list[Said]:
        """A list of answers, each a string, a message or a list of messages."""
        return self._each(column, "a list of answers", self._said)

    def numbers(self, column: str) -> list[float]:
        return self._each(column, "a list of numbers", self._number)

    def labels(self, column: str) -> list[float]:
        return self._each(column, "a list of labels", self._label)

    def template_kwargs(self) -> dict[str, Any]:
        tools = self.row.get("tools")
        if isinstance(tools, str) and tools.strip():
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise self.wrong("tools", "a JSON array of tool descriptions") from error
        kwargs = self.row.get("chat_template_kwargs") or {}
        if not isinstance(kwargs, dict):
            raise self.wrong("chat_template_kwargs", "an object")
        return {**kwargs, "tools": tools} if tools else kwargs

    def _wrong(self, column: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.where}: column {column} is {shown(value)}, expected {expected}.")

    def _each(self, column: str, expected: str, read: Callable[[str, Any], T]) -> list[T]:
        value = self.row[column]
        if not isinstance(value, list):
            raise self.wrong(column, expected)
        return [read(f"{column}[{i}]", item) for i, item in enumerate(value)]

    def _number(self, column: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise self._wrong(column, value, "a number")
        if abs(value) > LARGEST:
            raise self._wrong(column, value, f"a number from -{LARGEST:,.0f} to {LARGEST:,.0f}")
        return float(value)

    def _probability(self, column: str, value: Any, expected: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self._wrong(column, value, expected)
        return float(value)

    def _label(self, column: str, value: Any) -> float:
        if isinstance(value, bool):
            return float(value)
        return self._probability(column, value, "true or false, 1 or 0, or a probability between them")

    def _said(self, column: str, value: Any) -> Said:
        if isinstance(value, str):
            return self.encodable(column, value)
        return self._turns(column, value, "a string or a list of messages")

    def _turns(self, column: str, value: Any, expected: str) -> list[Message]:
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list) or not value:
            raise self._wrong(column, value, expected)
        return [self._message(f"{column}[{i}]", message) for i, message in enumerate(value)]

    def _message(self, column: str, message: Any) -> Message:
        if not isinstance(message, dict):
            raise UserError(f"{self.where}: {column} is {shown(message)}, expected a message with role and content.")
        role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(
                f"{self.where}: {column}.{role_key} is {shown(role)}, expected one of {', '.join(sorted(ROLES))}."
            )
        content = message.get(content_key)
        rest = {
            key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None
        }
        if isinstance(content, list):
            content = self._joined(f"{column}.{content_key}", content)
        if content is None and "tool_calls" in rest:
            content = ""
        if not isinstance(content, str):
            raise UserError(f"{self.where}: {column}.{content_key} is {shown(content)}, expected a string.")
        return {"role": ROLES[role], "content": self.encodable(f"{column}.{content_key}", content), **rest}

    def _joined(self, column: str, parts: list[Any]) -> str:
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{self.where}: {column} holds parts that are not text; jaxpo trains on text alone.")
        return "".join(text for text in texts if text is not None)

    def encodable(self, column: str, value: str) -> str:
        """The value itself; UserError if it is no text."""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.where}: {column} holds half of a surrogate pair at character {error.start}, which is no text; "
                "the row was cut or badly escaped."
            ) from error
        return value


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    return f"{value!r:.60}" if not isinstance(value, list | dict) else f"{type(value).__name__} {value!r:.60}"
