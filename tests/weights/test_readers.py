"""Reading safetensors, .ckpt and folders: right when sound, CheckpointError in one line when not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from research.qwen.errors import CheckpointError
from research.qwen.weights import tensors as tensors_module
from research.qwen.weights import writers
from research.qwen.weights.ckpt_file import read_ckpt, verify_crc
from research.qwen.weights.readers import open_checkpoint
from research.qwen.weights.safetensors_file import read_safetensors
from tests.fixtures_util import model_folder
from tests.weights.tools import Tensors, assert_same, copy_model, single_file_model, tensors_of, write

MODELS = ("st_new_bf16", "bin_old_fp16", "bin_sharded_fp32", "longctx")
SMALL: Tensors = {
    "transformer.ln_f.weight": ("float16", np.arange(5, dtype=np.float16)),
    "lm_head.weight": ("bfloat16", np.arange(6, dtype=np.uint16).reshape(2, 3)),
    "scalar": ("float32", np.array(2.5, np.float32)),
}


@pytest.mark.parametrize("model", MODELS)
def test_blocks_and_whole_arrays_are_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 1 << 10)
    checkpoint = open_checkpoint(model_folder(model))
    for name in checkpoint.names():
        whole = checkpoint.read(name)
        assert whole.shape == checkpoint.shape(name)
        assert np.array_equal(np.concatenate(list(checkpoint.blocks(name))), whole.ravel())


def test_safetensors_written_by_the_reference_library(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.array([], np.float16),
        "c": np.array(3, np.int64),
        "d": np.array([True, False]),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    found = read_safetensors(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert np.array_equal(found[name].read(), array)
        assert found[name].dtype == str(array.dtype)


def test_safetensors_are_mapped_not_copied() -> None:
    checkpoint = open_checkpoint(model_folder("st_new_bf16"))
    array = checkpoint.read("lm_head.weight")
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not array.flags.writeable


def test_ckpt_round_trip_with_large_tensors_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "CKPT_CHUNK", 7)  # cuts numbers in two
    path = write(tmp_path / "x.ckpt", SMALL)
    found = read_ckpt(path)
    assert_same(SMALL, {name: (tensor.dtype, tensor.read()) for name, tensor in found.items()})
    assert found["scalar"].shape == ()
    blocks = np.concatenate(list(found["lm_head.weight"].blocks()))
    assert np.array_equal(blocks, SMALL["lm_head.weight"][1].ravel())
    assert verify_crc(path)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_every_truncation_is_noticed(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"whole.{suffix}", SMALL)
    data = path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for end in range(len(data)):
        cut.write_bytes(data[:end])
        try:
            found = set(open_checkpoint(cut).names())
        except CheckpointError as error:
            assert "cut." in str(error) and "\n" not in str(error)
        else:  # a .ckpt cut between two entries: what is left is sound, and check() finds the rest missing
            assert suffix == "ckpt" and (found < set(SMALL) or end >= len(data) - 17)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(["ckpt", "safetensors"]))
def test_garbage_never_gets_past_checkpoint_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
        raise CheckpointError("bytes that happen to be sound")


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["ckpt", "safetensors"]))
def test_a_damaged_byte_is_never_an_unclear_error(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    path = write(tmp_path / f"x.{suffix}", SMALL)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
        for name in checkpoint.names():
            checkpoint.read(name)
    except CheckpointError:
        return
    # safetensors carries no checksum; in a .ckpt only the mark of the checksum itself can be lost unnoticed
    assert suffix == "safetensors" or at >= len(raw) - 17


def _header(path: Path, header: object, data: bytes) -> Path:
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _entry(begin: int, end: int, shape: object = None, dtype: str = "F32") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"a": _entry(0, 8), "b": _entry(4, 12)}, 12, "overlaps"),
        ({"a": _entry(0, 4), "b": _entry(8, 12)}, 12, "gap"),
        ({"a": _entry(0, 4)}, 8, "after the last tensor"),
        ({"a": _entry(0, 16)}, 8, "truncated"),
        ({"a": _entry(0, 8, [3])}, 8, "does not fit"),
        ({"a": _entry(0, 8, [-1, -2])}, 8, "malformed"),
        ({"a": _entry(0, 8, [True, 2])}, 8, "malformed"),
        ({"a": _entry(0, 8, dtype="F8_E4M3")}, 8, "unknown dtype"),
        ({"a": {"dtype": "F32"}}, 8, "malformed"),
        ({"a": 3}, 8, "malformed"),
        ([1], 0, "not a JSON object"),
        (b"{", 0, "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":3}', 4, "twice"),
    ],
)
def test_safetensors_headers_that_lie(header: object, size: int, said: str, tmp_path: Path) -> None:
    path = _header(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        open_checkpoint(path)


def test_a_flipped_bit_in_ckpt_data_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", SMALL)
    raw = bytearray(path.read_bytes())
    raw[raw.index(SMALL["lm_head.weight"][1].tobytes()) + 3] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="checksum"):
        open_checkpoint(path).verify()


def test_a_name_that_comes_back_later_in_a_ckpt(tmp_path: Path) -> None:
    first = write(tmp_path / "1.ckpt", SMALL).read_bytes()[:-17]
    (tmp_path / "2.ckpt").write_bytes(first + first)
    with pytest.raises(CheckpointError, match="occurs twice"):
        open_checkpoint(tmp_path / "2.ckpt")


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    folder = copy_model("st_new_bf16", tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing file.*model-00002-of-00003.safetensors"):
        open_checkpoint(folder)


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = copy_model("st_new_bf16", tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors.index.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_a_damaged_index(text: str, tmp_path: Path) -> None:
    folder = copy_model("st_new_bf16", tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(folder)


def test_an_index_and_shards_that_disagree(tmp_path: Path) -> None:
    folder = copy_model("st_new_bf16", tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="ghost"):
        open_checkpoint(folder)


def test_folders_without_or_with_too_many_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    write(tmp_path / "a.ckpt", SMALL)
    assert open_checkpoint(tmp_path).names() == list(SMALL)
    write(tmp_path / "b.ckpt.tmp-123", SMALL)  # left by a killed run
    assert open_checkpoint(tmp_path).files == [tmp_path / "a.ckpt"]
    write(tmp_path / "b.safetensors", SMALL)
    with pytest.raises(CheckpointError, match="2 checkpoints"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="unknown kind of file"):
        open_checkpoint(Path(__file__))


def test_buffers_of_early_releases_are_read_over(tmp_path: Path) -> None:
    extra = {
        "transformer.h.0.attn.masked_bias": ("float16", np.array(-1e4, np.float16)),
        "transformer.rotary_emb.inv_freq": ("float32", np.ones(8, np.float32)),
    }
    folder = single_file_model(tmp_path / "m", lambda tensors: tensors | extra)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dropped == sorted(extra)
    assert_same(tensors_of(checkpoint), tensors_of(model_folder("st_new_bf16")))


FORMER = {
    "transformer.wte.weight": ["transformer.wte.embedding_weight"],
    "attn.c_attn": ["attention.wq", "attention.wk", "attention.wv"],
    "attn.c_proj": ["attention.wo"],
    "ln_1": ["attention_norm"],
    "ln_2": ["ffn_norm"],
    "mlp.w1": ["feed_forward.w1"],
    "mlp.w2": ["feed_forward.w3"],
    "mlp.c_proj": ["feed_forward.w2"],
}


def _former(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, (dtype, array) in tensors.items():
        old = [name]
        for published, former in FORMER.items():
            if published in name:
                old = [name.replace(".h.", ".layers.").replace(published, one) for one in former]
        out |= {one: (dtype, part) for one, part in zip(old, np.split(array, len(old)), strict=True)}
    return out


def test_checkpoints_of_the_former_port_are_understood(tmp_path: Path) -> None:
    published = tensors_of(model_folder("st_new_bf16"))
    former = _former(published)
    assert "transformer.layers.1.attention.wk.bias" in former
    path = write(tmp_path / "old.ckpt", former)
    assert_same(tensors_of(path), published)
    name = "transformer.h.1.attn.c_attn.weight"
    assert np.array_equal(
        np.concatenate(list(open_checkpoint(path).blocks(name))), published[name][1].ravel()
    )
    del former["transformer.layers.1.attention.wk.bias"]
    with pytest.raises(CheckpointError, match="lacks transformer.layers.1.attention.wk.bias"):
        open_checkpoint(write(tmp_path / "broken.ckpt", former))
