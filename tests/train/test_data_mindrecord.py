"""MindRecord files there and back, and files of other makers and other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.errors import DataError
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.train.data import DataOptions, open_dataset
from research.qwen.train.mindrecord import write_mindrecord
from tests.train.data_files import talk, write_lines

pytestmark = pytest.mark.mindspore

TALKS = [talk("a", "b"), talk("q<|endoftext|>", "long " * 30), talk("c", "d", "e", "f")]


def write(path: Path, rows: list[dict[str, Any]], **columns: str) -> Path:
    """A MindRecord file as another program would write it; columns by name and type."""
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(path), 1, overwrite=True)
    writer.add_schema({name: {"type": kind, "shape": [-1]} for name, kind in columns.items()}, "x")
    writer.write_raw_data([{k: np.array(v, columns[k]) for k, v in row.items()} for row in rows])
    writer.commit()
    return path


@pytest.mark.parametrize("mask", ["published", "assistant"])
def test_there_and_back(mask: Any, tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    options = DataOptions(64, mask=mask)
    source = open_dataset(write_lines(tmp_path / "x.jsonl", TALKS), tokenizer, options)
    assert write_mindrecord(source, tmp_path / "new" / "y.mindrecord") == 3
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["y.mindrecord", "y.mindrecord.db"]
    back = open_dataset(tmp_path / "new" / "y.mindrecord", tokenizer, options)
    assert len(back) == 3
    for n in range(3):
        one, other = source[n], back[n]
        assert (one.ids, one.labels, one.hidden) == (other.ids, other.labels, other.hidden)
    assert np.array_equal(back.lengths(), source.lengths())
    shorter = open_dataset(tmp_path / "new" / "y.mindrecord", tokenizer, DataOptions(26, mask=mask))
    assert shorter[1].ids == source[1].ids[:26] and shorter.survey().cut == 2


def test_existing_files_are_replaced_by_force_only(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    dataset = open_dataset(write_lines(tmp_path / "x.jsonl", TALKS), tokenizer)
    out = tmp_path / "y.mindrecord"
    write_mindrecord(dataset, out)
    with pytest.raises(DataError, match=r"y\.mindrecord exists; choose another name, or --force"):
        write_mindrecord(dataset, out)
    assert write_mindrecord(dataset, out, force=True) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "y.mindrecord", "y.mindrecord.db"]


def test_padded_rows_of_other_makers(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    pad = [151643] * 3
    rows = [{"input_ids": [1, 2, 3, *pad], "target_ids": [-100, 2, 3, -100, -100, -100]}] * 2
    dataset = open_dataset(
        write(tmp_path / "x.mindrecord", rows, input_ids="int32", target_ids="int32"), tokenizer
    )
    assert (dataset[1].ids, dataset[1].labels) == ([1, 2, 3], [-100, 2, 3])
    assert dataset.survey().trained_tokens == 4


def test_shards_are_one_dataset(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(tmp_path / "x.mindrecord"), 2)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}, "x")
    row = np.arange(1, 9, dtype=np.int32)
    writer.write_raw_data([{"input_ids": row[: n + 2], "labels": row[: n + 2]} for n in range(6)])
    writer.commit()
    dataset = open_dataset(tmp_path / "x.mindrecord0", tokenizer)
    assert sorted(dataset.lengths()) == [2, 3, 4, 5, 6, 7]


def test_bad_rows(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"input_ids": [1, 2, 3], "labels": [1, 2]},
        {"input_ids": [1, 999_999], "labels": [1, 2]},
        {"input_ids": [1, 2], "labels": [1, -5]},
        {"input_ids": [151643], "labels": [-100]},
    ]
    path = write(tmp_path / "x.mindrecord", rows, input_ids="int32", labels="int32")
    with pytest.raises(DataError) as caught:
        open_dataset(path, tokenizer)
    assert str(caught.value).splitlines() == [
        "4 of 5 records cannot be used",
        f"{path}: row 1: 3 input_ids, but 2 labels",
        f"{path}: row 2: id 999999 is not in the vocabulary",
        f"{path}: row 3: id -5 is not in the vocabulary",
        f"{path}: row 4: nothing but padding",
    ]
    dataset = open_dataset(path, tokenizer, skip_bad=True)
    assert (len(dataset), dataset.skipped) == (1, 4)
    rows = [{"input_ids": [1, 2], "labels": [1, label]} for label in (-100, 2)]
    path = write(path, rows, input_ids="int32", labels="int32")
    with pytest.raises(DataError, match="row 0: nothing to learn in this sample$"):
        open_dataset(path, tokenizer).lengths()


def test_files_that_are_none(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the data file"):
        open_dataset(tmp_path / "none.mindrecord", tokenizer)
    path = tmp_path / "x.mindrecord"
    path.write_bytes(b"hello, this is text")
    with pytest.raises(DataError, match=r"its index x\.mindrecord\.db is missing"):
        open_dataset(path, tokenizer)
    path.with_name("x.mindrecord.db").write_bytes(b"no")
    with pytest.raises(DataError, match=r"x\.mindrecord is no MindRecord file"):
        open_dataset(path, tokenizer)
    other = write(tmp_path / "z.mindrecord", [{"text": [1]}], text="int32")
    with pytest.raises(DataError, match="needs the columns input_ids and labels, has text"):
        open_dataset(other, tokenizer)
