"""--export qwen2: the same logits, ids and tokens in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from research.qwen.errors import VocabularyError
from research.qwen.text import chatml, tokenizer
from research.qwen.weights.command import main
from research.qwen.weights.hf_tokenizer import CONTROL, byte_alphabet, merges, read_ranks
from tests.fixtures_util import golden_folder, model_folder
from tests.weights.tools import copy_model, edit_json, tensors_of

TOLERANCE = 3e-4  # of the golden logits, float32


def export(source: Path, target: Path, *more: str) -> int:
    """Run the command."""
    return main(["--export", "qwen2", "--torch_ckpt_dir", str(source), "--output", str(target), *more])


@pytest.mark.torch
@pytest.mark.parametrize("model", ["st_new_bf16", "bin_old_fp16", "bin_sharded_fp32"])
def test_logits_and_greedy_ids_equal_the_golden_ones_in_transformers(
    model: str, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    import torch
    from transformers import Qwen2ForCausalLM

    assert export(model_folder(model), tmp_path / "q2") == 0
    net = Qwen2ForCausalLM.from_pretrained(tmp_path / "q2", dtype=torch.float32)
    golden = np.load(golden_folder(model) / "golden.npz")
    stride = int(golden["vocab_stride"])
    worst = 0.0
    for i in range(3):
        ids = torch.tensor(golden[f"prompt{i}_ids"])[None]
        with torch.no_grad():
            logits = net(ids).logits[0].numpy()
            text = net.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, use_cache=True)[
                0
            ].numpy()
        worst = max(worst, float(np.abs(logits[:, ::stride] - golden[f"prompt{i}_logits"]).max()))
        assert np.array_equal(logits.argmax(-1), golden[f"prompt{i}_logits_argmax"])
        assert np.array_equal(text, golden[f"greedy{i}_ids"])
    record_property("max_abs_diff", worst)
    assert worst <= TOLERANCE


def test_q_k_v_and_the_mlp_go_where_qwen2_has_them(tmp_path: Path) -> None:
    source = tensors_of(model_folder("st_new_bf16"))
    assert export(model_folder("st_new_bf16"), tmp_path / "q2") == 0
    assert export(model_folder("st_new_bf16"), tmp_path / "shards", "--max_shard_size", "200KB") == 0
    from research.qwen.weights.safetensors_file import read_safetensors

    found = read_safetensors(tmp_path / "q2" / "model.safetensors")
    fused = source["transformer.h.1.attn.c_attn.weight"][1]
    for part, rows in zip("qkv", np.split(fused, 3), strict=True):
        assert np.array_equal(found[f"model.layers.1.self_attn.{part}_proj.weight"].read(), rows)
    assert np.array_equal(
        found["model.layers.0.mlp.gate_proj.weight"].read(), source["transformer.h.0.mlp.w2.weight"][1]
    )
    assert np.array_equal(
        found["model.layers.0.mlp.up_proj.weight"].read(), source["transformer.h.0.mlp.w1.weight"][1]
    )
    assert len(found) == 2 * 12 + 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(found)


@pytest.mark.torch  # a model stored as .bin
def test_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(model_folder("full_vocab_bf16"), tmp_path / "chat") == 0
    err = capsys.readouterr().err
    assert (
        "warning: the exported model is exact up to 2048 tokens" in err and "no tokenizer was written" in err
    )
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"], config["max_position_embeddings"]) == (
        "qwen2",
        48,
        2048,
    )
    assert (config["rope_theta"], config["tie_word_embeddings"], config["torch_dtype"]) == (
        10000.0,
        False,
        "bfloat16",
    )
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (
        151645,
        151643,
        151643,
    )
    generation = json.loads((tmp_path / "chat" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151645, 151643]
    assert set(generation) <= {"bos_token_id", "pad_token_id", "eos_token_id", "do_sample", "top_k", "top_p",
                               "repetition_penalty", "max_new_tokens"}  # fmt: skip
    base = copy_model("full_vocab_bf16", tmp_path / "m")
    edit_json(base / "generation_config.json", chat_format="raw")
    assert export(base, tmp_path / "base") == 0
    assert json.loads((tmp_path / "base" / "generation_config.json").read_text())["eos_token_id"] == [151643]
    # No NTK, no log-n: nothing to warn of but the vocabulary.
    capsys.readouterr()
    assert export(model_folder("bin_sharded_fp32"), tmp_path / "plain") == 0
    assert "exact up to" not in capsys.readouterr().err
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["rope_theta"] == 1e6


def test_merges_are_recovered_from_ranks() -> None:
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"bc", b"abc", b"abcabc", b"cab"]
    assert merges(tokens) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"abc", b"abc"), (b"c", b"ab")]
    with pytest.raises(VocabularyError, match="token 256"):
        merges([*tokens[:256], b"abc"])


def test_byte_alphabet_is_the_usual_one() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert (alphabet[0x20], alphabet[0x0A], alphabet[0x41], alphabet[0xAD]) == ("Ġ", "Ċ", "A", "Ń")


@pytest.mark.parametrize("text", ["eA== 0\n", "", "eA==\n", "!!!! 0\n", "eA== zero\n"])
def test_a_damaged_vocabulary(text: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text(text)
    with pytest.raises(VocabularyError, match="is damaged"):
        read_ranks(tmp_path / "qwen.tiktoken")


@pytest.mark.torch
def test_the_exported_tokenizer_gives_our_ids(tmp_path: Path, published_vocab: Path) -> None:
    from transformers import AutoTokenizer

    folder = copy_model("full_vocab_bf16", tmp_path / "m")
    (folder / "qwen.tiktoken").symlink_to(published_vocab)
    assert export(folder, tmp_path / "q2") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "q2")
    ours = tokenizer.QwenTokenizer(published_vocab)
    texts = [
        "你好，世界！\r\n\r\n  e\u0301té 12345 don't WE'LL",
        "<|im_start|>user\n<|extra_0|><|endoftext|>",
        " \u3000\x1c\x85 \t\n",
        "👩‍👩‍👧 한국어 العربية \u1100\u1161 ﬁ",
        "def f(x):\n\treturn x ** 2  # ok\n",
    ]
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text, allowed_special="all")
    assert len(theirs) == len(ours) == 151851
    assert theirs.convert_tokens_to_ids(list(CONTROL)) == list(range(151643, 151851))
    assert (theirs.eos_token_id, theirs.pad_token_id) == (151645, 151643)
    chat = [{"role": "user", "content": "你好"}]
    _, context = chatml.make_context(ours, "你好", system=chatml.DEFAULT_SYSTEM)
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == context
