"""Keys: where they are read from, which routes need one, and that a wrong one is refused."""

from __future__ import annotations

import http.client
from pathlib import Path

import httpx
import pytest

from research.qwen.errors import ConfigError
from research.qwen.serve.app import create_app
from research.qwen.serve.auth import HostCheck, KeyRing, read_keys
from research.qwen.serve.state import ServerSettings, ServerState
from tests.serve.running import error_of, fake_engine, serve_app

pytestmark = pytest.mark.slow


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def guarded(**settings: object) -> ServerState:
    values = {"api_keys": ("first-key", "second-key"), **settings}
    return ServerState(ServerSettings(**values), fake_engine())  # type: ignore[arg-type]


def test_keys_come_from_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\nfrom-file\n\n  second \nfrom-option\n")
    environ = {"QWEN_API_KEY": "from-env, other"}
    keys = read_keys(["from-option"], file, environ)
    assert keys == ("from-option", "from-file", "second", "from-env", "other")
    assert read_keys(environ={}) == ()
    assert read_keys(environ={"QWEN_API_KEY": ""}) == ()


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\nbreak"])
def test_keys_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(ConfigError, match="API key 1"):
        read_keys([key], environ={})


def test_key_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(file=tmp_path / "none", environ={})
    (tmp_path / "empty").write_text("# only a comment\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(file=tmp_path / "empty", environ={})


def test_the_ring_compares_all_keys_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    import hmac

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(real(a, b)) or real(a, b))
    ring = KeyRing(["abc", "abcd", "x"])
    assert b"abc" in ring
    assert compared == [True, False, False], "no early end"
    for wrong in (b"", b"ab", b"ABC", b"abc ", b"\xff"):
        assert wrong not in ring


def test_which_routes_need_a_key() -> None:
    with serve_app(create_app(guarded())) as url, httpx.Client(base_url=url) as client:
        for path in (
            "/v1/models",
            "/metrics",
            "/version",
            "/openapi.json",
            "/tokenizer_info",
            "/v1/nothing",
        ):
            response = client.get(path)
            error = error_of(response, 401)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-should-retry" not in response.headers
        for path in ("/", "/static/nothing.js", "/health"):
            assert client.get(path).status_code != 401, path
        assert client.get("/static/../v1/models").status_code == 401


def test_which_keys_are_taken() -> None:
    with serve_app(create_app(guarded())) as url, httpx.Client(base_url=url) as client:
        for header in ("Bearer first-key", "bearer second-key", "BEARER  first-key"):
            assert client.get("/v1/models", headers={"authorization": header}).status_code == 200, header
        wrong = (
            "Bearer first-ke",
            "Bearer first-keyy",
            "Bearer",
            "Basic first-key",
            "first-key",
            "",
        )
        for header in wrong:
            error = error_of(client.get("/v1/models", headers={"authorization": header}), 401)
            assert "first-key" not in error["message"]
        assert client.get("/v1/models?api_key=first-key").status_code == 401


def test_a_refused_body_is_not_read() -> None:
    with serve_app(create_app(guarded(max_body=100))) as url:
        assert httpx.post(f"{url}/v1/embeddings", content=b"x" * 1000).status_code == 401


def test_metrics_can_be_open() -> None:
    with serve_app(create_app(guarded(open_metrics=True))) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/metrics/x").status_code == 401


def test_under_a_root_path() -> None:
    with serve_app(create_app(guarded(root_path="/llm"))) as url, httpx.Client(base_url=url) as client:
        assert client.get("/llm/health").status_code == client.get("/health").status_code == 503
        assert client.get("/llm/v1/models").status_code == client.get("/v1/models").status_code == 401
        assert client.get("/llm/v1/models", headers=bearer("first-key")).status_code == 200
        assert client.get("/llmhealth").status_code == 401


def test_without_keys_any_header_will_do(client: httpx.Client) -> None:
    for header in (
        "Bearer ",
        "Bearer whatever",
        "Basic x",
        "",
    ):  # the first is what lm-eval sends without a key
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port or 80)
        connection.request("GET", "/v1/models", headers={"authorization": header})
        assert connection.getresponse().status == 200, header
        connection.close()


def test_other_origins_may_not_call_unless_named() -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with serve_app(create_app(guarded())) as url, httpx.Client(base_url=url) as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=asked).headers
        assert client.options("/v1/models", headers=asked).status_code == 401
    state = guarded(cors_origins=("https://a.example",))
    with serve_app(create_app(state)) as url, httpx.Client(base_url=url) as client:
        wanted = {**asked, "access-control-request-headers": "authorization,content-type"}
        answer = client.options("/v1/chat/completions", headers=wanted)
        assert answer.status_code == 200, "a preflight carries no key"
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in answer.headers
        refused = client.get("/v1/models", headers=asked)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example", "the page may read why"
        other = client.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "localhost",
        "LOCALHOST:80",
        "a.localhost:1",
        "[::1]:8000",
        "[::1]",
        "qwen:8000",
        "10.0.0.7",
        "",
    ],
)
def test_hosts_of_this_machine(host: str) -> None:
    assert HostCheck(create_app(guarded())).accepts(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example."]
)
def test_hosts_of_others(host: str) -> None:
    app = create_app(guarded())
    assert not HostCheck(app).accepts(host)
    assert not HostCheck(app, ["llm.example"]).accepts(host)
    assert HostCheck(app, [host.split(":")[0].rstrip(".").upper()]).accepts(host)


def test_a_name_that_points_to_this_machine_is_no_way_in() -> None:
    """What a rebound DNS name would send: same origin, JSON, no key."""
    wish, evil = {"prompt": "a"}, {"host": "evil.example:8000"}
    state = guarded(api_keys=(), check_host=True, allowed_hosts=("llm.example",))
    with serve_app(create_app(state)) as url:
        for path in ("/v1/completions", "/", "/health"):
            assert (
                error_of(httpx.post(url + path, json=wish, headers=evil), 403)["code"] == "host_not_allowed"
            )
        assert httpx.post(f"{url}/tokenize", json=wish, headers={"host": "LLM.example"}).status_code == 200
        assert httpx.post(f"{url}/tokenize", json=wish).status_code == 200
    with serve_app(create_app(guarded(api_keys=()))) as url:
        assert httpx.post(f"{url}/tokenize", json=wish, headers=evil).status_code == 200
