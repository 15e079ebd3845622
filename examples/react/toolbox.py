"""Tools with what they do: an employee database and a calculator that parses, never evaluates."""

from __future__ import annotations

import ast
import inspect
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from research.qwen.errors import QwenError
from research.qwen.messages import ToolCall
from research.qwen.text.react import Tool

MAX_RESULT = 4000  # characters of an observation
MAX_EXPRESSION = 400  # characters
MAX_DIGITS = 300


class ToolError(QwenError, ValueError):
    """What a tool was asked cannot be done; the message is for the model, which may try again."""


@dataclass(frozen=True)
class BoundTool:
    """A tool and its function, called with the arguments by name; the result is shown as text.

    ``raw_argument``: input that is no JSON object is the value of this argument.
    """

    tool: Tool
    function: Callable[..., str]
    raw_argument: str | None = None


class Toolbox:
    """The tools of an agent by name."""

    def __init__(self, tools: Iterable[BoundTool]):
        self._tools = {bound.tool.name: bound for bound in tools}

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What to tell the model."""
        return tuple(bound.tool for bound in self._tools.values())

    def run(self, call: ToolCall) -> str:
        """Do what the model asks for; mistakes of its become text that says how to mend them."""
        try:
            result = self._run(call)
        except ToolError as error:
            return f"error: {error}"
        return result if len(result) <= MAX_RESULT else f"{result[:MAX_RESULT]} [cut]"

    def _run(self, call: ToolCall) -> str:
        bound = self._tools.get(call.name)
        if bound is None:
            raise ToolError(f"there is no tool {call.name!r}; known are {', '.join(self._tools)}")
        arguments = _arguments(call.arguments, bound)
        try:
            inspect.signature(bound.function).bind(**arguments)
        except TypeError as error:
            raise ToolError(f"{call.name}: {error}") from None
        return bound.function(**arguments)


def _arguments(text: str, bound: BoundTool) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        if bound.raw_argument is None:
            raise ToolError(f"{bound.tool.name}: the input is not valid JSON ({error})") from None
        return {bound.raw_argument: _without_fence(text)}
    if isinstance(value, dict):
        return value
    if bound.raw_argument is None:
        raise ToolError(f"{bound.tool.name}: the input must be a JSON object")
    return {bound.raw_argument: value if isinstance(value, str) else text}


def _without_fence(text: str) -> str:
    """Code without the triple backticks around it."""
    lines = text.strip().splitlines()
    fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if fenced else text


# ---- employee database ----


@dataclass(frozen=True)
class Employee:
    """One row; ``salary`` is per month."""

    name: str
    department: str
    role: str
    salary: int


EMPLOYEES: Final = (
    Employee("张伟", "研发部", "工程师", 18000),
    Employee("李娜", "研发部", "架构师", 26000),
    Employee("王芳", "市场部", "经理", 21000),
    Employee("Maria Rossi", "Sales", "manager", 23500),
    Employee("John Smith", "Sales", "representative", 12800),
)


def employee_database(employees: Iterable[Employee] = EMPLOYEES) -> BoundTool:
    """Looks up employees by name or department."""
    rows = tuple(employees)

    def look_up(name: str = "", department: str = "") -> str:
        wanted = {"name": str(name).casefold(), "department": str(department).casefold()}
        found = [
            asdict(row)
            for row in rows
            if all(value in getattr(row, key).casefold() for key, value in wanted.items())
        ]
        if not found:
            raise ToolError(
                f"nobody found; departments are {', '.join(dict.fromkeys(r.department for r in rows))}"
            )
        return json.dumps(found, ensure_ascii=False)

    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "name of the employee, or a part of it"},
            "department": {"type": "string", "description": "all employees of this department"},
        },
    }
    description = "Finds employees of the company with department, role and monthly salary."
    return BoundTool(Tool("employee_database", description, schema, "employee database"), look_up)


# ---- calculator ----

_OPERATORS: Final[Mapping[type, Callable[..., Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "round": round,
    **{
        name: getattr(math, name)
        for name in ("sqrt", "exp", "log", "log10", "sin", "cos", "tan", "floor", "ceil")
    },
}
_CONSTANTS: Final = {"pi": math.pi, "e": math.e}
_SIGNS: Final = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "（": "(", "）": ")", "，": ","})  # noqa: RUF001


def calculator() -> BoundTool:
    """Computes with numbers: + - * / // % **, parentheses and a few functions."""
    schema = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "for example (18000 + 26000) * 12"}},
        "required": ["expression"],
    }
    description = "Computes an arithmetic expression exactly."
    return BoundTool(Tool("calculator", description, schema), calculate, raw_argument="expression")


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text.

    Only numbers, operators, a few functions and constants are understood; nothing is ever evaluated as code.

    Raises:
        ToolError: anything else, a division by zero, or a number of more than ``MAX_DIGITS`` digits.
    """
    if not isinstance(expression, str) or len(expression) > MAX_EXPRESSION:
        raise ToolError(f"calculator: expected an expression of at most {MAX_EXPRESSION} characters")
    try:
        value = _value(ast.parse(expression.translate(_SIGNS).strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ToolError(f"calculator: {expression!r} is not an arithmetic expression") from None
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ToolError(f"calculator: {error}") from None
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> int | float:
    result: Any
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            result = number
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            result = _binary(op, _value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            result = _FUNCTIONS[name](*(_value(argument) for argument in arguments))
        case _:
            raise ToolError(f"calculator: {ast.unparse(node)!r} is not understood; write numbers as 1000.5")
    if isinstance(result, complex) or (isinstance(result, int) and abs(result) >= 10**MAX_DIGITS):
        raise ToolError(f"calculator: the result is not a real number of at most {MAX_DIGITS} digits")
    return float(result) if isinstance(result, float) else int(result)


def _binary(op: ast.operator, left: int | float, right: int | float) -> Any:
    # A power of whole numbers is checked before it is computed: it may have billions of digits.
    whole = isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int) and abs(left) > 1
    if whole and abs(right) * math.log10(abs(left)) > MAX_DIGITS:
        raise ToolError(f"calculator: the result has more than {MAX_DIGITS} digits")
    return _OPERATORS[type(op)](left, right)
