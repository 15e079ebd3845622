"""schemathesis on /openapi.json: what the document allows and what it does not, sent to every operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings
from tests.serve.running import fake_engine, running_state, serve_app

pytestmark = pytest.mark.slow

load_all_checks()
CHECKS: Any = [
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


BOUNDED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def operations() -> Iterator[list[Any]]:
    """Every operation of the document; the server runs."""
    quick = ServerSettings(default_max_tokens=8)
    with running_state(fake_engine(max_length=1024), quick) as state, serve_app(create_app(state)) as url:
        document = schemathesis.openapi.from_url(f"{url}/openapi.json")
        found: Any = document.get_all_operations()
        yield [result.ok() for result in found]
        assert state.scheduler.stats().blocks_used == 0


def check(case: Any) -> None:
    response = case.call(timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        body = response.json()
        assert list(body) == ["error"]
        assert list(body["error"]) == ["message", "type", "param", "code"] and body["error"]["message"]
    case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_operation(operations: list[Any], mode: GenerationMode) -> None:
    asked = Counter[str]()

    def run(case: Any) -> None:
        asked[case.operation.label] += 1
        check(case)

    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.body:
            decorate: Any = given(operation.as_strategy(generation_mode=mode))
            BOUNDED(decorate(run))()
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"} <= set(asked)
    assert sum(asked.values()) > 100
