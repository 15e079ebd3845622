"""``Trainer(args=yaml).predict``: as published plus one import, and every call answered as asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from research.qwen.errors import CheckpointError, PromptError, RequestError
from tests.fixtures_util import model_folder

pytestmark = pytest.mark.mindspore


@pytest.fixture
def trainer(mf: Any, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mindformers import Trainer

    monkeypatch.chdir(tmp_path)  # MindFormers writes its result there
    return Trainer(args=str(converted.with_suffix(".yaml")), task="text_generation")


def text(result: list[dict[str, Any]]) -> list[str]:
    return [piece for entry in result for piece in entry["text_generation_text"]]


def expected(full: SimpleNamespace, prompt: str, **options: Any) -> str:
    ids = full.tokenizer.encode(prompt)
    return str(full.tokenizer.decode(full.model.generate(ids, **options)[0], skip_special_tokens=True))


def test_predict_as_published(trainer: Any, full: SimpleNamespace, converted: Path) -> None:
    result = trainer.predict(
        input_data="你好", predict_checkpoint=str(converted), max_new_tokens=8, do_sample=False
    )
    assert result == [{"text_generation_text": [expected(full, "你好", max_new_tokens=8)]}]
    assert Path("text_generation_result.txt").read_text(encoding="utf-8") == str(result)


def test_every_call_counts(trainer: Any, full: SimpleNamespace, converted: Path) -> None:
    """MindFormers answers a second call with the options and the checkpoint of the first."""
    ask = {"input_data": "你好", "predict_checkpoint": str(converted), "do_sample": False}
    first = text(trainer.predict(max_new_tokens=8, **ask))
    network = trainer.trainer._qwen_network[1]
    assert (
        text(trainer.predict(max_new_tokens=3, **ask)) == [expected(full, "你好", max_new_tokens=3)] != first
    )
    assert trainer.trainer._qwen_network[1] is network  # and the weights are not read twice
    other = {**ask, "predict_checkpoint": str(model_folder("full_vocab_bf16"))}  # a Hugging Face folder
    assert text(trainer.predict(max_new_tokens=8, **other)) == first
    assert trainer.trainer._qwen_network[1] is not network
    with pytest.raises((CheckpointError, ValueError), match="nowhere"):
        trainer.predict(**{**ask, "predict_checkpoint": "nowhere.ckpt"})


def test_lists_and_batches(trainer: Any, full: SimpleNamespace, converted: Path) -> None:
    ask = {"predict_checkpoint": str(converted), "do_sample": False, "max_new_tokens": 5}
    prompts = ["你好", "What is the capital of France?"]
    single = [expected(full, prompt, max_new_tokens=5) for prompt in prompts]
    assert text(trainer.predict(input_data=prompts, **ask)) == single
    assert text(trainer.predict(input_data=prompts, batch_size=2, **ask)) == single


def test_top_k_zero_is_off(trainer: Any, full: SimpleNamespace, converted: Path) -> None:
    """YAML ``top_k: 0`` becomes 1 in MindFormers, which makes every sample greedy."""
    settings = yaml.safe_load(converted.with_suffix(".yaml").read_text(encoding="utf-8"))
    assert settings["model"]["model_config"]["top_k"] == 0
    ask = {"input_data": "你好", "predict_checkpoint": str(converted), "max_new_tokens": 12}
    greedy = text(trainer.predict(do_sample=False, **ask))
    sampled = text(trainer.predict(do_sample=True, top_p=1.0, seed=3, **ask))
    assert sampled != greedy
    assert sampled == [expected(full, "你好", max_new_tokens=12, do_sample=True, top_p=1.0, top_k=0, seed=3)]
    assert text(trainer.predict(do_sample=True, top_k=1, seed=3, **ask)) == greedy


def test_streamer_and_bad_input(
    trainer: Any, converted: Path, capsys: pytest.CaptureFixture[str], mf: Any
) -> None:
    from mindformers import TextStreamer

    ask = {"predict_checkpoint": str(converted), "do_sample": False, "max_new_tokens": 4}
    streamer = TextStreamer(mf.QwenTokenizer())
    (answer,) = text(trainer.predict(input_data="hello", streamer=streamer, **ask))
    assert answer.strip() in capsys.readouterr().out
    with pytest.raises(PromptError, match="empty"):
        trainer.predict(input_data="", **ask)
    with pytest.raises(RequestError, match="no option 'tempertaure'"):
        trainer.predict(input_data="a", tempertaure=1.0, **ask)
    assert len(text(trainer.predict(input_data="a", **ask))) == 1


def test_model_and_tokenizer_as_instances(
    mf: Any, full: SimpleNamespace, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindformers import Trainer, pipeline

    monkeypatch.chdir(tmp_path)
    yaml_file = str(converted.with_suffix(".yaml"))
    trainer = Trainer(args=yaml_file, task="text_generation", model=full.model, tokenizer=full.tokenizer)
    wanted = expected(full, "你好", max_new_tokens=5)
    assert text(trainer.predict(input_data="你好", max_new_tokens=5, do_sample=False)) == [wanted]
    pipe = pipeline("text_generation", model=full.model, tokenizer=full.tokenizer)
    assert text(pipe("你好", max_new_tokens=5, do_sample=False)) == [wanted]


def test_other_models_are_left_alone(mf: Any) -> None:
    from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer

    from research.qwen.mf.trainer import repair_predict

    installed = CausalLanguageModelingTrainer.predict
    repair_predict()
    assert CausalLanguageModelingTrainer.predict is installed  # once only
    seen: list[Any] = []
    fake = type("Fake", (), {"predict_process": lambda self, **options: seen.append(options)})()
    installed(fake, config={"model": {"arch": {"type": "Other"}}}, input_data="x", top_k=None)
    assert seen[0]["top_k"] is None and not hasattr(fake, "pipeline_task")
