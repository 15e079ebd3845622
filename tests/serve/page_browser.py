"""Headless Chromium on the page, with everything it asks for and complains about written down."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import ConsoleMessage, Dialog, Locator, Page, expect

from tests.serve.page_server import Script

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# A refused request is a line in the console, which is no fault of the page.
EXPECTED = "Failed to load resource: the server responded with a status of"

expect.set_options(timeout=5_000)


@dataclass
class Watched:
    """A page, what it asked for and what went wrong in it."""

    page: Page
    url: str
    script: Script
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Writes down every request, error and dialog of a page."""
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self.note)
        page.on("dialog", self.dismiss)

    def note(self, message: ConsoleMessage) -> None:
        """Keeps errors, such as violations of the policy."""
        if message.type == "error" and not message.text.startswith(EXPECTED):
            self.problems.append(message.text)

    def dismiss(self, dialog: Dialog) -> None:
        """The page has no dialogs: one that opens is a script that got in."""
        self.problems.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        """Nothing left the origin, and nothing went wrong."""
        away = [url for url in self.requests if not url.startswith((f"{self.url}/", f"blob:{self.url}/"))]
        assert not away, f"requests left the server: {away}"
        assert not self.problems, self.problems

    def open(self) -> Page:
        """Loads the page and waits until it knows the models."""
        self.page.goto(f"{self.url}/", wait_until="commit")
        self.page.wait_for_selector("#model-state[data-state=ready]")
        return self.page

    def ask(self, text: str) -> None:
        """Sends a message as a user would."""
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Enter")

    def exchange(self, question: str, answer: Sequence[Any], **options: Any) -> None:
        """A question and its whole answer."""
        asked = len(self.script.bodies)
        self.script.say(*answer, **options)
        self.ask(question)
        self.settled()
        assert len(self.script.bodies) == asked + 1

    def exchange_results(self, *answer: Any, **options: Any) -> None:
        """Sends the results of tools that are filled in, and waits for the answer to them."""
        self.script.say(*answer, **options)
        self.button("Send results").click()
        self.settled()

    def settled(self) -> None:
        """Waits until no answer is being written."""
        self.page.wait_for_selector("#stop", state="hidden")

    @property
    def answers(self) -> Locator:
        """All answers."""
        return self.page.locator("article.answer")

    @property
    def questions(self) -> Locator:
        """All messages of the user."""
        return self.page.locator("article.question")

    def button(self, name: str) -> Locator:
        """A button by its accessible name."""
        return self.page.get_by_role("button", name=name, exact=True)


OpenPage = Callable[..., Watched]
