"""Checkpoints on disk: whole or not there, rotated, and refused when a byte is wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.qwen.errors import CheckpointError, TrainingError
from research.qwen.train.checkpoints import Checkpoints, differences, load_checkpoint, plain
from research.qwen.weights.readers import open_checkpoint

RNG = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "model/weight": RNG.normal(size=(3, 5)).astype(np.float32),
    "model/turned": RNG.normal(size=(4, 6)).astype(np.float32).T,
    "model/step": np.array(7, np.int64),
    "model/bits": np.arange(4, dtype=np.uint16),
    "model/half": np.array([1.5, np.inf, np.nan], np.float16),
    "model/flag": np.array(True),
    "model/none": np.zeros((0, 3), np.float32),
    "history/loss": np.array([1.0, np.nan]),
}


def save(checkpoints: Checkpoints, step: int, best: int | None = None, arrays: Any = None) -> Path:
    return checkpoints.save(step, {"best_step": best}, ARRAYS if arrays is None else arrays, hook, best)


def hook(folder: Path) -> None:
    """Writes a model as the caller would."""
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path), 3)
    found = load_checkpoint(folder)
    assert (found.step, found.folder, found.state) == (3, folder, {"best_step": None})
    assert list(found.arrays) == list(ARRAYS)
    for name, values in ARRAYS.items():
        got = found.arrays[name]
        assert (got.dtype, got.shape) == (values.dtype, values.shape)
        assert got.tobytes() == values.tobytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training",
    ]


def test_large_arrays_go_block_by_block(tmp_path: Path) -> None:
    large = np.arange(5_000_001, dtype=np.float32)  # 20 MB, not a multiple of the blocks
    found = load_checkpoint(save(Checkpoints(tmp_path), 1, arrays={"a": large}))
    assert np.array_equal(found.arrays["a"], large)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        save(checkpoints, step, best)
    assert names(checkpoints) == ["step-000005", "step-000006"]
    save(checkpoints, 7, 5)
    save(checkpoints, 8, 5)
    assert names(checkpoints) == ["step-000005", "step-000007", "step-000008"]
    assert checkpoints.find("latest").name == "step-000008"
    assert checkpoints.find("best").name == "step-000005"


def test_the_old_ones_go_only_after_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    rotate, seen = checkpoints._rotate, []
    monkeypatch.setattr(
        checkpoints, "_rotate", lambda *args: (seen.append(names(checkpoints)), rotate(*args))
    )
    save(checkpoints, 2)
    assert seen == [["step-000001", "step-000002"]]
    assert names(checkpoints) == ["step-000002"]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def path_of(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def noting_fsync(handle: int) -> None:
        events.append(f"sync {Path(path_of(handle)).name.partition('.tmp-')[0]}")
        fsync(handle)

    def noting_replace(source: Any, target: Any) -> None:
        events.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    save(Checkpoints(tmp_path), 1)
    named = events.index("name step-000001")
    for file in ("arrays.safetensors", "state.json", "adapter_model.safetensors", "training", "step-000001"):
        assert f"sync {file}" in events[:named]
    assert events[named + 1 :] == [f"sync {tmp_path.name}"]


@contextmanager
def small_files(count: int) -> Iterator[None]:
    """Writing beyond ``count`` bytes of a file fails, as on a full disk (EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_saving(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    good = save(checkpoints, 1)
    with small_files(20_000), pytest.raises(TrainingError) as caught:
        save(checkpoints, 2, arrays={"a": np.zeros(50_000, np.float32)})
    for part in ("checkpoint of step 2", "disk full", f"the last good checkpoint is {good}"):
        assert part in str(caught.value)
    assert names(checkpoints) == ["step-000001"]
    assert load_checkpoint(good).step == 1


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_in_the_hook(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(
        TrainingError, match="step 1 could not be written: .*No space left.*no checkpoint yet"
    ):
        checkpoints.save(1, {}, ARRAYS, full)
    assert names(checkpoints) == []


def test_a_disk_that_fills_up_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="disk full"):
        save(checkpoints, 1)
    assert names(checkpoints) == []


def test_too_little_room_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    room = {"f_bavail": 1600, "f_frsize": 1000}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**room))
    checkpoints.check_space(ARRAYS)
    with pytest.raises(
        TrainingError, match=r"cannot be written: not enough space in .*2\.\d MB needed, 1\.6 MB free"
    ):
        checkpoints.check_space(ARRAYS, model_bytes=1_000_000)
    with pytest.raises(TrainingError, match="not enough space"):
        checkpoints.save(2, {}, ARRAYS, lambda folder: pytest.fail("written all the same"), None, 1_000_000)
    assert names(checkpoints) == ["step-000001"]


def test_the_model_is_taken_to_be_as_large_as_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {}, lambda folder: (folder / "model.safetensors").write_bytes(bytes(700_000)))  # type: ignore[arg-type, func-returns-value]
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1600, f_frsize=1000))
    with pytest.raises(TrainingError, match="not enough space"):
        checkpoints.check_space({})


def test_a_step_is_not_written_twice(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(TrainingError, match="exists and is not empty"):
        save(checkpoints, 1)


def test_values_can_be_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.update(1, {"best_step": 1})
    assert load_checkpoint(checkpoints.path(1)).state == {"best_step": 1}
    assert checkpoints.find("best") == checkpoints.path(1)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "a flipped bit": (
        lambda f: flip(f / "training/arrays.safetensors", -3),
        "the numbers of history/loss are not",
    ),
    "a cut file": (
        lambda f: os.truncate(f / "training/arrays.safetensors", 300),
        "has 300 bytes, written were",
    ),
    "no arrays": (
        lambda f: (f / "training/arrays.safetensors").unlink(),
        "training/arrays.safetensors is missing",
    ),
    "no model": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "a cut model": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
        "has 0 bytes, written were 100",
    ),
    "no state": (lambda f: (f / "training/state.json").unlink(), "is no checkpoint to resume from"),
    "a cut state": (
        lambda f: os.truncate(f / "training/state.json", 40),
        "training/state.json cannot be read",
    ),
    "another state": (lambda f: (f / "training/state.json").write_text("[1]"), "state.json cannot be read"),
    "a state of texts": (lambda f: edit(f / "training/state.json", step="3"), "state.json cannot be read"),
    "a later format": (
        lambda f: edit(f / "training/state.json", format=9),
        "is of format 9; this version reads 1",
    ),
    "more arrays": (
        lambda f: edit(f / "training/state.json", arrays={}),
        "the numbers of arrays.safetensors",
    ),
    "a flipped header": (lambda f: flip(f / "training/arrays.safetensors", 9), "is damaged: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_the_name(name: str, tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path), 3)
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value) and message in str(caught.value)


def test_half_written_and_foreign_folders_are_not_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.steps() == [] and checkpoints.latest() is None
    checkpoints = Checkpoints(tmp_path)
    for name in ("step-000004.tmp-77", "step-000005.aside", "notes", "step-6"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000007").write_text("a file")
    assert checkpoints.steps() == []
    checkpoints.clear_leftovers()
    assert names(checkpoints) == ["notes", "step-000005.aside", "step-000007", "step-6"]


def test_later_ones_are_set_aside_and_never_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for _ in range(2):
        for step in (1, 2) if not checkpoints.steps() else (2,):
            save(checkpoints, step)
        checkpoints.set_aside(1)
    assert names(checkpoints) == ["step-000001", "step-000002.aside", "step-000002.aside-2"]


def test_rotation_leaves_what_is_later_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 9)
    save(checkpoints, 3)
    save(checkpoints, 4)
    assert checkpoints.steps() == [4, 9]


def test_more_than_a_million_steps_are_still_in_order(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 999_999)
    save(checkpoints, 1_000_000)
    assert checkpoints.find("latest").name == "step-1000000"


def test_the_readers_of_weights_do_not_take_the_state_for_a_model(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path).save(1, {}, ARRAYS)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(folder)


def test_differences_are_named_with_both_values() -> None:
    saved = {"a": 1, "deep": {"x": 0.1, "gone": None}, "list": (1, 2), "path": Path("p"), "free": 1}
    now = {"a": 2, "deep": {"x": 0.1, "new": "语"}, "list": [1, 2], "path": "p", "free": 2}
    assert differences(plain(saved), now, {"free"}) == [
        "a: 1 there, 2 now",
        "deep.gone: null there, not set now",
        'deep.new: not set there, "语" now',
    ]
    assert differences(saved, saved) == []
