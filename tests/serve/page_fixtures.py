"""Fixtures of the tests that click through the page (a plugin of theirs: ``pytest_plugins``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from tests.serve.page_browser import ARGUMENTS, CHROMIUM, OpenPage, Watched
from tests.serve.page_server import Script, scripted_server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for a module; its driver runs an event loop, so it must not outlive the module."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (chromium, chromium-browser or google-chrome)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_server() -> Iterator[tuple[str, Script]]:
    """The scripted server."""
    with scripted_server() as server:
        yield server


@pytest.fixture
def open_page(chromium: Browser, page_server: tuple[str, Script]) -> Iterator[OpenPage]:
    """A function that opens the page in a fresh profile; options are those of a browser context."""
    url, script = page_server
    script.reset()
    opened: list[tuple[BrowserContext, Watched]] = []

    def make(ready: bool = True, **options: Any) -> Watched:
        settings = {"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options}
        context = chromium.new_context(**settings)
        watched = Watched(context.new_page(), url, script)
        opened.append((context, watched))
        watched.watch(watched.page)
        if ready:
            watched.open()
        return watched

    yield make
    script.release()
    for context, watched in opened:
        context.close()
        watched.check()


@pytest.fixture
def chat(open_page: OpenPage) -> Watched:
    """The page in English on a desktop, ready."""
    return open_page()
