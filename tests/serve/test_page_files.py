"""The files of the page and how they are served: headers, names, and nothing that a policy would have to stop."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from research.qwen.serve import page
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings
from tests.serve.running import fake_engine, running_state, serve_app

STATIC = Path(page.__file__).parent / "static"
FILES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx.Client]:
    """The whole application with a key, and a client without one."""
    settings = ServerSettings(api_keys=("secret",))
    with (
        running_state(fake_engine(), settings) as state,
        serve_app(create_app(state)) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client


def test_page_is_served_without_a_key_and_the_api_is_not(guarded: httpx.Client) -> None:
    assert guarded.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert guarded.get("/static/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert guarded.get("/v1/models").status_code == 401


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_as_it_is(guarded: httpx.Client, name: str) -> None:
    response = guarded.get("/" if name == page.INDEX else f"/static/{name}")
    assert response.content == (STATIC / name).read_bytes()
    assert response.headers["x-content-type-options"] == "nosniff"


def test_policy_allows_nothing_from_elsewhere_and_no_inline_code(guarded: httpx.Client) -> None:
    policy = dict(
        part.split(" ", 1) for part in guarded.get("/").headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["object-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert not re.search("unsafe|data:|blob:|http|[*]", " ".join(policy.values()))


def test_browser_asks_again_and_gets_304(guarded: httpx.Client) -> None:
    first = guarded.get("/static/app.js")
    again = guarded.get("/static/app.js", headers={"If-None-Match": f'"x", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"
    assert guarded.get("/static/app.js", headers={"If-None-Match": '"old"'}).status_code == 200


def test_head_and_icon(guarded: httpx.Client) -> None:
    assert guarded.head("/").status_code == 200
    assert guarded.get("/favicon.ico").headers["content-type"] == "image/svg+xml"


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpage.py", "%2e%2e%2fpage.py", "../page.py", "a/b.js"])
def test_no_other_file_can_be_had(guarded: httpx.Client, name: str) -> None:
    response = guarded.get(f"/static/{name}")
    assert response.status_code in (401, 404)
    assert set(response.json()) == {"error"}


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_and_name_no_other_server(name: str) -> None:
    text = (STATIC / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # the name of SVG's namespace


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_never_parse_html_or_code(name: str) -> None:
    text = (STATIC / name).read_text(encoding="utf-8")
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc"
    assert not re.search(sinks, text)


def test_html_has_no_inline_script_style_or_handler() -> None:
    html = (STATIC / page.INDEX).read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", html)
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == []


def test_modules_are_loaded_at_once_and_not_one_after_the_other() -> None:
    html = (STATIC / page.INDEX).read_text(encoding="utf-8")
    named = re.findall(r'(?:modulepreload" href|script src|module" src)="static/([^"]+)"', html)
    assert sorted(named) == SCRIPTS


def texts(language: str) -> dict[str, str]:
    """The texts of one language, as strings.js has them."""
    source = (STATIC / "strings.js").read_text(encoding="utf-8")
    block = source.split(f"  {language}: {{\n", 1)[1].split("\n  },", 1)[0]
    return {key: json.loads(value) for key, value in re.findall(r'^\s+(\w+): (".*"),$', block, re.MULTILINE)}


def test_both_languages_have_every_text_with_the_same_values() -> None:
    english, chinese = texts("en"), texts("zh")
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", chinese[key])), key


def test_every_text_that_is_asked_for_exists_and_every_text_is_used() -> None:
    sources = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in FILES if name != "strings.js")
    keys = texts("en").keys()
    assert set(re.findall(r'\bt\("(\w+)"', sources)) <= keys
    assert set(re.findall(r'data-i18n(?:-\w+)?="(\w+)"', sources)) <= keys
    assert {key for key in keys if not re.search(rf"\b{key}\b", sources)} == set()
