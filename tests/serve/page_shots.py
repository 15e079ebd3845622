"""Pictures of the page for docs/web.md: ``python -m tests.serve.page_shots FOLDER``.

The answers are scripted, so that the pictures show every kind of text; fonts are those of the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from tests.serve.page_browser import ARGUMENTS, CHROMIUM, Watched
from tests.serve.page_server import Script, call, scripted_server

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {
    "viewport": {"width": 390, "height": 780},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 1.5,
}

RECURSION = '''A function is **recursive** when it calls itself on a smaller part of the same problem.

```python
def depth(tree: dict) -> int:
    """Levels of a nested dictionary."""
    if not tree:  # nothing left to open
        return 0
    return 1 + max(depth(branch) for branch in tree.values())
```

Two things make it work:

1. **A base case**: an empty dictionary has depth `0`.
2. **A step towards it**: every call sees one level less.

| Call | Left to do | Returns |
|:--|:--|--:|
| `depth({"a": {"b": {}}})` | one branch | 2 |
| `depth({"b": {}})` | one branch | 1 |
'''
POEM = """《静夜思》是李白的五言绝句：

> 床前明月光，疑是地上霜。
> 举头望明月，低头思故乡。

前两句写**所见**，后两句写**所感**："""
NOTES = """

- “疑”字写恍惚：月光像霜，夜已深，人未眠。
- “举头”“低头”只隔一瞬，思乡之情由此而来。🌕
"""
WEATHER = json.dumps([
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "find_trains", "parameters": {"type": "object"}}},
])  # fmt: skip


def words(text: str) -> list[str]:
    """The text in pieces of a few characters."""
    return [text[at : at + 6] for at in range(0, len(text), 6)]


def earlier(shot: Watched, *titles: str) -> None:
    """Fills the list of chats."""
    for title in titles:
        shot.exchange(title, ["…"])
        shot.page.locator("#new-chat").dispatch_event("click")


def recursion(shot: Watched) -> None:
    """A long answer with code and a table."""
    earlier(shot, "Packing list for Hangzhou", "Why is the sky blue?")
    shot.exchange("Explain recursion in Python", words(RECURSION), usage=(24, 186, 16))


def chinese(shot: Watched) -> None:
    """An answer in Chinese, and the settings beside it."""
    earlier(shot, "比较适合深度学习入门的书籍有", "什么是深度学习？")
    shot.page.locator("#toggle-panel").click()
    shot.page.locator("#sampling-temperature").fill("0.7")
    shot.page.locator("#sampling-top_p").fill("0.8")
    shot.page.locator("#system").fill("你是一位语文老师，回答简短。")
    shot.exchange("请背诵《静夜思》并讲解", words(POEM + NOTES), usage=(31, 96, 16))
    shot.page.locator("#prompt").focus()


def tool_call(shot: Watched) -> None:
    """Two calls, one line of a result being written."""
    shot.page.locator("#toggle-panel").click()
    shot.page.locator("#tools").fill(WEATHER)
    shot.page.locator("#toggle-panel").click()
    shot.exchange(
        "Is it worth going to Hangzhou on Saturday?",
        [
            "I should look at the weather and at the trains of that day.",
            call(0, '{"city": "Hangzhou", "day": "Saturday"}', "get_weather", "call_1"),
            call(1, '{"from": "Shanghai", "to": "Hangzhou", "before": "10:00"}', "find_trains", "call_2"),
        ],
        finish="tool_calls",
        usage=(212, 58, 192),
    )
    shot.page.locator(".call textarea").first.press_sequentially("24 °C, light clouds")


def empty(shot: Watched) -> None:
    """The page as it opens."""


SHOTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "light": (recursion, {**DESKTOP, "color_scheme": "light", "locale": "en-US"}),
    "dark": (recursion, {**DESKTOP, "color_scheme": "dark", "locale": "en-US"}),
    "chinese": (chinese, {**DESKTOP, "color_scheme": "light", "locale": "zh-CN"}),
    "tools": (tool_call, {**DESKTOP, "color_scheme": "light", "locale": "en-US"}),
    "phone": (recursion, {**PHONE, "color_scheme": "light", "locale": "en-US"}),
    "welcome": (empty, {**DESKTOP, "color_scheme": "dark", "locale": "zh-CN"}),
}


def take(browser: Browser, url: str, script: Script, name: str, target: Path) -> None:
    """One picture."""
    act, options = SHOTS[name]
    context = browser.new_context(**options)
    shot = Watched(context.new_page(), url, script)
    shot.watch(shot.page)
    shot.open()
    act(shot)
    shot.page.mouse.move(0, 0)
    shot.page.wait_for_timeout(400)
    shot.page.screenshot(path=target)
    shot.check()
    context.close()


def main(folder: str, *names: str) -> None:
    """Takes the named pictures, or all."""
    with scripted_server() as (url, script), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for name in names or SHOTS:
            take(browser, url, script, name, Path(folder, f"web-{name}.png"))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
