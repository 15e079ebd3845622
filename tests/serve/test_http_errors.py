"""One envelope for every failure, with the statuses and headers that clients' retries depend on."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from research.qwen.errors import BusyError, ClosedError, ConfigError, LogitsError, PromptError, RequestError
from research.qwen.serve.app import create_app
from research.qwen.serve.errors import ApiError, json_bytes, param_path, to_api_error
from research.qwen.serve.state import ServerSettings, ServerState
from tests.serve.running import error_of, fake_engine, serve_app

SECRET = "my secret text"


def test_routes_and_methods(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["type"] == "not_found_error"
    assert error_of(client.post("/version"), 405)["code"] == "method_not_allowed"
    assert error_of(client.get("/v1/embeddings"), 405)["type"] == "invalid_request_error"
    assert error_of(client.get("/docs"), 404), "its pages would load scripts from elsewhere"
    assert "x-should-retry" not in client.get("/v1/nothing").headers


def test_unknown_model(client: httpx.Client) -> None:
    for response in (
        client.get("/v1/models/gpt-4"),
        client.post("/v1/embeddings", json={"model": "gpt-4", "input": "a"}),
        client.post("/tokenize", json={"model": "gpt-4", "prompt": "a"}),
    ):
        error = error_of(response, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


BAD_BODIES = {
    "missing": ({}, "input", "field required"),
    "wrong type": ({"input": {"text": SECRET}}, "input", "must be a string"),
    "in a list": ({"input": ["a", 1.5]}, "input[1]", "string"),
    "in lists": ({"input": [[1, 2], [3, "x"]]}, "input[1]", "token ids"),
    "choice": ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    "value": ({"input": [""]}, "input[0]", "empty"),
    "not an object": ([1, 2], None, "the body: "),
    "null": (None, None, "the body: "),
}


@pytest.mark.parametrize(("body", "param", "message"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_fields_are_named(client: httpx.Client, body: object, param: str | None, message: str) -> None:
    error = error_of(client.post("/v1/embeddings", json=body), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert SECRET not in error["message"]


@pytest.mark.parametrize(
    "body", [b"{", b"", b'{"input": }', b"\xff\xfe", b"[" * 100_000, b'{"input": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_no_json(client: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert error_of(client.post("/v1/embeddings", content=body, headers=headers), 400)["param"] is None


def test_json_has_to_be_declared(client: httpx.Client) -> None:
    """A page of another origin may send text/plain without asking first; it must not reach the model."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/v1/embeddings", content=b'{"input": "a"}', headers={"content-type": kind})
        assert error_of(response, 415)["code"] == "unsupported_media_type"
    declared = {"content-type": "application/json; charset=utf-8"}
    assert client.post("/v1/embeddings", content=b'{"input": "a"}', headers=declared).status_code == 200


def test_lone_surrogates_do_not_break_the_answer(client: httpx.Client) -> None:
    body = b'{"input": "a", "encoding_format": "\\ud83d"}'
    response = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    error_of(response, 400)
    assert json_bytes({"a": "x\ud83dy"}) == b'{"a":"x?y"}'


STATUSES = {
    "prompt": (PromptError("p"), 400, "invalid_request_error", None),
    "request": (RequestError("p"), 400, "invalid_request_error", None),
    "other of ours": (ConfigError("p"), 400, "invalid_request_error", None),
    "logits": (LogitsError("p"), 400, "invalid_request_error", None),
    "busy": (BusyError("p"), 429, "rate_limit_error", "true"),
    "closed": (ClosedError("p"), 503, "service_unavailable_error", "true"),
    "framework": (HTTPException(403, "p"), 403, "permission_error", None),
    "unknown": (ValueError(SECRET), 500, "server_error", "false"),
}


@pytest.mark.parametrize(("error", "status", "kind", "retry"), STATUSES.values(), ids=STATUSES.keys())
def test_statuses(error: Exception, status: int, kind: str, retry: str | None) -> None:
    api = to_api_error(error)
    assert (api.status_code, api.type) == (status, kind)
    headers = dict(api.headers or {})
    assert headers.get("x-should-retry") == retry
    assert ("Retry-After" in headers) == (retry == "true")
    assert SECRET not in json.dumps(api.body())


def test_the_field_of_an_error_of_ours() -> None:
    error = RequestError("p")
    assert to_api_error(error, param="stop").param == "stop"
    error.param = "seed"  # type: ignore[attr-defined]
    assert to_api_error(error, param="stop").param == "seed"


@pytest.mark.parametrize(
    ("location", "body", "missing", "path"),
    [
        (("body", "messages", 0, "content"), {"messages": [{}]}, True, "messages[0].content"),
        (("body", "stop", "list[str]", 1), {"stop": ["a", 2]}, False, "stop[1]"),
        (("body", "stop", "str"), {"stop": {}}, False, "stop"),
        (("body",), None, True, None),
        (("query", "page"), None, False, "page"),
        (("body", 3), [1], False, None),
    ],
)
def test_paths_of_fields(
    location: tuple[int | str, ...], body: object, missing: bool, path: str | None
) -> None:
    assert param_path(location, body, missing) == path


def test_validation_without_details_is_still_an_envelope() -> None:
    found = [{"type": "value_error", "loc": ("body", "a"), "msg": "Value error, No."}]
    assert to_api_error(RequestValidationError(found, body={"a": 1})).message == "a: no."


def broken_app() -> FastAPI:
    """An app with a route that fails, before or after its answer has begun."""
    app = create_app(ServerState(ServerSettings(), fake_engine()))

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError(SECRET)

    @app.get("/refused")
    async def refused() -> None:
        raise ApiError(400, "no", param="a.b", code=7)

    return app


def test_an_unexpected_failure_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with serve_app(broken_app()) as url, caplog.at_level(logging.DEBUG):
        response = httpx.get(f"{url}/broken")
        error = error_of(response, 500)
        assert response.headers["x-should-retry"] == "false"
        assert SECRET not in response.text
        assert error["code"] == "internal"
        assert "KeyError at test_http_errors.py:" in caplog.text
        assert SECRET not in caplog.text
        assert error_of(httpx.get(f"{url}/refused"), 400) == {
            "message": "no",
            "type": "invalid_request_error",
            "param": "a.b",
            "code": 7,
        }


def test_the_schema_promises_the_envelope(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    operations = [op for path in schema["paths"].values() for op in path.values()]
    assert len(operations) >= 10
    for operation in operations:
        assert "422" not in operation["responses"]
        reference = operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.endswith("/ErrorBody")
