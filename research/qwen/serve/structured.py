"""Which form a request wants its answer in: ``response_format`` and vLLM's fields for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from research.qwen.serve.errors import ApiError
from research.qwen.serve.protocol import SamplingFields
from research.qwen.serve.sampling import refuse

Kind = Literal["json_object", "json", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")


@dataclass(frozen=True)
class Form:
    """A form of the answer: ``value`` is a JSON schema, a regex, texts or a grammar; ``param`` the field it came in."""

    kind: Kind
    param: str
    value: Any = None
    strict: bool = False


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
    elif kind in ("regex", "grammar") and not (isinstance(value, str) and value):
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
