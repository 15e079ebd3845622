"""Answers held to a form: ``response_format``, vLLM's fields for the same, and calls that are demanded."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from research.qwen.decode.constraints import Constraint, ConstraintCompiler
from research.qwen.engine import Engine
from research.qwen.errors import RequestError
from research.qwen.serve.errors import ApiError
from research.qwen.serve.protocol import SamplingFields
from research.qwen.serve.sampling import refuse

Kind = Literal["json_object", "json", "regex", "choice"]
KINDS: tuple[Kind, ...] = ("json", "regex", "choice")

_compilers: WeakKeyDictionary[Engine, ConstraintCompiler] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class Form:
    """A form of the answer: ``value`` is a JSON schema, a regex or texts; ``param`` the field it came in."""

    kind: Kind
    param: str
    value: Any = None
    strict: bool = False


def compiler_of(engine: Engine) -> ConstraintCompiler:
    """The compiler for the engine's vocabulary; made once. ``warm`` it in a thread when a server starts.

    Raises:
        RequestError: the engine has no vocabulary.
    """
    if engine.tokenizer is None:
        raise RequestError("structured answers need a vocabulary, and this model was loaded without one")
    with _lock:
        if engine not in _compilers:
            _compilers[engine] = ConstraintCompiler(engine.tokenizer, engine.lm.vocab_size, engine.eos_ids)
        return _compilers[engine]


def constraint_of(engine: Engine, body: SamplingFields) -> Constraint | None:
    """What holds the answer to the form that the request asks for; None for free text. May take a second.

    Raises:
        ApiError: 400 for an unknown form, more than one, or one that cannot be enforced; names the field.
    """
    form = wanted_form(body)
    return None if form is None else _compiled(engine, body, form.param, lambda made: _compile(made, form))


def demanded_call(engine: Engine, body: SamplingFields, grammar: str) -> Constraint:
    """What holds the answer to a call, by a grammar of ``text.react``. Raises as ``constraint_of``."""
    return _compiled(engine, body, "tools", lambda made: made.lark(grammar, place="tools"))


def _compiled(
    engine: Engine, body: SamplingFields, param: str, work: Callable[[ConstraintCompiler], Constraint]
) -> Constraint:
    if body.ignore_eos:
        raise refuse("ignore_eos", f"cannot be used together with {param}: a finished form has to end")
    try:
        return work(compiler_of(engine))
    except RequestError as error:
        raise ApiError(400, str(error), param=param) from error


def _compile(compiler: ConstraintCompiler, form: Form) -> Constraint:
    if form.kind == "json":
        return compiler.json_schema(form.value, strict=form.strict, place=form.param)
    if form.kind == "regex":
        return compiler.regex(form.value, place=form.param)
    if form.kind == "choice":
        return compiler.choice(form.value, place=form.param)
    return compiler.json_object()


def wanted_form(body: SamplingFields) -> Form | None:
    """The form a request asks for; None for free text.

    Raises:
        ApiError: 400 for an unknown form, or more than one.
    """
    forms = [form for form in (_response_format(body.response_format), *_extras(body)) if form is not None]
    if len(forms) > 1:
        raise refuse(forms[1].param, f"cannot be used together with {forms[0].param}")
    return forms[0] if forms else None


def _response_format(value: Mapping[str, Any] | None) -> Form | None:
    if value is None or value.get("type") == "text":
        return None
    if value.get("type") == "json_object":
        return Form("json_object", "response_format")
    if value.get("type") != "json_schema":
        what = f"is {value.get('type')!r}; use text, json_object or json_schema"
        raise refuse("response_format.type", what)
    where, inner = "response_format.json_schema", value.get("json_schema")
    if not isinstance(inner, Mapping):
        raise refuse(where, "must be an object with name and schema")
    schema = inner.get("schema", {})
    if not isinstance(schema, Mapping | bool):
        raise refuse(f"{where}.schema", "must be a JSON schema (an object)")
    return Form("json", f"{where}.schema", schema, bool(inner.get("strict")))


def _extras(body: SamplingFields) -> list[Form | None]:
    """``structured_outputs`` and the older ``guided_...`` fields."""
    given = body.structured_outputs or {}
    nested = {kind: given.get(kind) for kind in KINDS}
    nested["json_object"] = given.get("json_object") or None
    if given.get("grammar") is not None or body.guided_grammar is not None:
        param = "guided_grammar" if body.guided_grammar is not None else "structured_outputs.grammar"
        raise refuse(
            param, "is not supported: a grammar may cost any amount of time; use a schema or a regex"
        )
    forms = [_form(kind, value, f"structured_outputs.{kind}") for kind, value in nested.items()]
    older = {kind: getattr(body, f"guided_{kind}") for kind in KINDS}
    return forms + [_form(kind, value, f"guided_{kind}") for kind, value in older.items()]


def _form(kind: Any, value: Any, param: str) -> Form | None:
    if value is None:
        return None
    if kind == "json":
        value = _schema(value, param)
    elif kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise refuse(param, "must be a list of strings")
    elif kind == "regex" and not (isinstance(value, str) and value):
        raise refuse(param, "must be a non-empty string")
    return Form(kind, param, value)


def _schema(value: Any, param: str) -> Mapping[str, Any] | bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ApiError(400, f"{param} is not valid JSON: {error}", param=param) from error
    if not isinstance(value, Mapping | bool):
        raise refuse(param, "must be a JSON schema (an object)")
    return value
