"""Constraints over the demo vocabulary: random answers judged by json, re and jsonschema, and what is banned when."""

import json
import re
import sys
import threading
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.decode.constraints import ConstraintCompiler
from research.qwen.decode.loop import GenerationLoop
from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import Sampler
from research.qwen.demo import demo_folder
from research.qwen.errors import RequestError
from research.qwen.text.react_grammar import named_grammar
from research.qwen.text.react_tools import tools_from
from research.qwen.text.tokenizer import QwenTokenizer
from tests.fakes import FakeLM

TOKENIZER = QwenTokenizer(demo_folder() / "qwen.tiktoken")
ROWS = len(TOKENIZER) + 37  # models pad their vocabulary
ENDS = (TOKENIZER.eod_id, TOKENIZER.im_end_id)
COMPILER = ConstraintCompiler(TOKENIZER, ROWS, [*ENDS, ROWS + 5])
CONTROL = {*TOKENIZER.special_tokens.values(), *range(len(TOKENIZER), ROWS)} - set(ENDS)
ORDINARY = [token for token in range(len(TOKENIZER)) if token not in TOKENIZER.special_tokens.values()]
SINGLE = {
    TOKENIZER.decode_bytes([token])[0]: token
    for token in ORDINARY
    if len(TOKENIZER.decode_bytes([token])) == 1
}
CLOSERS = [TOKENIZER.encode(text)[0] for text in '"}],0']


def answer(constraint, seed, *, limit=400):
    """A random answer: (text bytes, True if it ended); no control token is ever allowed inside."""
    rng = np.random.default_rng(seed)
    (processor,), ids = constraint(), [1, 2, 3]
    while len(ids) < limit:
        logits = rng.normal(scale=2.0, size=ROWS)
        logits[CLOSERS] += 6.0  # else a string of random tokens goes on for ever
        allowed = processor(ids, logits.copy()) > -np.inf
        assert not allowed[list(CONTROL)].any() and allowed.any()
        logits[~allowed] = -np.inf
        token = int(logits.argmax())
        if token in ENDS:
            return TOKENIZER.decode_bytes(ids[3:]), True
        ids.append(token)
    return TOKENIZER.decode_bytes(ids[3:]), False


POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -5, "maximum": 30},
        "name": {"type": "string", "maxLength": 9},
    },
    "required": ["x", "name"],
    "additionalProperties": False,
}
SCHEMAS = {
    "point": POINT,
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": ["a", 1, None]}, "next": {"$ref": "#/$defs/node"}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "arrays": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "any of": {"anyOf": [{"type": "null"}, {"const": "你好 😀 <|im_end|>"}, {"type": "number"}]},
    "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]+$", "maxLength": 12},
    "decomposed": {"const": "e\u0301 \u212b"},  # text that the tokenizer would change to NFC
    "nested": {
        "type": "object",
        "properties": {"p": POINT, "q": {"type": "array", "items": POINT, "maxItems": 2}},
        "required": ["p", "q"],
        "additionalProperties": False,
    },
    "everything": True,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_fulfil_their_schema(name):
    constraint = COMPILER.json_schema(SCHEMAS[name])
    finished = 0
    for seed in range(12):
        text, ended = answer(constraint, seed)
        if ended:
            jsonschema.validate(json.loads(text.decode()), SCHEMAS[name])
            finished += 1
    assert finished >= 6


def test_any_object_is_an_object():
    texts = [answer(COMPILER.json_object(), seed) for seed in range(30)]
    values = [json.loads(text.decode()) for text, ended in texts if ended]
    assert len(values) >= 10 and all(isinstance(value, dict) for value in values)
    assert any(value for value in values)


def test_properties_come_in_the_order_of_the_schema():
    text, ended = answer(COMPILER.json_schema(POINT), 0)
    assert ended and list(json.loads(text.decode())) == ["x", "name"]


def fits(constraint, text):
    """Whether the grammar takes the text, byte by byte, and may end there."""
    (processor,), ids = constraint(), [0]
    for byte in [*text.encode(), None]:
        allowed = processor(ids, np.zeros(ROWS)) == 0
        token = ENDS[0] if byte is None else SINGLE[byte]
        if not allowed[token]:
            return False
        ids.append(token)
    return True


def test_json_may_be_indented_but_not_filled_with_blanks():
    value = {"a": [1, {"b": None}], "c": {}, "": "x"}
    for indent in (None, 0, 2, 4):
        assert fits(COMPILER.json_object(), json.dumps(value, indent=indent))
    assert fits(COMPILER.json_object(), json.dumps(value, separators=(",", ":")))
    assert fits(COMPILER.json_object(), '{\r\n\t"a" : 1\r\n}')
    for filled in ('{\n\n"a":1}', '{  "a":1}', '{"a":' + "\n" + " " * 33 + "1}", '{"a":1} '):
        assert not fits(COMPILER.json_object(), filled)


def test_the_arguments_of_a_call_are_one_line():
    [tool] = tools_from([{"type": "function", "function": {"name": "f", "parameters": POINT}}], None)
    hostile = replace(tool, parameters={**tool.parameters, "x-guidance": {"whitespace_pattern": r"\n"}})
    spaced = False
    for grammar in (named_grammar(tool), named_grammar(hostile)):
        for seed in range(12):
            text, ended = answer(COMPILER.lark(grammar), seed)
            assert ended and b"\n" not in text
            assert set(json.loads(text)) == {"x", "name"}
            spaced |= re.search(rb'"x" :|: "', text) is not None
    assert spaced


@pytest.mark.parametrize("pattern", [r"[a-c]{1,4}\d", "(你|好){2,3}", r"a/b\n[/\"]?", "😀+x|龘", r"\w{3}"])
def test_patterns(pattern):
    for seed in range(6):
        text, ended = answer(COMPILER.regex(pattern), seed)
        assert ended and re.fullmatch(pattern, text.decode())


def test_the_dot_of_a_pattern_is_no_newline():
    for seed in range(5):
        assert b"\n" not in answer(COMPILER.regex(".{1,30}"), seed)[0]


def test_choices():
    texts = ["yes", "no", "无", "yes!", 'a "/\\\n', "<|im_end|>", "\x00\x7f", "e\u0301"]
    seen = {answer(COMPILER.choice(texts), seed)[0].decode() for seed in range(60)}
    assert seen <= set(texts) and len(seen) >= 5


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=5))
def test_the_mask_is_exactly_what_can_go_on(letters):
    """For a pattern that forces no text, a token is allowed if and only if some match begins so."""
    pattern, prefix = "[a-d]{0,5}(e|f)", "".join(letters)
    (processor,) = COMPILER.regex(pattern)()
    processor([0], np.zeros(ROWS))
    ids = [0, *(TOKENIZER.encode(letter)[0] for letter in prefix)]
    allowed = processor(ids, np.zeros(ROWS)) == 0
    for token in ORDINARY:
        text = prefix + TOKENIZER.decode_bytes([token]).decode("latin-1")
        begins = re.fullmatch("[a-d]{0,5}[ef]?", text) is not None and len(text) > len(prefix)
        assert allowed[token] == begins, (prefix, text)


def test_only_an_end_follows_a_finished_grammar():
    (processor,) = COMPILER.choice(["no"])()
    ids = [7]
    processor(ids, np.zeros(ROWS))
    ids += TOKENIZER.encode("no")
    for _ in range(3):  # and again, should the caller not stop at an end id
        scores = processor(ids, np.arange(ROWS, dtype=np.float64))
        assert np.flatnonzero(scores > -np.inf).tolist() == sorted(ENDS)
        assert scores[ENDS[0]] == ENDS[0]
        ids.append(ENDS[1])


def test_a_least_length_gives_way_to_a_finished_grammar():
    params = SamplingParams(temperature=0, min_new_tokens=20)
    sampler = Sampler(params, [7], processors=COMPILER.choice(["no"])(), end_ids=ENDS)
    ids = [7]
    while ids[-1] not in ENDS:
        ids.append(sampler.next(np.zeros(ROWS, np.float32), ids)[0])
    assert TOKENIZER.decode(ids[1:-1]) == "no"


def test_a_grammar_of_ones_own():
    schema = json.dumps(POINT)
    constraint = COMPILER.lark(
        f'start: "Action: " ("add" | "find") "\\nAction Input: " args\nargs: %json {schema}\n'
    )
    for seed in range(6):
        text, ended = answer(constraint, seed)
        found = re.fullmatch(r"Action: (add|find)\nAction Input: (.*)", text.decode(), re.DOTALL)
        assert ended and found
        jsonschema.validate(json.loads(found[2]), POINT)


def test_a_grammar_cannot_let_control_tokens_in():
    constraint = COMPILER.lark('start: <|im_start|> | <|extra_0|> | "a"')
    assert [answer(constraint, seed) for seed in range(3)] == [(b"a", True)] * 3


def run_loop(requests, **options):
    """Ids of all choices, run together on a fake model, and how many were preempted."""
    loop = GenerationLoop(FakeLM(vocab_size=ROWS, max_length=96, **options), max_batch=8, prefill_chunk=8)
    answers = {}
    for prompt, params, constraint in requests:
        key = loop.add(prompt, params, ENDS, processors=constraint)
        answers.update({(key, choice): [] for choice in range(params.n)})
    while loop.busy:
        for event in loop.step():
            answers[event.key, event.choice].append(event.token)
    return list(answers.values()), loop.counters.preemptions


def test_answers_do_not_depend_on_batch_mates_or_preemption():
    grammars = [COMPILER.json_schema(POINT), COMPILER.regex("[a-z]{5,20}"), COMPILER.regex("[a-z ]{40,60}")]
    requests = [
        (
            [5, 6, 7, number],
            SamplingParams(seed=number, n=1 + number % 3, max_new_tokens=40),
            grammars[number % 3],
        )
        for number in range(6)
    ]
    together, preemptions = run_loop(requests, num_blocks=18)  # too few for all at once
    alone = [ids for request in requests for ids in run_loop([request], num_blocks=200)[0]]
    assert together == alone and preemptions
    assert len({tuple(ids) for ids in together}) > 6
    assert all(ids[-1] in ENDS or len(ids) == 40 for ids in together)


BAD = [
    ({"properties": {"a": {"items": {"type": "foo"}}}}, r"^place\.properties\.a\.items: Invalid type: foo$"),
    ({"anyOf": [{"type": "string"}, {"minLength": "x", "type": "string"}]}, r"^place\.anyOf\[1\]: Expected"),
    (
        {"$defs": {"n": {"not": {}}}, "$ref": "#/$defs/n"},
        r"^place\.\$defs\.n: Unimplemented keys: \[\"not\"\]",
    ),
    ({"$ref": "#/$defs/missing"}, r"^place: Pointer '/\$defs/missing' does not exist"),
    ({"$ref": "https://example.com/schema"}, r"^place: Resource"),
    ({"$ref": "#"}, r"^place: nothing can fulfil it$"),
    ({"type": "integer", "minimum": 5, "maximum": 1}, r"^place: Unsatisfiable schema"),
    ({"type": "string", "pattern": "(?=a)"}, r"^place: .*look-around"),
    ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, r"^place\.items: .*uniqueItems"),
]


@pytest.mark.parametrize(("schema", "words"), BAD)
def test_bad_schemas_name_the_place(schema, words):
    with pytest.raises(RequestError, match=words) as caught:
        COMPILER.json_schema(schema, place="place")
    assert "\n" not in str(caught.value)


def test_without_strict_what_cannot_be_enforced_is_named():
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 3}
    constraint = COMPILER.json_schema(schema, strict=False)
    assert constraint.warnings == ('Unimplemented keys: ["uniqueItems"]',)
    text, ended = answer(constraint, 0)
    assert ended and isinstance(json.loads(text), list)
    assert COMPILER.json_schema(POINT).warnings == ()
    with pytest.raises(RequestError, match="Invalid type: foo"):
        COMPILER.json_schema({"type": "foo"}, strict=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda c: c.regex("(("), "^regex: .*unclosed group"),
        (lambda c: c.regex("(a{300}){300}"), "^regex must be a pattern of at most"),
        (lambda c: c.choice([]), "^choice must hold 1 to 1000 texts"),
        (lambda c: c.choice("yes"), "^choice must hold"),
        (lambda c: c.choice(["a", ""]), "^choice must hold non-empty texts, got ''"),
        (lambda c: c.choice(["\ud800"]), "^choice must hold non-empty texts"),
        (lambda c: c.choice(["a" * 3000]), "^choice must be"),
        (lambda c: c.lark("start: foo"), '^grammar: .*unknown name: "foo"'),
        (lambda c: c.lark('start: %json {"type": "foo"}'), "^grammar: schema 0: Invalid type: foo"),
        (lambda c: c.lark("start: %json {oops"), "^grammar: "),
        (lambda c: c.lark("#" * 1_000_001), "^grammar has 1000001 characters"),
        (lambda c: ConstraintCompiler(TOKENIZER, ROWS, [ROWS]), "needs an end id"),
    ],
)
def test_errors(make, words):
    with pytest.raises(RequestError, match=words):
        make(COMPILER)


def test_a_grammar_that_becomes_too_complex_fails_in_words():
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(700)}}
    with pytest.raises(RequestError, match=r"^the grammar of the answer is too complex to go on with: "):
        answer(COMPILER.json_schema(wide), 0)


def test_a_token_from_elsewhere_is_an_error():
    (processor,) = COMPILER.choice(["no"])()
    processor([0], np.zeros(ROWS))
    with pytest.raises(RequestError, match="was not drawn from what the grammar of the answer allows"):
        processor([0, TOKENIZER.encode("x")[0]], np.zeros(ROWS))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'qwen-mindspore\[serve\]'"):
        ConstraintCompiler(TOKENIZER, ROWS, ENDS).warm()


def test_compiled_once_and_forgotten_last_used_first():
    compiler = ConstraintCompiler(TOKENIZER, ROWS, ENDS, cached=2)
    first, second = compiler.json_object(), compiler.regex("a")
    assert compiler.json_object() is first
    compiler.regex("b")
    assert compiler.json_object() is first and compiler.regex("a") is not second


def test_threads_share_a_compiler():
    compiler, made, failures = ConstraintCompiler(TOKENIZER, ROWS, ENDS), [], []

    def work(number):
        try:
            made.append(answer(compiler.json_schema(POINT), number)[0])
            answer(compiler.regex(f"a{{{number + 1}}}"), 0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(made) == sorted(answer(COMPILER.json_schema(POINT), number)[0] for number in range(6))
