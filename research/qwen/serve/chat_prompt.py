"""The prompt of a chat request, and what reads the answer: tools, structured output, plain text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research.qwen.decode.constraints import Constraint
from research.qwen.decode.processors import LogitsProcessor
from research.qwen.errors import PromptError, RequestError
from research.qwen.messages import Message
from research.qwen.serve.chat_choice import ToolParser
from research.qwen.serve.conversation import to_messages
from research.qwen.serve.errors import ApiError
from research.qwen.serve.protocol import ChatRequest
from research.qwen.serve.sampling import refuse, stop_texts
from research.qwen.serve.state import ServerState
from research.qwen.serve.structured import constraint_of, demanded_call, wanted_form
from research.qwen.text.react import ToolChoice, ToolPrompt, build_prompt, tools_from

PLACE = re.compile(r"([A-Za-z_]\w*(?:\[\d+\]|\.\w+)*):")


@dataclass(frozen=True)
class ChatPrompt:
    """Prompt ids, texts that end the answer, and makers of what a choice needs."""

    ids: list[int]
    stop: tuple[str, ...] = ()
    processors: Callable[[int], Sequence[LogitsProcessor]] | None = None
    parser: Callable[[], ToolParser | None] = lambda: None
    echo: str = ""


def chat_prompt(state: ServerState, body: ChatRequest) -> ChatPrompt:
    """Messages and tools of a request as a prompt.

    Raises:
        QwenError, ApiError: what is wrong with them.
    """
    messages = to_messages(body.messages)
    try:
        prompt = _build(state, body, messages)
    except (PromptError, RequestError) as error:
        found = PLACE.match(str(error))
        raise ApiError(400, str(error), param=found.group(1) if found else "messages") from error
    return ChatPrompt(
        ids=prompt.ids,
        stop=tuple(dict.fromkeys((*(stop_texts(body.stop) or ()), *_stops(prompt)))),
        processors=_constraint(state, body, prompt),
        parser=(lambda: None) if prompt.plain else prompt.stream,
        echo=messages[-1].content
        if body.echo and prompt.continued and messages[-1].role == "assistant"
        else "",
    )


def _build(state: ServerState, body: ChatRequest, messages: list[Message]) -> ToolPrompt:
    if body.continue_final_message and body.add_generation_prompt:
        raise refuse("continue_final_message", "cannot be used together with add_generation_prompt")
    tools = tools_from(body.tools, body.functions)
    choice = ToolChoice.parse(body.tool_choice, body.function_call, tools)
    opened = body.add_generation_prompt is not False or bool(body.continue_final_message)
    return build_prompt(
        messages,
        tools,
        choice,
        state.tokenizer,
        parallel=body.parallel_tool_calls is not False and not body.functions,
        add_generation_prompt=opened,
        continue_final=body.continue_final_message,
    )


def _stops(prompt: ToolPrompt) -> tuple[str, ...]:
    """Stop strings of the format; a call whose JSON a grammar holds ends by itself, whatever its texts are."""
    held = prompt.grammar is not None and all(tool.args_format == "json" for tool in prompt.tools)
    return () if held else prompt.stop


def _constraint(state: ServerState, body: ChatRequest, prompt: ToolPrompt) -> Constraint | None:
    if prompt.tools and wanted_form(body) is not None:
        what = "cannot hold an answer that may also be a call: leave tools out, or set tool_choice to none"
        raise refuse("response_format", what)
    if prompt.grammar is not None:
        return demanded_call(state.engine, body, prompt.grammar)
    return constraint_of(state.engine, body)
