"""docs/server.md and the server agree: every route, option and metric it names is there, and none is missing."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from research.qwen.cli.serve import build_parser
from research.qwen.serve.metrics import HISTOGRAMS


@pytest.fixture(scope="module")
def text() -> str:
    return (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")


def test_options(text: str) -> None:
    known = set(build_parser().format_help().split())
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--tasks", "--model"}  # of lm_eval
    named -= {option for option in named if option.startswith("--model_")}
    assert named and not {option for option in named if option not in known and f"[{option}" not in known}


def test_routes(text: str, client: httpx.Client) -> None:
    table = text.split("## Routes")[1].split("Fields nobody")[0]
    named = set(re.findall(r"(/[a-z_0-9/{}.-]+)", re.sub(r"\]\([^)]*\)", "", table)))
    listed = {path.replace("{model}", "{id}") for path in client.get("/openapi.json").json()["paths"]}
    assert listed <= named
    assert named - listed == {"/openapi.json"}


def test_metrics(text: str, client: httpx.Client) -> None:
    exposed = client.get("/metrics").text
    table = text.split("## Metrics")[1]
    named = re.findall(r"`([a-z0-9_]+)(?:\{[a-z_,]+\})?`", table.split("| qwen_ / vllm: |")[1])
    assert set(HISTOGRAMS) <= set(named)
    values = {"stop", "length", "abort", "error"}
    for name in set(named) - values:
        assert (
            f"# TYPE {name}" in exposed
            or f"vllm:{name}" in exposed
            or f"qwen_{name}" in exposed
            or (f"# TYPE qwen_{name.removesuffix('_total')}_total" in exposed)
        ), name


def test_fields(text: str, client: httpx.Client) -> None:
    paragraph = text.split("Beside OpenAI's fields")[1].split("(Python")[0]
    named = set(re.findall(r"`([a-z_]+)`", paragraph))
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    taken = {name for schema in schemas.values() for name in schema.get("properties", {})}
    assert len(named) > 15 and named <= taken


def test_codes(text: str) -> None:
    table = text.split("## Errors")[1].split("`x-should-retry`")[0]
    folder = Path(__file__).resolve().parents[2] / "research" / "qwen" / "serve"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", table)) - {"message", "type", "param", "code"}
    assert len(named) >= 10
    for name in named:
        assert f'"{name}"' in sources, name
