"""JSON schemas and patterns of strangers: limits that keep their grammars cheap, and the place of an error.

The costs were measured with llguidance 1.9 at 151,936 rows: text that is forced character by character takes
time that grows with the square of what is left of it (1 ms per token at 2,000 characters, 150 ms at 20,000),
and a reference with keywords beside it is copied where it stands, so that a few short definitions can name
each other into millions of copies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from research.qwen.errors import RequestError

MAX_SCHEMA_BYTES = 200_000
MAX_DEPTH = 100  # nested lists and objects; the grammar's own reader stops at 128
MAX_FORCED = 2_000  # bytes of one constant, name or pattern
MAX_COPIES = 20_000  # subschemas once references are copied

# Keywords whose value is a schema, a list of schemas, or an object of schemas.
_ONE = (
    "items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
    "propertyNames", "not", "if", "then", "else",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_KEYWORDS = tuple(dict.fromkeys((*_ONE, *_LISTS, *_MAPS)))  # each once: items is in two of them
_COUNT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")
_ATOM = re.compile(r"\\[xuUpP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])+\]|.", re.DOTALL)


def schema_text(schema: object, place: str) -> str:
    """The schema as JSON text, if it is within the limits of this module.

    Raises:
        RequestError: it is no object (or true), no JSON, or too large, deep or costly; names the place below
            ``place``.
    """
    if not isinstance(schema, Mapping) and schema is not True:
        raise RequestError(f"{place} must be a JSON schema (an object), got {_short(schema)}")
    _check_depth(schema, place)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (
        TypeError,
        ValueError,
    ) as error:  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
        raise RequestError(f"{place} must be a JSON schema: {error}") from None
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(f"{place} has {size} bytes; at most {MAX_SCHEMA_BYTES} are taken")
    if isinstance(schema, Mapping):
        for where, part in _walk(schema, place):
            _check_forced(part, where)
        copies = _Copies(schema).of(schema)
        if copies > MAX_COPIES:
            raise RequestError(
                f"{place} grows to more than {MAX_COPIES} subschemas when its references are followed; "
                "write $ref without keywords beside it"
            )
    return text


def blame(schema: Mapping[str, Any], place: str, failure: Callable[[Mapping[str, Any]], str]) -> str:
    """The deepest subschema that fails alone as the whole does, below ``place``; ``failure`` is "" if it is good."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    words = failure(schema)
    found = True
    while found:
        found = False
        for where, part in _children(schema, place):
            if isinstance(part, Mapping) and failure({**shared, **part}) == words:
                schema, place, found = part, where, True
                break
    return place


def check_pattern(pattern: str, place: str) -> None:
    """RequestError if every match of the pattern is longer than MAX_FORCED characters."""
    if len(pattern) > 4 * MAX_FORCED or least_length(pattern) > MAX_FORCED:
        raise RequestError(
            f"{place} must be a pattern of at most {4 * MAX_FORCED} characters whose shortest match has at most "
            f"{MAX_FORCED}, got {_short(pattern)}"
        )


def least_length(pattern: str) -> int:
    """An upper bound of the length of a shortest match: of several alternatives the longest counts."""
    # One entry per open group: [longest alternative so far, length of this one, length of the last atom].
    groups = [[0, 0, 0]]
    position, counted = 0, False
    while position < len(pattern):
        top = groups[-1]
        count = _COUNT.match(pattern, position)
        if count is not None:
            top[1] += top[2] * (int(count[1]) - 1)
            top[2] *= int(count[1])
            position, counted = count.end(), True
            continue
        atom = _ATOM.match(pattern, position)
        assert atom is not None  # the last alternative takes any character
        position = atom.end()
        if atom[0] == "(":
            groups.append([0, 0, 0])
        elif atom[0] == "|":
            groups[-1] = [max(top[0], top[1]), 0, 0]
        elif atom[0] == ")" and len(groups) > 1:
            longest, last, _ = groups.pop()
            size = max(longest, last)
            groups[-1][1] += size
            groups[-1][2] = size
        elif atom[0] == "*" or (
            atom[0] == "?" and not counted
        ):  # after a count it makes it lazy, not optional
            top[1] -= top[2]
            top[2] = 0
        elif atom[0] not in ("+", "?", "^", "$"):
            top[1] += 1
            top[2] = 1
        counted = atom[0] in ("*", "+", "?")
    return sum(max(longest, last) for longest, last, _ in groups)


class _Copies:
    """How many subschemas there are once each reference with something beside it stands for its target."""

    def __init__(self, root: Mapping[str, Any]):
        self._root = root
        self._known: dict[str, int] = {}

    def of(self, schema: object, merged: bool = False) -> int:
        """``merged``: the schema stands in an allOf, where a bare reference is copied too."""
        if not isinstance(schema, Mapping):
            return 1
        total = 1
        for key in _KEYWORDS:
            for _, part in _parts(schema, key, ""):
                total += self.of(part, key == "allOf")
        target = schema.get("$ref")
        if isinstance(target, str) and (merged or len(schema) > 1):
            total += self._target(target)
        return total

    def _target(self, pointer: str) -> int:
        if pointer not in self._known:
            self._known[pointer] = 0  # a circle is refused by the grammar itself
            self._known[pointer] = self.of(_resolve(self._root, pointer), True)
        return self._known[pointer]


def _resolve(root: object, pointer: str) -> object:
    """What a reference within the document points to, or None."""
    for step in pointer.removeprefix("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, Mapping):
            root = root.get(step)
        elif isinstance(root, list) and step.isdecimal() and int(step) < len(root):
            root = root[int(step)]
        else:
            return None
    return root


def _check_depth(value: object, place: str) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, list | tuple):
                inner += item
        if not inner:
            return
        level = inner
    raise RequestError(f"{place} is nested more than {MAX_DEPTH} deep")


def _check_forced(schema: Mapping[str, Any], place: str) -> None:
    """Constants, names and patterns of one subschema (its children aside)."""
    values = schema.get("enum")
    constants = list(values) if isinstance(values, list) else []
    constants += [schema["const"]] if "const" in schema else []
    names = schema.get("properties")
    constants += list(names) if isinstance(names, Mapping) else []
    for constant in constants:
        if len(json.dumps(constant, ensure_ascii=False).encode()) > MAX_FORCED:
            raise RequestError(f"{place} has a constant or name of more than {MAX_FORCED} bytes")
    patterns = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(patterns if isinstance(patterns, Mapping) else ())):
        if isinstance(pattern, str):
            check_pattern(pattern, f"{place}.pattern")


def _walk(schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield place, schema
    for where, part in _children(schema, place):
        if isinstance(part, Mapping):
            yield from _walk(part, where)


def _children(schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, object]]:
    for key in _KEYWORDS:
        yield from _parts(schema, key, place)


def _parts(schema: Mapping[str, Any], key: str, place: str) -> Iterator[tuple[str, object]]:
    """The subschemas under one keyword, with their places."""
    value = schema.get(key)
    if key in _MAPS and isinstance(value, Mapping):
        for name, part in value.items():
            yield f"{place}.{key}.{name}", part
    elif key in _LISTS and isinstance(value, Sequence) and not isinstance(value, str):
        for number, part in enumerate(value):
            yield f"{place}.{key}[{number}]", part
    elif (
        key in _ONE and key != "items" and value is not None or key == "items" and isinstance(value, Mapping)
    ):
        yield f"{place}.{key}", value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
