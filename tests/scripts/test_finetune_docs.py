"""docs/finetune.md and its translation say what the programs say: commands and options."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

PAGES = {"en": "finetune.md", "zh": "finetune_zh.md"}


@pytest.fixture(params=PAGES)
def page(request, repository):
    return request.param, (repository / "docs" / PAGES[request.param]).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Shell commands of the page, comments and line breaks taken out."""
    blocks = re.findall(r"```shell\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.split("#")[0].strip()]


def test_both_pages_have_the_same_commands(repository):
    pages = [(repository / "docs" / name).read_text(encoding="utf-8") for name in PAGES.values()]
    first, second = map(commands, pages)
    assert first == second and len(first) > 12


def test_commands_of_the_page_parse(page):
    """Every command names a subcommand and options that exist."""
    found = 0
    for line in commands(page[1]):
        words = shlex.split(line)
        if words[:3] == ["python", "-m", "research.qwen.cli"]:
            if words[3] == "convert":  # a door to weights/command.py, tested there
                continue
            module = importlib.import_module(f"research.qwen.cli.{words[3]}")
            module.build_parser().parse_args(words[4:])
            found += 1
    assert found >= 8


def test_options_in_the_text_exist(page):
    parsers = (
        importlib.import_module(f"research.qwen.cli.{name}").build_parser() for name in ("finetune", "serve")
    )
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {"--extra", "--config", "--model"}
    named = set(re.findall(r"`(--[a-z][a-z-]+)", page[1]))
    assert len(named) > 8 and named <= known, named - known
