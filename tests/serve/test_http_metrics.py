"""/metrics: what is counted, under our names and under those that dashboards know."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from research.qwen.decode.params import SamplingParams
from research.qwen.errors import RequestError
from research.qwen.messages import Delta, Usage
from research.qwen.serve.app import create_app
from research.qwen.serve.metrics import HISTOGRAMS, Metrics, Watch
from research.qwen.serve.state import ServerState
from tests.serve.running import fake_engine, running_state, serve_app

MODEL = {"model_name": "qwen"}


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of an exposition, which must parse."""
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset({**MODEL, **labels}.items())]


def finish(state: ServerState, ids: list[int], **params: Any) -> None:
    """Submit and wait for the end."""
    ended = threading.Event()

    def deliver(item: Delta | BaseException) -> None:
        if isinstance(item, BaseException) or item.usage is not None:
            ended.set()

    state.submit(ids, SamplingParams(**{"ignore_eos": True, "seed": 1, **params}), deliver)
    assert ended.wait(20)


def test_names_that_dashboards_ask_for(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {name for name, _ in samples(response.text)}
    plain = (
        "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total "
        "prefix_cache_hits_total prompt_tokens_total generation_tokens_total num_preemptions_total"
    ).split()
    for prefix in ("qwen_", "vllm:"):
        for name in [*plain, *(f"{histogram}_bucket" for histogram in HISTOGRAMS)]:
            assert prefix + name in names
    assert "vllm:inter_token_latency_seconds_count" in names
    llama = (
        "prompt_tokens_total prompt_seconds_total tokens_predicted_total predicted_tokens_seconds "
        "requests_processing requests_deferred n_decode_total n_busy_slots_per_decode"
    ).split()
    for name in llama:
        assert f"llamacpp:{name}" in names
    assert not [name for name in names if name.endswith("_created")]
    assert "# TYPE vllm:prompt_tokens_total counter" in response.text


def test_buckets_reach_minutes(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    bounds = [
        float(dict(labels)["le"])
        for name, labels in samples(text)
        if name == "qwen_time_to_first_token_seconds_bucket"
    ]
    assert min(bounds) <= 0.01 and sorted(bounds)[-2] >= 600


def test_requests_are_counted() -> None:
    with running_state(fake_engine()) as state:
        for seed in range(2):
            finish(state, list(range(1, 11)), max_new_tokens=6, seed=seed)
        finish(state, [5, 6, 7], max_new_tokens=3, n=2)
        text = state.metrics.text().decode()
    assert value(text, "qwen_prompt_tokens_total") == 10 + 10 + 3
    assert value(text, "qwen_generation_tokens_total") == 6 + 6 + 2 * 3
    assert value(text, "qwen_prefix_cache_hits_total") == 8, "two blocks of four of the second prompt"
    assert value(text, "qwen_request_success_total", finished_reason="length") == 4
    assert value(text, "qwen_num_requests_running") == value(text, "qwen_num_requests_waiting") == 0
    assert value(text, "qwen_request_prompt_tokens_sum") == 23
    assert value(text, "qwen_request_generation_tokens_sum") == 18
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert value(text, f"qwen_{name}_seconds_count") == 3
    for name in ("queue", "prefill", "decode"):
        assert value(text, f"qwen_request_{name}_time_seconds_count") == 3
    assert value(text, "qwen_time_per_output_token_seconds_count") == 5 + 5 + 2 * 2
    own = {key: found for key, found in samples(text).items() if key[0].startswith("qwen_")}
    other = samples(text)
    for (name, labels), found in own.items():
        if "_http_" not in name:
            assert other[name.replace("qwen_", "vllm:"), labels] == found
    assert other["llamacpp:tokens_predicted_total", frozenset()] == 18


def test_cancelled_and_failed_requests_are_counted() -> None:
    with running_state(fake_engine(num_blocks=4096, max_length=16000)) as state:
        begun = threading.Event()
        long = SamplingParams(max_new_tokens=15000, ignore_eos=True, n=2)
        ticket = state.submit([1, 2, 3], long, lambda _: begun.set())
        assert begun.wait(20)
        assert ticket.id > 0 and not ticket.done
        ticket.cancel()
        ticket.cancel()

        def fail(ids: object, row: object) -> Any:
            raise RequestError("no")

        errors: list[object] = []
        failed = state.submit([1], SamplingParams(max_new_tokens=2), errors.append, processors=[fail])
        end = time.monotonic() + 20
        while not (ticket.done and failed.done and errors):
            assert time.monotonic() < end
            time.sleep(0.002)
        text = state.metrics.text().decode()
    assert value(text, "qwen_request_success_total", finished_reason="abort") == 2
    assert value(text, "qwen_request_success_total", finished_reason="error") == 1
    assert value(text, "qwen_kv_cache_usage_perc") == 0


class FakeTicket:
    """A ticket with round times."""

    id, done, cached_tokens = 1, True, 0
    queued_at, scheduled_at, first_token_at, ended_at = 10.0, 12.0, 17.0, 40.0


@pytest.mark.parametrize("early", [True, False])
def test_times_of_a_ticket_whichever_comes_first(early: bool) -> None:
    metrics = Metrics("qwen", lambda: None)
    watch = Watch(metrics, 1, lambda _: None)
    last = Delta("a", (1,), finish_reason="stop", usage=Usage(5, 1))
    steps = [lambda: watch.attach(FakeTicket()), lambda: watch(last)]  # type: ignore[arg-type]
    for step in steps if early else reversed(steps):
        step()
    text = metrics.text().decode()
    found = [value(text, f"vllm:request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode")]
    assert found == [2.0, 5.0, 23.0]
    assert value(text, "qwen_request_prompt_tokens_count") == 1


def test_several_tokens_in_a_delta() -> None:
    metrics = Metrics("qwen", lambda: None)
    passed: list[object] = []
    watch = Watch(metrics, 1, passed.append)
    for delta in (Delta(ids=(1,)), Delta(ids=(2, 3)), Delta(), Delta(ids=(4,), finish_reason="length")):
        watch(delta)
    text = metrics.text().decode()
    assert len(passed) == 4
    assert value(text, "qwen_time_per_output_token_seconds_count") == 3
    assert value(text, "qwen_request_success_total", finished_reason="length") == 1


def test_http_requests_by_route_and_status() -> None:
    with running_state(fake_engine()) as state, serve_app(create_app(state)) as url:
        for path in ("/version", "/version", "/made/up", "/v1/models/a", "/v1/models/b"):
            httpx.get(url + path)
        text = httpx.get(f"{url}/metrics").text
    counted = {
        labels: found for (name, labels), found in samples(text).items() if name == "qwen_http_requests_total"
    }
    assert counted == {
        frozenset({"route": "/version", "method": "GET", "status": "200"}.items()): 2,
        frozenset({"route": "other", "method": "GET", "status": "404"}.items()): 1,
        frozenset({"route": "/v1/models/{model:path}", "method": "GET", "status": "404"}.items()): 2,
    }
