"""Two replicas of the demo model on this machine, one killed in the middle of many answers: the rest go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = pytest.mark.mindspore
CLIENTS = 8
LONG = {"model": "qwen-demo", "prompt": "你好", "temperature": 0, "max_tokens": 1200, "ignore_eos": True}


def until(what: Callable[[], object], seconds: float = 120) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.1)


class Service:
    """The running script: its address and its process."""

    def __init__(self, url: str, process: subprocess.Popen):
        self.url, self.process = url, process
        self.client = httpx.Client(base_url=url, timeout=120)

    def replicas(self) -> list[psutil.Process]:
        """The processes that hold a model."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ServeReplica:qwen:Replica" in " ".join(command(child))]

    def models(self) -> bool:
        return self.client.get("/v1/models").status_code == 200


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    """The script with two replicas of the demo model, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    log = tmp_path_factory.mktemp("ray") / "log"
    argv = [sys.executable, "scripts/serve_ray.py", "--port", str(port), "--threads", "1", "--replicas", "2"]
    home = {"HOME": str(log.parent), "QWEN_CACHE_DIR": os.environ.get("QWEN_CACHE_DIR", kernels_cache())}
    with log.open("w") as out:
        process = subprocess.Popen(
            argv, cwd=root, env=os.environ | home, stdout=out, stderr=out, start_new_session=True
        )
    try:
        until(lambda: "replicas ready" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-3000:]
        yield Service(f"http://127.0.0.1:{port}", process)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=20)
        for child in alive:
            child.kill()
        assert (code, alive) == (0, []), "SIGTERM ends the script and all it has started"


def kernels_cache() -> str:
    """Where the compiled kernels are, whatever HOME says."""
    from research.qwen.kernels import build

    return str(build.cache_folder())


def stream(service: Service, begun: Callable[[], None]) -> tuple[str, str]:
    """(text, how it ended) of a streamed answer; ``begun`` is called at its first text."""
    text = ""
    with service.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                return text, "whole"
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return text, event["error"]["message"]
                if not text:
                    begun()
                text += event["choices"][0]["text"]
    return text, "cut"


def test_one_replica_is_killed_under_load(service):
    expected = service.client.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
    assert len(expected) > 500
    begun = threading.Semaphore(0)
    before = {process.pid for process in service.replicas()}
    assert len(before) == 2
    with ThreadPoolExecutor(2 * CLIENTS) as pool:
        streams = [pool.submit(stream, service, begun.release) for _ in range(CLIENTS)]
        whole = [pool.submit(service.client.post, "/v1/completions", json=LONG) for _ in range(CLIENTS)]
        for _ in range(CLIENTS):
            assert begun.acquire(timeout=60)  # every stream is in the middle of its answer
        os.kill(min(before), signal.SIGKILL)
        after = service.client.post("/v1/completions", json=LONG | {"max_tokens": 5})
        streamed = [future.result(120) for future in streams]
        answers = [future.result(120) for future in whole]

    assert after.status_code == 200
    assert [answer.status_code for answer in answers] == [
        200
    ] * CLIENTS  # nothing was said yet: asked again elsewhere
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}
    ends = [end for _, end in streamed]
    broken = [end for end in ends if end != "whole"]
    assert 0 < len(broken) < CLIENTS, ends
    assert all(end.startswith("the replica that was to answer has died") for end in broken), ends
    assert all(text == expected if end == "whole" else expected.startswith(text) for text, end in streamed)
    until(
        lambda: len({process.pid for process in service.replicas()} - before) == 1
    )  # Ray has started another
    assert service.models()


def test_both_replicas_work_and_requests_keep_their_id(service):
    until(lambda: len(service.replicas()) == 2)
    reply = service.client.get("/v1/models", headers={"x-request-id": "mine"})
    assert reply.headers.get_list("x-request-id") == ["mine"]
    missing = service.client.get("/nowhere")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"


def test_sigterm_lets_running_answers_finish(service):
    """The last test: the service has ended behind it."""
    started = psutil.Process(service.process.pid).children(recursive=True)
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, service, begun.release) for _ in range(4)]
        for _ in range(4):
            assert begun.acquire(timeout=60)
        service.process.send_signal(signal.SIGTERM)
        assert [future.result(60)[1] for future in streams] == ["whole"] * 4
    assert service.process.wait(60) == 0
    assert psutil.wait_procs(started, timeout=20)[1] == []
