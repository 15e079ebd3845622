"""Everything around the conversation: chats, settings, languages, themes, keys, phones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serve.page_browser import OpenPage, Watched
from tests.serve.page_server import Wait

pytest_plugins = ["tests.serve.page_fixtures"]
pytestmark = pytest.mark.browser

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}


def titles(chat: Watched) -> list[str]:
    """Titles in the list of chats, from the top."""
    return chat.page.locator(".chat-open").all_text_contents()


def test_chats_are_kept_listed_and_opened_again(chat: Watched) -> None:
    chat.exchange("first question", ["1"])
    chat.button("New chat").click()
    expect(chat.page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    chat.exchange("😀" * 50, ["2"])
    assert titles(chat) == ["😀" * 40 + "…", "first question"]
    chat.open()
    expect(chat.questions).to_have_count(0)
    chat.page.get_by_role("button", name="first question", exact=True).click()
    expect(chat.answers.locator(".prose")).to_have_text("1")
    assert chat.page.title() == "first question · Qwen"
    chat.exchange("and now", ["3"])
    assert titles(chat)[0] == "first question"
    assert [m["content"] for m in chat.script.bodies[-1]["messages"]] == ["first question", "1", "and now"]


def test_rename_and_delete_with_undo(chat: Watched) -> None:
    chat.exchange("old", ["1"])
    chat.page.locator(".chat-item").hover()
    chat.button("Rename “old”").click()
    expect(chat.page.get_by_label("New name")).to_be_focused()
    chat.page.keyboard.type("new")
    chat.page.keyboard.press("Enter")
    assert titles(chat) == ["new"]
    chat.page.locator(".chat-open").focus()
    chat.page.keyboard.press("F2")
    chat.page.keyboard.type("other")
    chat.page.keyboard.press("Escape")
    assert titles(chat) == ["new"]
    chat.page.locator(".chat-item").hover()
    chat.button("Delete “new”").click()
    assert titles(chat) == []
    expect(chat.questions).to_have_count(0)
    chat.button("Undo").click()
    assert titles(chat) == ["new"]
    chat.open()
    assert titles(chat) == ["new"]


def test_deleting_a_chat_stops_its_answer_for_good(chat: Watched) -> None:
    chat.script.say("a", Wait(), "b")
    chat.ask("q")
    expect(chat.answers).to_contain_text("a")
    chat.page.locator(".chat-item").hover()
    chat.button("Delete “q”").click()
    chat.settled()
    chat.open()
    assert titles(chat) == []


def test_export_and_import(chat: Watched, tmp_path: Path) -> None:
    chat.exchange("问题 <b>", ["回答 😀"])
    chat.page.locator(".chat-item").hover()
    with chat.page.expect_download() as download:
        chat.button("Export “问题 <b>”").click()
    file = tmp_path / "chat.json"
    download.value.save_as(file)
    assert json.loads(file.read_text(encoding="utf-8"))["chats"][0]["messages"][1]["content"] == "回答 😀"
    chat.page.set_input_files("#import-file", file)
    expect(chat.page.locator(".toast")).to_have_text("1 imported.")
    assert titles(chat) == ["问题 <b>"] * 2
    with chat.page.expect_download() as download:
        chat.button("Export all").click()
    assert len(json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["chats"]) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "qwen-page-chats", "chats": [1, null, {"id": "../x"}]}']
)
def test_import_of_something_else_changes_nothing(chat: Watched, tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8")
    chat.page.set_input_files("#import-file", file)
    expect(chat.page.locator(".toast")).to_have_text("This file holds no chats of this page.")
    assert titles(chat) == []


def test_damaged_storage_is_passed_over(chat: Watched) -> None:
    chat.exchange("good", ["1"])
    damaged = {
        "qwen-page.chat.a": "{",
        "qwen-page.chat.b": '{"id": "b", "messages": [{"role": "assistant", "calls": 7, "usage": "x"}, 5]}',
        "qwen-page.settings": '{"sampling": {"temperature": 99, "top_k": "<b>"}, "theme": 3}',
    }
    chat.page.evaluate(
        "kept => { for (const name in kept) localStorage.setItem(name, kept[name]); }", damaged
    )
    chat.open()
    assert sorted(titles(chat)) == ["New chat", "good"]
    chat.page.locator(".chat-open").first.click()
    chat.exchange("q", ["a"])
    assert "temperature" not in chat.script.bodies[-1]


def test_full_storage_is_said_and_the_chat_goes_on(chat: Watched) -> None:
    chat.page.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 100))")
    chat.exchange("q", ["a"])
    expect(chat.page.locator(".toast")).to_contain_text("storage is full")
    expect(chat.answers.locator(".prose")).to_have_text("a")


def test_page_without_storage_works(open_page: OpenPage) -> None:
    chat = open_page(ready=False)
    deny = "Object.defineProperty(window, '{}', {{ get() {{ throw new DOMException('no', 'SecurityError'); }} }});"
    chat.page.add_init_script(deny.format("localStorage") + deny.format("sessionStorage"))
    chat.open()
    chat.exchange("q", ["a"])
    assert titles(chat) == ["q"]


def test_sampling_is_sent_only_where_it_was_set(chat: Watched) -> None:
    chat.button("Settings").click()
    values = {
        "Temperature": "0",
        "Top p": "0.8",
        "Top k": "40",
        "Most tokens": "64",
        "Seed": "1234",
        "Repetition penalty": "1.1",
        "Presence penalty": "-0.5",
    }
    for label, value in values.items():
        chat.page.get_by_label(label).fill(value)
    chat.page.get_by_label("System prompt").fill("Be brief.")
    chat.page.get_by_label("Model", exact=True).select_option("qwen-other")
    chat.button("Close settings").click()
    chat.exchange("q", ["a"])
    body = chat.script.bodies[0]
    assert {key: body[key] for key in body if key not in ("messages", "stream", "stream_options")} == {
        "temperature": 0,
        "top_p": 0.8,
        "top_k": 40,
        "max_tokens": 64,
        "seed": 1234,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "model": "qwen-other",
    }
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_settings_are_kept_the_system_prompt_with_its_chat(chat: Watched) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("0.3")
    chat.page.get_by_label("System prompt").fill("Only here.")
    chat.exchange("q", ["a"])
    chat.open()
    chat.button("Settings").click()
    expect(chat.page.get_by_label("Temperature")).to_have_value("0.3")
    expect(chat.page.get_by_label("System prompt")).to_have_value("")
    chat.page.get_by_role("button", name="q", exact=True).click()
    expect(chat.page.get_by_label("System prompt")).to_have_value("Only here.")
    chat.button("Reset").click()
    chat.exchange("r", ["b"])
    assert "temperature" not in chat.script.bodies[-1]


def test_values_out_of_range_are_shown_and_not_sent(chat: Watched) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("0.5")
    chat.page.get_by_label("Temperature").fill("3")
    expect(chat.page.get_by_text("Temperature: from 0 to 2")).to_be_visible()
    chat.page.get_by_label("Top k").fill("1.5")
    chat.exchange("q", ["a"])
    assert not {"temperature", "top_k"} & chat.script.bodies[0].keys()
    chat.page.get_by_label("Temperature").press("ArrowDown")
    chat.exchange("q", ["a"])
    assert chat.script.bodies[1]["temperature"] == 2


def test_tools_are_checked_and_chosen(chat: Watched) -> None:
    chat.button("Settings").click()
    field = chat.page.get_by_label("Functions (JSON)")
    for source, verdict in (
        ("{", "Not usable"),
        ("{}", "a list of functions"),
        ('[{"name": ""}]', "function 1 has no name"),
    ):
        field.fill(source)
        expect(chat.page.locator("#tools-verdict")).to_contain_text(verdict)
    chat.exchange("q", ["a"])
    assert "tools" not in chat.script.bodies[0]
    chat.button("Insert an example").click()
    expect(chat.page.locator("#tools-verdict")).to_have_text("1 ready: get_weather")
    for choice in ("always get_weather", "always one", "never"):
        chat.page.get_by_label("Calls").select_option(choice)
        chat.exchange("q", ["a"])
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert [body["tool_choice"] for body in chat.script.bodies[1:]] == [named, "required", "none"]


def test_key_is_asked_for_used_and_forgotten_with_the_tab(open_page: OpenPage) -> None:
    chat = open_page(ready=False)
    chat.script.key = "s3cret"
    chat.page.goto(chat.url)
    state = chat.page.locator("#model-state")
    expect(state).to_have_text("An API key is needed")
    chat.ask("q")
    expect(chat.page.locator(".problem")).to_contain_text("valid API key")
    chat.button("Enter the key").click()
    field = chat.page.get_by_label("API key")
    expect(field).to_be_focused()
    expect(field).to_have_attribute("type", "password")
    field.fill("s3cret")
    field.press("Enter")
    expect(state).to_have_text("qwen-test")
    expect(chat.page.get_by_label("Model", exact=True)).to_have_value("qwen-test")
    chat.script.say("ok")
    chat.button("Try again").click()
    expect(chat.answers.locator(".prose")).to_have_text("ok")
    assert chat.script.keys[-1] == "Bearer s3cret"
    assert "s3cret" not in chat.page.evaluate("JSON.stringify(localStorage)")
    chat.page.get_by_label("Keep it in this browser").check()
    assert "s3cret" in chat.page.evaluate("JSON.stringify(localStorage)")
    chat.page.get_by_label("Keep it in this browser").uncheck()
    assert "s3cret" not in chat.page.evaluate("JSON.stringify(localStorage)")


def test_loading_server_is_awaited(open_page: OpenPage) -> None:
    chat = open_page(ready=False)
    chat.script.health = 503
    chat.page.goto(chat.url)
    expect(chat.page.locator("#model-state")).to_have_text("The model is loading")
    chat.script.health = 200
    expect(chat.page.locator("#model-state")).to_have_text("qwen-test")


def test_language_follows_the_browser_and_is_switched_and_kept(open_page: OpenPage) -> None:
    chat = open_page(locale="zh-CN")
    expect(chat.page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(chat.page.get_by_placeholder("写一条消息")).to_be_focused()
    chat.script.say("ok")
    chat.page.locator(".suggestion").first.click()
    expect(chat.questions).to_contain_text("深度学习入门")
    chat.settled()
    chat.button("Switch to English").click()
    expect(chat.page.get_by_label("Message")).to_be_visible()
    visible = chat.page.locator("body").inner_text() + "".join(labels(chat))
    own = visible.replace("比较适合深度学习入门的书籍有", "").replace("切换到中文", "").replace("中", "")
    assert not re.search(r"[\u4e00-\u9fff]", own)
    chat.open()
    expect(chat.page.locator("html")).to_have_attribute("lang", "en")


def labels(chat: Watched) -> list[str]:
    """All accessible names and hints in attributes."""
    attributes = "['aria-label', 'title', 'placeholder'].map((name) => element.getAttribute(name) ?? '')"
    found: list[str] = chat.page.evaluate(
        f"[...document.body.querySelectorAll('*')].flatMap((element) => {attributes})"
    )
    return found


def test_theme_follows_the_system_and_is_switched_and_kept(open_page: OpenPage) -> None:
    chat = open_page(color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    dark = chat.page.evaluate(shade)
    chat.button("Appearance: as the system").click()
    assert chat.page.evaluate(shade) != dark
    chat.open()
    assert chat.page.evaluate(shade) != dark
    chat.button("Appearance: light").click()
    assert chat.page.evaluate(shade) == dark
    expect(chat.button("Appearance: dark")).to_be_visible()


def test_everything_has_a_name_and_enough_contrast(open_page: OpenPage) -> None:
    for scheme in ("light", "dark"):
        chat = open_page(color_scheme=scheme)
        chat.button("Settings").click()
        chat.exchange("q", ["text `code` [link](https://x.org)\n```py\nreturn 1 # x\n```\n> quote"])
        chat.button("Edit").click()
        assert chat.page.evaluate(NAMELESS) == []
        faint = {text: ratio for text, ratio in chat.page.evaluate(CONTRASTS) if ratio < 4.5}
        assert not faint, (scheme, faint)


NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, a")].filter((element) => {
  const labels = [...(element.labels ?? [])].map((label) => label.textContent).join("");
  return !(element.getAttribute("aria-label") || element.textContent.trim() || labels.trim());
}).map((element) => element.outerHTML)"""

# Text and the ratio of its colour to the nearest background, as WCAG 2 defines it. Disabled controls are exempt.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (color) => [...rgba(color)].slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return rgba(color)[3] > 250 || !element.parentElement ? color : behind(element.parentElement);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const exempt = element.closest(":disabled, script, noscript");
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || exempt) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    found.push([walker.currentNode.data.trim(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


def test_page_by_keyboard_alone(chat: Watched) -> None:
    keyboard = chat.page.keyboard
    chat.exchange("one", ["1"])
    keyboard.press("Control+Shift+O")
    expect(chat.questions).to_have_count(0)
    chat.exchange("two", ["2"])
    chat.page.locator(".chat-open").first.focus()
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    expect(chat.questions).to_have_text("one")
    chat.page.locator("#scroller").focus()
    keyboard.press("/")
    expect(chat.page.locator("#prompt")).to_be_focused()
    expect(chat.page.locator("#prompt")).to_have_value("")
    chat.page.locator("#toggle-panel").press("Enter")
    chat.page.get_by_label("Seed").focus()
    keyboard.press("Escape")
    expect(chat.page.locator("#panel")).to_be_hidden()
    expect(chat.button("Settings")).to_be_focused()
    chat.page.locator("a, button, input").first.focus()
    expect(chat.page.locator(".skip")).to_be_focused()
    expect(chat.page.locator(".skip")).to_be_in_viewport()
    keyboard.press("Enter")
    expect(chat.page.locator("#prompt")).to_be_focused()


def test_phone_has_drawers_and_no_sideways_scrolling(open_page: OpenPage) -> None:
    chat = open_page(**PHONE)
    sidebar = chat.page.locator("#sidebar")
    expect(sidebar).not_to_be_in_viewport()
    chat.exchange("q", ["a"])
    chat.button("Show chats").tap()
    expect(sidebar).to_be_in_viewport(ratio=0.95)
    chat.page.touchscreen.tap(370, 400)
    expect(sidebar).not_to_be_in_viewport()
    assert sidebar.evaluate("element => element.inert")
    chat.button("Settings").tap()
    expect(chat.page.get_by_label("Temperature")).to_be_visible()
    chat.button("Close settings").tap()
    chat.button("Show chats").tap()
    chat.button("New chat").tap()
    expect(sidebar).not_to_be_in_viewport()
    expect(chat.questions).to_have_count(0)
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 390


def test_two_tabs_share_their_chats(chat: Watched) -> None:
    other = Watched(chat.page.context.new_page(), chat.url, chat.script)
    other.watch(other.page)
    other.open()
    chat.exchange("from the first tab", ["1"])
    expect(other.page.locator(".chat-open")).to_have_text("from the first tab")
    other.check()
