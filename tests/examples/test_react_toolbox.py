"""The tools of the example: what they answer, and that text of a model can do no harm with them."""

from __future__ import annotations

import json

import pytest

from examples.react.toolbox import (
    MAX_EXPRESSION,
    MAX_RESULT,
    BoundTool,
    Toolbox,
    ToolError,
    calculate,
    calculator,
    employee_database,
)
from research.qwen.messages import ToolCall
from research.qwen.text.react import Tool

TOOLBOX = Toolbox([employee_database(), calculator()])


def _run(name: str, arguments: str) -> str:
    return TOOLBOX.run(ToolCall("call_0", name, arguments))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("18000 + 26000", "44000"),
        ("(1+2)*3 - -4", "13"),
        ("7/2", "3.5"),
        ("7//2 + 7%4", "6"),
        ("2**100", str(2**100)),
        ("2^10", "1024"),
        ("0.1+0.2", "0.3"),
        ("（18000＋1）×2".replace("＋", "+"), "36002"),
        ("100 ÷ 8 − 0.5", "12"),
        ("round(max(1.26, 1), 1) + sqrt(16) + abs(-1)", "6.3"),
        ("2 * pi", "6.28318530718"),
        ("1e308", "1e+308"),
        ("(-1) ** 1000000", "1"),
        ("2 ** -2", "0.25"),
    ],
)
def test_calculator(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__",
        "open('/etc/passwd').read()",
        "(lambda: 1)()",
        "[x for x in (1, 2)]",
        "calculate",
        "max(1, key=abs)",
        "max(*(1, 2))",
        "1 if 1 else 2",
        "True + 1",
        "'a' * 3",
        "1j",
        "(-8) ** 0.5",
        "1 < 2",
        "f'{1}'",
        "x := 3",
        "1 +",
        "",
        "1\x00",
        "1, 2",
    ],
)
def test_the_calculator_only_calculates(expression: str) -> None:
    with pytest.raises(ToolError, match="calculator"):
        calculate(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "9**(9**9)",
        "(9**99)**99",
        "10**299 * 10**299",
        "10.0 ** 999",
        "2.0 ** (10**200)",
        "1/0",
        "5 % 0",
        "log(0)",
        "round(1, 2, 3)",
        "floor(1e999)",
        "(" * 150 + ")" * 150,
        "-" * MAX_EXPRESSION + "1",
        "1" * (MAX_EXPRESSION - 1),
    ],
)
def test_the_calculator_stays_small(expression: str) -> None:
    with pytest.raises(ToolError, match="calculator"):
        calculate(expression)


def test_employees_are_found_by_name_and_department() -> None:
    found = json.loads(_run("employee_database", '{"department": "研发部"}'))
    assert [row["name"] for row in found] == ["张伟", "李娜"]
    assert json.loads(_run("employee_database", '{"name": "maria"}'))[0]["salary"] == 23500
    assert len(json.loads(_run("employee_database", "{}"))) == 5
    assert _run("employee_database", '{"department": "legal"}') == (
        "error: nobody found; departments are 研发部, 市场部, Sales"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("weather", "{}", "error: there is no tool 'weather'; known are employee_database, calculator"),
        ("employee_database", "{'name': 1}", "error: employee_database: the input is not valid JSON"),
        ("employee_database", "[]", "error: employee_database: the input must be a JSON object"),
        (
            "employee_database",
            '{"salary": 3}',
            "error: employee_database: got an unexpected keyword argument 'salary'",
        ),
        ("calculator", "{}", "error: calculator: missing a required argument: 'expression'"),
        ("calculator", '{"expression": 3}', "error: calculator: expected an expression"),
        ("calculator", '{"expression": "1+1"}', "2"),
        ("calculator", "1 + 1", "2"),
        ("calculator", '"1 + 1"', "2"),
        ("calculator", "3", "3"),
    ],
)
def test_mistakes_of_the_model_become_observations(name: str, arguments: str, answer: str) -> None:
    assert _run(name, arguments).startswith(answer)


def test_long_results_are_cut() -> None:
    toolbox = Toolbox([BoundTool(Tool("long"), lambda: "x" * (MAX_RESULT + 1))])
    assert toolbox.run(ToolCall("a", "long", "{}")) == "x" * MAX_RESULT + " [cut]"
