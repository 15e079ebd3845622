"""Samples as MindRecord files: columns ``input_ids`` and ``labels``, int32 of any length. MindSpore loads when used."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import DataError
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.train.dataset import Dataset, Progress
from research.qwen.train.files import LISTED, Problem, open_binary
from research.qwen.train.rendering import IGNORE, DataOptions, Sample, hidden_positions

SCHEMA: Final = {name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}
LABEL_NAMES: Final = ("labels", "target_ids", "label")  # also as other preparations call them
ROWS: Final = 1024  # written at a time


class TokenDataset(Dataset):
    """Samples of a MindRecord file. It is read once, into a temporary file from which samples are then mapped."""

    def __init__(self, path: Path, tokenizer: QwenTokenizer, options: DataOptions, skip_bad: bool) -> None:
        """Read and check all rows; padding on the right is taken off.

        Raises:
            DataError: the file is missing or no MindRecord, a column is missing, or bad rows as ``open_dataset``.
        """
        super().__init__(path, tokenizer, options, skip_bad)
        open_binary(path).close()
        self._ends = array("q", [0])  # of good rows, in tokens
        self._rows = array("q")  # their numbers in the file
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the dataset)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        self._file.flush()
        self._tokens = np.memmap(self._file, np.int32, "r").reshape(2, -1, order="F")
        self._kept = np.arange(len(self._ends) - 1)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> Sample:
        row = self._kept[number]
        start, end = self._ends[row], self._ends[row + 1]
        room = self.options.max_length
        ids, labels = (self._tokens[n, start : min(end, start + room)].tolist() for n in (0, 1))
        sample = Sample(ids, labels, hidden_positions(ids, self.tokenizer, self.options), end - start)
        return Sample(ids, labels, sample.hidden, sample.full, sample.trained)

    def line(self, number: int) -> int:
        return 0

    def keep(self, numbers: NDArray[np.intp]) -> None:
        self._kept = self._kept[numbers]

    def _problem(self, number: int, reason: str) -> Problem:
        return Problem(0, f"row {self._rows[self._kept[number]]}: {reason}")

    def _read(self) -> None:
        found: list[Problem] = []
        total = rows = 0
        for row in _rows(self.path):
            table = self._table(row)
            if isinstance(table, str):
                total += 1
                found += [Problem(0, f"row {rows}: {table}")][: LISTED - len(found)]
            else:
                self._rows.append(rows)
                self._file.write(table.tobytes(order="F"))
                self._ends.append(self._ends[-1] + table.shape[1])
            rows += 1
        if not rows:
            raise DataError(f"{self.path} is empty: it holds no row")
        self._report(found, total, rows)

    def _table(self, row: Mapping[str, Any]) -> NDArray[np.int32] | str:
        """(2, tokens) ids and labels of a row, or what is wrong with it."""
        name = next(name for name in LABEL_NAMES if name in row)
        ids, labels = np.asarray(row["input_ids"]).ravel(), np.asarray(row[name]).ravel()
        if ids.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
            return f"input_ids and {name} must be whole numbers"
        if len(ids) != len(labels):
            return f"{len(ids)} input_ids, but {len(labels)} {name}"
        real = np.flatnonzero((ids != self.tokenizer.eod_id) | (labels != IGNORE))
        size = int(real[-1]) + 1 if real.size else 0
        table = np.stack([ids[:size], labels[:size]])
        known = (table >= 0) & (table < len(self.tokenizer))
        known[1] |= table[1] == IGNORE
        if not size or not known.all():
            return f"id {table[~known][0]} is not in the vocabulary" if size else "nothing but padding"
        return table.astype(np.int32)


def write_mindrecord(
    dataset: Dataset, out: Path, force: bool = False, progress: Progress | None = None
) -> int:
    """Write all samples of a dataset; the file and its index ``OUT.db`` appear whole. Returns the rows.

    Raises:
        DataError: a file is there already and ``force`` is not set, it cannot be written, or as ``Dataset.survey``.
    """
    index = out.with_name(f"{out.name}.db")
    for path in (out, index):
        if path.exists() and not (force and path.is_file()):
            raise DataError(f"{path} exists; choose another name, or --force to replace it")
    dataset.survey(progress)  # first: it may leave samples out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.tmp-", dir=out.parent) as folder:
            # The index holds the file's name, so the name is final and only the folder changes.
            _write(dataset, Path(folder) / out.name)
            os.replace(Path(folder) / index.name, index)
            os.replace(Path(folder) / out.name, out)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot write {out}: {str(error).strip().splitlines()[0]}") from error
    return len(dataset)


def _write(dataset: Dataset, out: Path) -> None:
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(out), shard_num=1)
    writer.add_schema(SCHEMA, "token ids and labels, aligned; -100: not learned")
    for start in range(0, len(dataset), ROWS):
        samples = (dataset[n] for n in range(start, min(start + ROWS, len(dataset))))
        writer.write_raw_data(
            [
                {"input_ids": np.array(sample.ids, np.int32), "labels": np.array(sample.labels, np.int32)}
                for sample in samples
            ]
        )
    writer.commit()


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    from mindspore.mindrecord import FileReader

    if not path.with_name(f"{path.name}.db").is_file():
        raise DataError(f"{path}: its index {path.name}.db is missing; copy both files")
    try:
        reader = FileReader(str(path))
    except RuntimeError as error:
        raise DataError(f"{path} is no MindRecord file: {str(error).strip().splitlines()[0]}") from error
    try:
        columns = set(reader.schema())
        if "input_ids" not in columns or not columns & set(LABEL_NAMES):
            raise DataError(
                f"{path}: needs the columns input_ids and labels, has {', '.join(sorted(columns)) or 'none'}"
            )
        yield from reader.get_next()
    except RuntimeError as error:
        raise DataError(f"{path} is damaged: {str(error).strip().splitlines()[0]}") from error
    finally:
        reader.close()
