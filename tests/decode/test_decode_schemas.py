"""Limits on schemas and patterns of strangers, and the place that an error is laid to."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.decode import schemas
from research.qwen.decode.schemas import blame, check_pattern, least_length, schema_text
from research.qwen.errors import RequestError


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def ladder(steps, wrap):
    """Definitions that each name the next one twice."""
    rungs = {
        f"d{i}": {"properties": {"a": wrap(f"#/$defs/d{i + 1}"), "b": wrap(f"#/$defs/d{i + 1}")}}
        for i in range(steps)
    }
    return {"$defs": {**rungs, f"d{steps}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def copied(pointer):
    return {"$ref": pointer, "description": "x"}


def merged(pointer):
    return {"allOf": [{"$ref": pointer}]}


BAD = {
    "no object": (3, "^here must be a JSON schema \\(an object\\), got 3$"),
    "false": (False, "^here must be a JSON schema \\(an object\\), got False$"),
    "a list": ([{}] * 99, r"^here must be a JSON schema .*\.\.\.$"),
    "no JSON": ({"const": object()}, "^here must be a JSON schema: .*not JSON serializable"),
    "NaN": ({"const": math.nan}, "^here must be a JSON schema: "),
    "lone surrogate": ({"const": "\ud800"}, "^here must be a JSON schema: "),
    "large": ({"description": "a" * 200_001}, "^here has 2000.. bytes; at most 200000 are taken"),
    "deep": (nested(60), None),
    "deeper": (nested(5000), "^here is nested more than 100 deep"),
    "long constant": (
        {"properties": {"a": {"const": ["a" * 1000] * 2}}},
        r"^here\.properties\.a has a constant",
    ),
    "long choice": ({"enum": ["b", "龘" * 700]}, "^here has a constant"),
    "long name": ({"properties": {"a" * 2001: {}}}, "^here has a constant or name of more than 2000 bytes"),
    "long pattern": ({"items": {"pattern": "a{3000}"}}, r"^here\.items\.pattern must be a pattern"),
    "long name pattern": ({"patternProperties": {"a{3000}": {}}}, r"^here\.pattern must be a pattern"),
    "copied references": (ladder(30, copied), "^here grows to more than 20000 subschemas"),
    "merged references": (ladder(30, merged), "^here grows to more than 20000 subschemas"),
}


@pytest.mark.parametrize("name", BAD)
def test_limits(name):
    schema, words = BAD[name]
    if words is None:
        schema_text(schema, "here")
        return
    with pytest.raises(RequestError, match=words) as caught:
        schema_text(schema, "here")
    assert len(str(caught.value)) < 2500


def test_what_is_within_the_limits():
    assert schema_text({"const": "你"}, "here") == '{"const": "你"}'
    assert schema_text(True, "here") == "true"
    schema_text({"enum": [f"value {i}" for i in range(5000)]}, "here")
    schema_text(ladder(40, lambda pointer: {"$ref": pointer}), "here")  # a bare reference is not copied
    schema_text(ladder(8, copied), "here")
    schema_text({"$ref": "#", "description": "a circle ends"}, "here")
    schema_text({"allOf": [{"$ref": "#/allOf/0"}], "items": [{"$ref": "#/x~1y/z~0", "title": ""}]}, "here")


def test_copies_are_counted_exactly():
    """The root, d0 to d2 as written (3 + their two references each), and what the references stand for."""
    schema = ladder(2, copied)
    full = {i: 1 + 2 * (1 + 0) for i in range(3)}
    full[2] = 1
    full[1] = 1 + 2 * (1 + full[2])
    full[0] = 1 + 2 * (1 + full[1])
    assert schemas._Copies(schema).of(schema) == 1 + sum(full.values()) + full[0]


ATOMS = ["a", "\\d", "[a-f]", "[^\\]{3}]", ".", "\\{", "龘", "\\x{1f600}", "\\p{Greek}"]


def in_a_row(parts):
    return "".join(pattern for pattern, _ in parts), sum(size for _, size in parts)


def one_of(parts):
    return f"({'|'.join(pattern for pattern, _ in parts)})", max(size for _, size in parts)


def counted(part, count, end):
    return f"({part[0]}){{{count}{end}}}", part[1] * count


# Patterns with the length of their shortest match, of alternatives the longest.
trees = st.recursive(
    st.sampled_from(ATOMS).map(lambda atom: (atom, 1)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(in_a_row),
        st.lists(inner, min_size=1, max_size=3).map(one_of),
        st.builds(counted, inner, st.integers(0, 40), st.sampled_from(["", ",", ",77"])),
        inner.map(lambda part: (f"({part[0]})*", 0)),
        inner.map(lambda part: (f"({part[0]})?", 0)),
        inner.map(lambda part: (f"({part[0]})+", part[1])),
    ),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(trees)
def test_least_length_of_a_pattern(tree):
    pattern, size = tree
    assert least_length(pattern) == size


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("^abc$", 3),
        ("ab?c*", 1),
        ("a{2}{3}", 6),
        ("a{2,5}?", 2),
        ("a+?", 1),
        ("(ab)??", 0),
        ("a{3}*", 0),
        ("a{x", 3),
        (")(", 1),
        ("\\", 1),
        ("[", 1),
    ],
)
def test_least_length_of_odd_patterns(pattern, size):
    assert least_length(pattern) == size


def test_patterns_that_are_too_long():
    check_pattern("a{2000}", "p")
    check_pattern("(ab|c){0,90000}.{0,9999}", "p")
    for pattern in (
        "a{2001}",
        "(a{300}){300}",
        "a" * 2001,
        "x|(a|b{50}){50}",
        "a*" * 4001,
        "a{2001}?",
        "(a{2001})+?",
    ):
        with pytest.raises(RequestError, match="^p must be a pattern of at most 8000 characters"):
            check_pattern(pattern, "p")


def test_blame_finds_the_deepest_place():
    def failure(schema):
        if schema.get("bad"):
            return "bad"
        parts = [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]
        parts += [schema["items"]] if "items" in schema else []
        return next((words for words in map(failure, parts) if words), "")

    bad = {"bad": True}
    assert blame(bad, "r", failure) == "r"
    assert blame({"properties": {"a": {}, "b": {"items": {"anyOf": [{}, bad]}}}}, "r", failure) == (
        "r.properties.b.items.anyOf[1]"
    )
