"""The page in front of the whole server with the demo model: nothing scripted, nothing faked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings
from tests.serve.page_browser import Watched
from tests.serve.page_server import Script
from tests.serve.running import running_state, serve_app

pytestmark = pytest.mark.mindspore
pytest_plugins = ["tests.serve.page_fixtures"]

KEY = "sk-test"
POEM = "静夜思（李白）\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Base URL of the demo server, which wants a key."""
    engine = Engine.from_pretrained(demo_folder())
    settings = ServerSettings(api_keys=(KEY,))
    with running_state(engine, settings) as state, serve_app(create_app(state)) as url:
        yield url


@pytest.fixture
def chat(chromium: Browser, server: str) -> Iterator[Watched]:
    """The page, ready and with the key."""
    context = chromium.new_context(locale="zh-CN")
    watched = Watched(context.new_page(), server, Script())
    watched.watch(watched.page)
    watched.page.goto(server)
    watched.page.get_by_role("button", name="设置", exact=True).click()
    watched.page.get_by_label("API 密钥").fill(KEY)
    watched.page.get_by_label("API 密钥").press("Enter")
    watched.page.wait_for_selector("#model-state[data-state=ready]")
    yield watched
    context.close()
    watched.check()


def answer(chat: Watched, question: str) -> str:
    """The text of the answer to a question."""
    chat.ask(question)
    chat.settled()
    text: str = chat.answers.last.locator(".prose").inner_text()
    return text


def test_poem_emoji_and_figures(chat: Watched) -> None:
    assert answer(chat, "请背诵《静夜思》") == POEM
    assert answer(chat, "发几个表情给我") == "好的：😀🎉👍🏽🐼"
    expect(chat.answers.last.locator(".figures")).to_contain_text("缓存命中")


def test_conversation_is_remembered_edited_and_told_again(chat: Watched) -> None:
    assert answer(chat, "我叫小明。") == "你好，小明！很高兴认识你。"
    assert answer(chat, "我叫什么名字？") == "你叫小明。"
    again(chat.page)
    chat.settled()
    expect(chat.answers.last.locator(".prose")).to_have_text("你叫小明。")
    chat.page.get_by_role("button", name="编辑", exact=True).first.click()
    chat.page.get_by_label("编辑消息").fill("一加一等于几？")
    chat.page.keyboard.press("Enter")
    chat.settled()
    expect(chat.answers).to_have_count(1)
    expect(chat.answers.locator(".prose")).to_have_text("一加一等于二。")


def again(page: Page) -> None:
    """Asks for the last answer once more."""
    page.get_by_role("button", name="重新回答", exact=True).click()


@pytest.mark.parametrize(
    ("label", "value", "words"), [("最多词元数", "3", "达到长度上限"), ("最多词元数", "900000", "context")]
)
def test_limits_are_told(chat: Watched, label: str, value: str, words: str) -> None:
    chat.page.get_by_label(label).fill(value)
    chat.ask("请背诵《静夜思》")
    chat.settled()
    expect(chat.answers.last).to_contain_text(words)


def test_wrong_key_is_told(chat: Watched) -> None:
    chat.page.get_by_label("API 密钥").fill("wrong")
    chat.page.get_by_label("API 密钥").press("Enter")
    chat.ask("你好")
    expect(chat.page.locator(".problem")).to_contain_text("服务器要求有效的 API 密钥")


def test_tools_reach_the_model(chat: Watched, server: str) -> None:
    """The demo model knows no tools; a named choice makes it call one all the same."""
    chat.page.get_by_role("button", name="插入示例").click()
    chat.page.get_by_label("调用").select_option("get_weather")
    chat.page.get_by_label("最多词元数").fill("64")
    bodies: list[Any] = []
    chat.page.on(
        "request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None
    )
    chat.ask("杭州天气怎么样？")
    chat.settled()
    expect(chat.page.locator(".call code")).to_have_text("get_weather")
    assert bodies[0]["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
