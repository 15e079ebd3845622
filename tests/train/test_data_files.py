"""Records are found in any JSON, whatever the size of what is read at a time; broken files say where."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from research.qwen.errors import DataError
from research.qwen.train import files
from research.qwen.train.files import BrokenFile, pieces

VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a"\\{}[],:\n\u00e9\U0001f600', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), max_size=5)


def found(data: bytes) -> list[tuple[int, int, bytes]]:
    return [(piece.start, piece.line, piece.raw) for piece in pieces(io.BytesIO(data))]


@pytest.mark.slow
@given(
    records=RECORDS,
    indent=st.sampled_from([None, 0, 2]),
    ascii_=st.booleans(),
    chunk=st.integers(1, 40),
    mark=st.booleans(),
    newlines=st.integers(0, 3),
)
@example(records=[{"a": "\\"}, {"b": '\\"'}], indent=None, ascii_=True, chunk=1, mark=False, newlines=0)
@settings(max_examples=50, deadline=None)
def test_array_is_cut_into_its_elements(
    records: list[Any], indent: int | None, ascii_: bool, chunk: int, mark: bool, newlines: int
) -> None:
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_)
    data = (b"\xef\xbb\xbf" if mark else b"") + b"\n" * newlines + text.encode() + b" \n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", max(chunk, 4))
        places = found(data)
    assert [json.loads(raw) for _, _, raw in places] == records
    for start, line, raw in places:
        assert data[start : start + len(raw)] == raw
        assert line == data[:start].count(b"\n") + 1


@pytest.mark.parametrize("chunk", [4, 5, 7])
def test_escapes_across_reads(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    for count in range(8):
        for shift in range(chunk):
            records = [{"a" * shift: "\\" * count + '"}' + "\\" * (7 - count)}, {"b": "]"}]
            places = found(json.dumps(records).encode())
            assert [json.loads(raw) for _, _, raw in places] == records


@given(records=RECORDS, blank=st.sampled_from(["\n", "\r\n", "\n\n \t\n"]), end=st.booleans())
@settings(max_examples=30, deadline=None)
def test_lines_are_records(records: list[Any], blank: str, end: bool) -> None:
    data = (blank.join(json.dumps(record) for record in records) + (blank if end else "")).encode()
    places = found(data)
    assert [json.loads(raw) for _, _, raw in places] == records
    for start, line, raw in places:
        assert data[start : start + len(raw)] == raw
        assert line == data[:start].count(b"\n") + 1


BROKEN = [
    ('[{"a": 1},\n {"a": 2},\n]', 2, 2, "a comma before the closing ]"),
    ("[,]", 1, 0, "a comma before the closing ]"),
    ('[{"a": 1}\n {"a": 2}]', 2, 1, "expected a comma between records, found no comma"),
    ('[{"a": 1},,{"a": 2}]', 1, 1, "expected a comma between records"),
    ('[{"a": 1}, 5, {"a": 2}]', 1, 1, "found '5, '"),
    ('["text", {"a": 2}]', 1, 0, "expected a record in {}, found '\"text\", '"),
    ("[1, 2]", 1, 0, "expected a record in {}, found '1, 2'"),
    ('[{"a": 1},\n\n {"a": "cut of', 3, 1, "the file ends inside the record that begins here"),
    ('[{"a": 1},\n', 2, 1, "its closing ] is missing"),
    ('[{"a": 1}\n]\n{"b": 2}', 2, 1, " after the end of the array"),
    (
        '[{"a": 1},\n {"a": "no quote,\n "b": 2}]',
        2,
        1,
        "a line break inside a text of the record that begins in line 2",
    ),
]


@pytest.mark.parametrize(("text", "line", "whole", "reason"), BROKEN)
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_broken_arrays_say_where(
    text: str, line: int, whole: int, reason: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    read = []
    with pytest.raises(BrokenFile) as caught:
        for piece in pieces(io.BytesIO(text.encode())):
            read.append(piece)
    assert reason in caught.value.problem.reason
    assert (caught.value.problem.line, len(read)) == (line, whole)


@pytest.mark.parametrize("head", [b"\xff\xfe[\x00", b"\xfe\xff\x00[", b"PK\x03\x04", b"\x1f\x8b\x08"])
def test_other_kinds_of_files_are_named(head: bytes) -> None:
    with pytest.raises(BrokenFile, match="the file is .*; save it as UTF-8"):
        found(head + b" " * 20)


@pytest.mark.parametrize("text", ['[{"a": "%s"}]', '{"a": "%s"}'])
def test_a_record_beyond_measure_is_refused_early(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 100)
    monkeypatch.setattr(files, "MAX_RECORD", 1000)
    stream = io.BytesIO((text % ("x" * 100_000)).encode())
    with pytest.raises(BrokenFile, match="more than 64 MiB begins here"):
        list(pieces(stream))
    assert stream.tell() < 5000


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the data file .*missing.json: No such file"):
        files.open_binary(tmp_path / "missing.json")
    (tmp_path / "empty.json").touch()
    with pytest.raises(DataError, match="empty.json is empty"):
        files.open_binary(tmp_path / "empty.json")
    with pytest.raises(DataError, match="is a folder"):
        files.open_binary(tmp_path)
