"""The conversation in a real browser: streaming, stopping, asking again, editing, tools, errors."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import expect

from tests.serve.page_browser import OpenPage, Watched
from tests.serve.page_server import Break, Wait, call

pytest_plugins = ["tests.serve.page_fixtures"]
pytestmark = pytest.mark.browser


def test_question_is_streamed_and_the_request_is_plain(chat: Watched) -> None:
    chat.script.say("Hel", Wait(), "lo", Wait(), usage=(12, 1234, 7))
    chat.ask("  Hi \n there ")
    expect(chat.answers).to_have_text("Hel")
    expect(chat.answers).to_have_class("answer streaming")
    chat.script.release()
    expect(chat.answers.locator(".prose")).to_have_text("Hello")
    chat.script.release()
    chat.settled()
    expect(chat.answers.locator(".figures")).to_contain_text("1,234 tokens")
    expect(chat.answers.locator(".figures")).to_contain_text("12 read")
    expect(chat.answers.locator(".figures")).to_contain_text("7 from the cache")
    expect(chat.page.locator("#announcer")).to_have_text("The answer is complete.")
    expect(chat.questions.locator(".bubble")).to_have_text("Hi \n there")
    assert chat.script.bodies == [
        {
            "messages": [{"role": "user", "content": "Hi \n there"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "model": "qwen-test",
        }
    ]
    assert chat.script.keys == [None]


def test_history_goes_along(chat: Watched) -> None:
    chat.exchange("one", ["1"])
    chat.exchange("two", ["2"])
    assert [(m["role"], m["content"]) for m in chat.script.bodies[1]["messages"]] == [
        ("user", "one"),
        ("assistant", "1"),
        ("user", "two"),
    ]


def test_chinese_and_emoji_arrive_whole_in_pieces_of_one_byte(chat: Watched) -> None:
    text = "床前明月光，疑是地上霜。👩‍👩‍👧‍👦 🏴󠁧󠁢󠁷󠁬󠁳󠁿 𠮷 naïve"
    chat.exchange("背诗", [text[:9], text[9:]], split=1)
    expect(chat.answers.locator(".prose")).to_have_text(text)
    assert "\ufffd" not in chat.page.content()


def test_comments_line_ends_and_unknown_events_are_passed_over(chat: Watched) -> None:
    odd = b': ping\r\n\r\nevent: x\nid: 7\rdata:{"choices":[{"index":0,"delta":{"content":"b"}}]}\r\n\r\n'
    other = b'data: {"choices":[{"index":1,"delta":{"content":"not mine"}}]}\n\n: end\n'
    chat.exchange("q", ["a", odd, other, "c"], split=3)
    expect(chat.answers.locator(".prose")).to_have_text("abc")


# Bytes of a stream, cut at every place into two pieces, and in pieces of one; the events must always be the same.
READ_EVENTS = """async (text) => {
  const { events } = await import("/static/api.js");
  const bytes = new TextEncoder().encode(text);
  const read = async (pieces) => {
    const found = [];
    const start = (stream) => {
      for (const piece of pieces) stream.enqueue(piece);
      stream.close();
    };
    for await (const data of events(new ReadableStream({ start }))) found.push(data);
    return JSON.stringify(found);
  };
  const found = new Set([await read(Array.from(bytes, (_, at) => bytes.slice(at, at + 1)))]);
  for (let at = 0; at <= bytes.length; at += 1) found.add(await read([bytes.slice(0, at), bytes.slice(at)]));
  return [...found].map(JSON.parse);
}"""


def test_events_are_the_same_however_the_bytes_are_cut(chat: Watched) -> None:
    stream = (
        "data: 一\r\ndata:👍🏽\r\n\r\n: ping\ndata: two\rdata: \r\r\n\nid: 1\ndata:  x\n\ndata: not whole\n"
    )
    assert chat.page.evaluate(READ_EVENTS, stream) == [["一\n👍🏽", "two\n", " x"]]


def test_failed_stream_is_closed_by_the_page(chat: Watched) -> None:
    chat.exchange("q", [b'data: {"error": {"message": "NaN in logits"}}\n\n', Wait()])
    expect(chat.page.locator(".problem")).to_contain_text("NaN in logits")
    assert wait_for(lambda: chat.script.disconnects == 1, chat)


def test_stop_keeps_what_is_there_and_closes_the_connection(chat: Watched) -> None:
    chat.script.say("half", Wait(), " rest")
    chat.ask("q")
    expect(chat.answers.locator(".prose")).to_have_text("half")
    chat.button("Stop the answer").click()
    chat.settled()
    expect(chat.answers.locator(".figures")).to_have_text("Stopped")
    expect(chat.page.locator("#prompt")).to_be_focused()
    assert wait_for(lambda: chat.script.disconnects == 1, chat)
    chat.exchange("go on", ["whole"])
    assert chat.script.bodies[1]["messages"][1] == {"role": "assistant", "content": "half"}


def wait_for(condition, chat: Watched) -> bool:  # type: ignore[no-untyped-def]
    """Whether the condition comes true within some seconds; the browser goes on meanwhile."""
    for _ in range(200):
        if condition():
            return True
        chat.page.wait_for_timeout(20)
    return False


def test_escape_stops_and_an_answer_without_text_is_not_sent(chat: Watched) -> None:
    chat.script.say(Wait(), "never")
    chat.ask("q")
    expect(chat.page.locator(".waiting")).to_be_visible()
    chat.page.keyboard.press("Escape")
    chat.settled()
    chat.exchange("again", ["a"])
    assert [m["role"] for m in chat.script.bodies[1]["messages"]] == ["user", "user"]


def test_nothing_is_sent_while_an_answer_is_written(chat: Watched) -> None:
    chat.script.say("a", Wait())
    chat.ask("first")
    expect(chat.answers).to_contain_text("a")
    chat.ask("second")
    expect(chat.page.locator("#prompt")).to_have_value("second")
    expect(chat.button("Edit")).to_have_count(0)
    chat.script.release()
    chat.settled()
    assert len(chat.script.bodies) == 1


def test_regenerate_asks_the_same_again(chat: Watched) -> None:
    chat.exchange("q", ["bad"])
    chat.exchange("r", ["worse"])
    chat.script.say("better")
    expect(chat.button("Answer again")).to_have_count(1)
    chat.button("Answer again").click()
    expect(chat.answers.nth(1).locator(".prose")).to_have_text("better")
    chat.settled()
    assert chat.script.bodies[2] == chat.script.bodies[1]


def test_edit_goes_on_from_the_changed_message(chat: Watched) -> None:
    chat.exchange("first", ["1"])
    chat.exchange("second", ["2"])
    chat.questions.first.hover()
    chat.button("Edit").first.click()
    field = chat.page.get_by_label("Edit the message")
    expect(field).to_be_focused()
    field.fill("changed")
    chat.script.say("new")
    chat.button("Save and send").click()
    expect(chat.answers).to_have_count(1)
    expect(chat.answers.locator(".prose")).to_have_text("new")
    assert chat.script.bodies[-1]["messages"] == [{"role": "user", "content": "changed"}]


def test_edit_can_be_given_up_and_sent_with_enter(chat: Watched) -> None:
    chat.exchange("first", ["1"])
    chat.button("Edit").click()
    chat.page.get_by_label("Edit the message").fill("x")
    chat.page.keyboard.press("Escape")
    expect(chat.questions.locator(".bubble")).to_have_text("first")
    chat.button("Edit").click()
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("line")
    chat.script.say("2")
    chat.page.keyboard.press("Enter")
    expect(chat.questions.locator(".bubble")).to_have_text("first\nline")
    chat.settled()


def test_enter_of_an_input_method_does_not_send(chat: Watched) -> None:
    chat.page.fill("#prompt", "nihao")
    for init in ({"isComposing": True}, {"keyCode": 229}):
        event = {"key": "Enter", "bubbles": True, "cancelable": True, **init}
        chat.page.locator("#prompt").dispatch_event("keydown", event)
    chat.page.keyboard.press("Shift+Enter")
    expect(chat.page.locator("#prompt")).to_have_value("nihao\n")
    assert chat.script.bodies == []


def test_copy_takes_the_source_and_the_code(open_page: OpenPage) -> None:
    chat = open_page(permissions=["clipboard-read", "clipboard-write"])
    chat.exchange("q", ["**bold**\n```js\nlet a = 1;\n```"])
    chat.answers.get_by_role("button", name="Copy", exact=True).click()
    expect(chat.button("Copied")).to_have_count(1)
    assert chat.page.evaluate("navigator.clipboard.readText()") == "**bold**\n```js\nlet a = 1;\n```"
    chat.button("Copy code").click()
    expect(chat.button("Copied")).to_have_count(2)
    assert chat.page.evaluate("navigator.clipboard.readText()") == "let a = 1;"


def test_copy_without_a_clipboard_of_the_browser(chat: Watched) -> None:
    chat.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    chat.exchange("q", ["text"])
    chat.answers.get_by_role("button", name="Copy", exact=True).click()
    expect(chat.button("Copied")).to_be_visible()


TOOLS = json.dumps([{"type": "function", "function": {"name": name}} for name in ("search", "add")])


def test_tool_calls_are_shown_while_they_come_and_answered(chat: Watched) -> None:
    set_tools(chat, TOOLS)
    chat.script.say(
        "I need two numbers.",
        call(0, "", "search", "call_a"),
        call(0, '{"query": "杭州'),
        Wait(),
        call(0, '"}'),
        call(1, '{"a": 1', "add", "call_b"),
        call(1, ', "b": 2}'),
        finish="tool_calls",
    )
    chat.ask("q")
    cards = chat.page.locator(".call")
    expect(cards.locator("pre")).to_have_text('{"query": "杭州')
    expect(cards.locator("textarea")).to_have_count(0)
    chat.script.release()
    chat.settled()
    expect(cards.locator("code")).to_have_text(["search", "add"])
    expect(cards.nth(1).locator("pre")).to_have_text('{ "a": 1, "b": 2 }')
    first = chat.page.get_by_label("Result of search")
    expect(first).to_be_focused()
    first.fill("<b>seven</b>")
    chat.page.get_by_label("Result of add").fill("3")
    chat.script.say("Ten.")
    chat.button("Send results").click()
    expect(chat.answers.nth(1).locator(".prose")).to_have_text("Ten.")
    expect(cards.locator(".call-result pre")).to_have_text(["<b>seven</b>", "3"])
    check_tool_request(chat)


def check_tool_request(chat: Watched) -> None:
    """The second request carries the calls as they came and a result for each."""
    assert [tool["function"]["name"] for tool in chat.script.bodies[0]["tools"]] == ["search", "add"]
    assert chat.script.bodies[0]["tool_choice"] == "auto"
    _, assistant, *results = chat.script.bodies[1]["messages"]
    assert assistant["content"] == "I need two numbers."
    functions = [
        (c["id"], c["function"]["name"], c["function"]["arguments"]) for c in assistant["tool_calls"]
    ]
    assert functions == [
        ("call_a", "search", '{"query": "杭州"}'),
        ("call_b", "add", '{"a": 1, "b": 2}'),
    ]
    assert results == [
        {"role": "tool", "tool_call_id": "call_a", "content": "<b>seven</b>"},
        {"role": "tool", "tool_call_id": "call_b", "content": "3"},
    ]


def set_tools(chat: Watched, source: str) -> None:
    """Writes the functions into the settings."""
    chat.button("Settings").click()
    chat.page.get_by_label("Functions (JSON)").fill(source)
    chat.button("Close settings").click()


def test_calls_without_results_are_left_out_of_the_next_request(chat: Watched) -> None:
    chat.exchange("q", [call(0, "not json {", "search", "call_a")], finish="tool_calls")
    expect(chat.page.locator(".call pre")).to_have_text("not json {")
    chat.exchange("never mind", ["fine"])
    assert [m["role"] for m in chat.script.bodies[1]["messages"]] == ["user", "user"]
    expect(chat.page.locator(".call textarea")).to_have_count(0)


def test_errors_are_told_in_words_and_can_be_retried(chat: Watched) -> None:
    chat.script.say(status=400, message="The prompt has 9000 tokens.")
    chat.ask("q")
    problem = chat.page.get_by_role("alert").filter(has_text="9000")
    expect(problem).to_contain_text("Request req-1")
    chat.script.say(status=429, headers={"retry-after": "7"}, message="Queue full.")
    chat.button("Try again").click()
    expect(chat.page.locator(".problem")).to_contain_text("too many requests waiting. Try again in 7 s.")
    chat.script.say(status=503, message="Loading.")
    chat.button("Try again").click()
    expect(chat.page.locator(".problem")).to_contain_text("loading or shutting down")
    chat.script.say("ok")
    chat.button("Try again").click()
    expect(chat.answers.locator(".prose")).to_have_text("ok")
    expect(chat.page.locator(".problem")).to_have_count(0)
    assert len(chat.script.bodies) == 4


def test_error_inside_a_stream_and_a_cut_stream_keep_the_text(chat: Watched) -> None:
    chat.exchange("q", ["part", b'data: {"error": {"message": "NaN in logits", "code": null}}\n\n', Break()])
    expect(chat.answers.locator(".prose")).to_have_text("part")
    expect(chat.page.locator(".problem")).to_contain_text("NaN in logits")
    chat.exchange("r", ["other", Break()])
    expect(chat.page.locator(".problem").last).to_contain_text("ended before the answer was complete")
    chat.exchange("s", ["x", b"data: no json\n\n"])
    expect(chat.page.locator(".problem")).to_have_count(3)


def test_server_that_is_gone_is_named_and_found_again(chat: Watched) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.page.route("**/health", lambda route: route.abort())
    chat.ask("q")
    expect(chat.page.locator(".problem")).to_contain_text("Is it running?")
    expect(chat.page.locator("#model-state")).to_have_attribute("data-state", "offline")
    chat.page.unroute_all()
    chat.script.say("back")
    chat.button("Try again").click()
    expect(chat.answers.locator(".prose")).to_have_text("back")
    chat.problems[:] = [text for text in chat.problems if "net::ERR_FAILED" not in text]


def test_reader_who_scrolled_up_is_left_there(chat: Watched) -> None:
    chat.script.say("line\n\n" * 60, Wait(), "more\n\n" * 20)
    chat.ask("q")
    scroller = chat.page.locator("#scroller")
    expect(chat.answers.locator("p")).to_have_count(60)
    scroller.evaluate("element => element.scrollTo(0, 0)")
    expect(chat.button("Jump to the end")).to_be_visible()
    chat.script.release()
    chat.settled()
    assert scroller.evaluate("element => element.scrollTop") == 0
    chat.button("Jump to the end").click()
    expect(chat.button("Jump to the end")).to_be_hidden()
    assert scroller.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") <= 1
