"""/tokenize, /detokenize, /tokenizer_info, /apply-template: the vocabulary over HTTP, as other servers offer it.

Unlike in a chat, the names of control tokens in a text become their ids here unless the request says otherwise:
clients ask for the id of the end token in this way.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, StrictInt

from research.qwen.chat_template import CHAT_TEMPLATE
from research.qwen.errors import RequestError
from research.qwen.messages import Message
from research.qwen.serve.errors import ApiError
from research.qwen.serve.state import ServerState
from research.qwen.text import chatml
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.text.vocabulary import END_OF_TEXT, IM_END

router = APIRouter()

ROLES = {"developer": "system", "function": "tool"}


class TextPart(BaseModel):
    """A part of a message's content."""

    type: str
    text: str | None = None


class PlainMessage(BaseModel):
    """A message without tools."""

    role: str
    content: str | list[TextPart] | None = None


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[PlainMessage] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None  # without effect: the models know no token before a text
    parse_special: bool = True
    return_token_strs: bool | None = None


class TemplateRequest(BaseModel):
    """Body of POST /apply-template."""

    model: str | None = None
    messages: list[PlainMessage]
    add_generation_prompt: bool = True


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[StrictInt]


# No ``async``: these run in worker threads, since a long text takes its time.
@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
def tokenize(request: Request, body: TokenizeRequest) -> dict[str, Any]:
    """Token ids of a prompt or of a conversation."""
    state: ServerState = request.app.state.qwen
    state.check_model(body.model)
    tokenizer = state.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        ids = tokenizer.encode(body.prompt, allowed_special="all" if body.parse_special else ())
    else:
        turns = _conversation(body.messages or [])
        ids = chatml.render(turns, tokenizer, add_generation_prompt=body.add_generation_prompt)
    answer = {"count": len(ids), "max_model_len": state.engine.lm.max_length, "tokens": ids}
    strings = [token_text(tokenizer, i) for i in ids] if body.return_token_strs else None
    return {**answer, "token_strs": strings}


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
def detokenize(request: Request, body: DetokenizeRequest) -> dict[str, str]:
    """Text of token ids, control tokens as their names."""
    state: ServerState = request.app.state.qwen
    state.check_model(body.model)
    return {"prompt": state.tokenizer.decode(body.tokens)}


@router.get("/tokenizer_info")
@router.get("/v1/tokenizer_info", include_in_schema=False)
def tokenizer_info(request: Request) -> dict[str, Any]:
    """What evaluation clients need to know of the vocabulary."""
    state: ServerState = request.app.state.qwen
    tokenizer = state.tokenizer
    chat = state.engine.chat_format == "chatml"
    return {
        "tokenizer_class": "QWenTokenizer",
        "vocab_size": len(tokenizer),
        "model_max_length": state.engine.lm.max_length,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "eos_token_id": tokenizer.eod_id,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "stop_tokens": [IM_END, END_OF_TEXT] if chat else [END_OF_TEXT],
        "chat_template": CHAT_TEMPLATE if chat else None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }


@router.post("/apply-template")
def apply_template(request: Request, body: TemplateRequest) -> dict[str, str]:
    """A conversation as the text of its prompt, to be read: a text cannot keep contents and control tokens apart."""
    state: ServerState = request.app.state.qwen
    state.check_model(body.model)
    turns = _conversation(body.messages)
    return {"prompt": chatml.render_text(turns, add_generation_prompt=body.add_generation_prompt)}


@router.get("/props")
def props(request: Request) -> dict[str, Any]:
    """The few properties that clients of llama.cpp ask for."""
    state: ServerState = request.app.state.qwen
    return {
        "default_generation_settings": {"n_ctx": state.engine.lm.max_length},
        "model_alias": state.model_name,
        "chat_template": CHAT_TEMPLATE if state.engine.chat_format == "chatml" else None,
    }


def token_text(tokenizer: QwenTokenizer, token: int) -> str:
    r"""Text of one token; bytes that are no whole characters as ``bytes:\xe6\xa0``."""
    piece = tokenizer.token_bytes(token)
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _conversation(messages: list[PlainMessage]) -> list[Message]:
    turns = [_turn(message, place) for place, message in enumerate(messages)]
    if not turns:
        raise ApiError(400, "messages is empty; give at least one", param="messages")
    return turns if turns[0].role == "system" else [Message("system", chatml.DEFAULT_SYSTEM), *turns]


def _turn(message: PlainMessage, place: int) -> Message:
    content = message.content
    if isinstance(content, list):
        other = next((part.type for part in content if part.type != "text" or part.text is None), None)
        if other is not None:
            raise ApiError(400, "only text parts are possible here", param=f"messages[{place}].content")
        content = "".join(part.text or "" for part in content)
    role: Any = ROLES.get(message.role, message.role)
    if role not in ("system", "user", "assistant", "tool"):
        raise RequestError(f"messages[{place}].role is unknown; use system, user, assistant or tool")
    return Message(role, content or "")
