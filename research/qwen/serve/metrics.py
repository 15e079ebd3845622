"""Prometheus metrics: under our own prefix, and under the names of other servers, so that their dashboards work.

The scheduler counts what it does by itself; the rest is measured where a request's deltas pass by.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from research.qwen.decode.params import SamplingParams
from research.qwen.messages import Delta

if TYPE_CHECKING:
    from research.qwen.scheduler import Scheduler, Stats, Ticket

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OWN, ALIAS = "qwen_", "vllm:"
Deliver = Callable[[Delta | BaseException], None]

# A CPU may need minutes for a long prompt, and a second for a token.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)

# name -> (help, buckets)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token", SECONDS),
    "time_per_output_token_seconds": ("Between two tokens of an answer", TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the last token", SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step", SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token", SECONDS),
    "request_decode_time_seconds": ("From the first token to the last", SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt", COUNTS),
    "request_generation_tokens": ("New tokens of a request, of all its choices", COUNTS),
}
MORE_ALIASES = {"time_per_output_token_seconds": "inter_token_latency_seconds"}


class Metrics(Collector):
    """What one server did since its start."""

    def __init__(self, model_name: str, scheduler: Callable[[], Scheduler | None]):
        self._labels, self._scheduler = {"model_name": model_name}, scheduler
        self._histograms = {
            name: Histogram(OWN + name, text, list(self._labels), buckets=buckets, registry=None)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        bound = {name: made.labels(**self._labels) for name, made in self._histograms.items()}
        self._observe = {name: made.observe for name, made in bound.items()}
        self._ended = Counter(
            f"{OWN}request_success",
            "Answers by the reason of their end: stop, length, abort or error",
            [*self._labels, "finished_reason"],
            registry=None,
        )
        self._http = Counter(
            f"{OWN}http_requests", "HTTP requests", ["route", "method", "status"], registry=None
        )
        self._http_seconds = Histogram(
            f"{OWN}http_request_seconds",
            "Duration of HTTP requests",
            ["route"],
            buckets=SECONDS,
            registry=None,
        )
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request."""
        self._http.labels(route, method if method in ("GET", "POST") else "other", str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def observe(self, name: str, value: float) -> None:
        """Add a value to one of HISTOGRAMS."""
        self._observe[name](value)

    def ended(self, reason: str) -> None:
        """Count the end of an answer."""
        self._ended.labels(**self._labels, finished_reason=reason).inc()

    def submit(
        self,
        scheduler: Scheduler,
        prompt_ids: list[int],
        params: SamplingParams,
        deliver: Deliver,
        options: Mapping[str, Any],
    ) -> WatchedTicket:
        """``Scheduler.submit`` with the request's times and tokens measured on the way."""
        watch = Watch(self, params.n, deliver)
        ticket = scheduler.submit(prompt_ids, params, watch, **options)
        watch.attach(ticket)
        return WatchedTicket(ticket, watch)

    def collect(self) -> Iterator[Metric]:
        """All families with the values of now, each also under its other names."""
        for metric in self._request_metrics():
            yield metric
            name = metric.name.removeprefix(OWN)
            yield _renamed(metric, ALIAS + name)
            if name in MORE_ALIASES:
                yield _renamed(metric, ALIAS + MORE_ALIASES[name])
        for made in (self._http, self._http_seconds):
            yield from _without_times(made.collect())
        scheduler = self._scheduler()
        if scheduler is not None:
            yield from self._llamacpp(scheduler.stats())

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _request_metrics(self) -> Iterator[Metric]:
        for made in (*self._histograms.values(), self._ended):
            yield from _without_times(made.collect())
        scheduler = self._scheduler()
        if scheduler is None:
            return
        stats = scheduler.stats()
        used = stats.blocks_used / max(stats.blocks_total, 1)
        yield self._gauge("num_requests_running", "Sequences being computed", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Part of the cache's blocks in use, 0 to 1", used)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the cache", stats.prefix_hits)
        yield self._counter("num_preemptions", "Sequences put back for want of blocks", stats.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens", stats.prompt_tokens)
        yield self._counter("generation_tokens", "New tokens", stats.generation_tokens)

    def _llamacpp(self, stats: Stats) -> Iterator[Metric]:
        prefill, decode = (
            self._seconds("request_prefill_time_seconds"),
            self._seconds("request_decode_time_seconds"),
        )
        counters = {
            "prompt_tokens": stats.prompt_tokens,
            "prompt_seconds": prefill,
            "tokens_predicted": stats.generation_tokens,
            "tokens_predicted_seconds": decode,
            "n_decode": stats.steps,
        }
        gauges = {
            "prompt_tokens_seconds": stats.prompt_tokens / prefill if prefill else 0.0,
            "predicted_tokens_seconds": stats.generation_tokens / decode if decode else 0.0,
            "requests_processing": stats.running,
            "requests_deferred": stats.waiting,
            "n_busy_slots_per_decode": stats.generation_tokens / max(stats.steps, 1),
        }
        for name, value in counters.items():
            yield CounterMetricFamily(f"llamacpp:{name}", "As llama.cpp's server has it", value)
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"llamacpp:{name}", "As llama.cpp's server has it", value)

    def _seconds(self, name: str) -> float:
        samples = (sample for metric in self._histograms[name].collect() for sample in metric.samples)
        return sum(sample.value for sample in samples if sample.name.endswith("_sum"))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(OWN + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(OWN + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


class Watch:
    """Measures one request: stands between the scheduler and ``deliver``, on the model thread."""

    def __init__(self, metrics: Metrics, choices: int, deliver: Deliver):
        self.metrics, self.deliver = metrics, deliver
        self.arrived, self.first = time.monotonic(), 0.0
        self.running = choices
        self._last: dict[int, float] = {}
        self._ticket: Ticket | None = None
        self._usage: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def __call__(self, item: Delta | BaseException) -> None:
        """Measure a delta or an exception and pass it on."""
        if isinstance(item, BaseException):
            self.stop("error")
        else:
            self._measure(item, time.monotonic())
        self.deliver(item)

    def attach(self, ticket: Ticket) -> None:
        """The scheduler's ticket; the request may have ended before it was there."""
        with self._lock:
            self._ticket = ticket
        self._settle()

    def stop(self, reason: str, choices: int | None = None) -> None:
        """Choices that still run, by default all, end for this reason; each is counted once."""
        with self._lock:
            ending = self.running if choices is None else min(choices, self.running)
            self.running -= ending
        for _ in range(ending):
            self.metrics.ended(reason)

    def _measure(self, delta: Delta, now: float) -> None:
        count = len(delta.ids)
        if count and not self.first:
            self.first = now
            self.metrics.observe("time_to_first_token_seconds", now - self.arrived)
        before = self._last.get(delta.index)
        if count:
            self._last[delta.index] = now
        for _ in range(count if before is not None else 0):
            self.metrics.observe("time_per_output_token_seconds", (now - (before or now)) / count)
        if delta.finish_reason is not None:
            self.stop(delta.finish_reason, 1)
        if delta.usage is not None:
            self.metrics.observe("e2e_request_latency_seconds", now - self.arrived)
            with self._lock:
                self._usage = (delta.usage.prompt_tokens, delta.usage.completion_tokens)
            self._settle()

    def _settle(self) -> None:
        """What can be said once both the end and the ticket are there."""
        with self._lock:
            ticket, usage = self._ticket, self._usage
            if ticket is None or usage is None:
                return
            self._usage = None
        self.metrics.observe("request_prompt_tokens", usage[0])
        self.metrics.observe("request_generation_tokens", usage[1])
        points = (ticket.queued_at, ticket.scheduled_at, ticket.first_token_at, ticket.ended_at)
        for name, start, end in zip(("queue", "prefill", "decode"), points, points[1:], strict=False):
            if start is not None and end is not None:
                self.metrics.observe(f"request_{name}_time_seconds", max(end - start, 0.0))


class WatchedTicket:
    """A scheduler's ticket whose cancellation is counted."""

    def __init__(self, ticket: Ticket, watch: Watch):
        self._ticket, self._watch = ticket, watch

    @property
    def id(self) -> int:
        """Number of the request."""
        return self._ticket.id

    @property
    def done(self) -> bool:
        """Whether all its answers have ended."""
        return self._ticket.done

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the cache."""
        return self._ticket.cached_tokens

    def cancel(self) -> None:
        """End the request; its blocks are free within one step."""
        if not self._ticket.done:
            self._watch.stop("abort")
        self._ticket.cancel()


def _renamed(metric: Metric, name: str) -> Metric:
    made = Metric(name, metric.documentation, metric.type)
    made.samples = [s._replace(name=name + s.name.removeprefix(metric.name)) for s in metric.samples]
    return made


def _without_times(metrics: Iterable[Metric]) -> Iterator[Metric]:
    """Leave out the samples that only say when a counter was made."""
    for metric in metrics:
        metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        yield metric


router = APIRouter()


@router.get("/metrics", response_class=Response)
def read_metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(request.app.state.qwen.metrics.text(), media_type=CONTENT_TYPE)
