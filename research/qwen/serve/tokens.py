"""/tokenize, /detokenize, /tokenizer_info, /apply-template: the vocabulary over HTTP, as other servers offer it.

Unlike in a chat, the names of control tokens in a text become their ids here unless the request says otherwise:
clients ask for the id of the end token in this way.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import StrictInt

from research.qwen.chat_template import CHAT_TEMPLATE
from research.qwen.serve.chat_prompt import chat_prompt
from research.qwen.serve.errors import ApiError
from research.qwen.serve.protocol import Body, ChatMessage, ChatRequest, Object
from research.qwen.serve.state import ServerState
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.text.vocabulary import END_OF_TEXT, IM_END

router = APIRouter()

CHAT_FIELDS = {"messages", "tools", "tool_choice", "add_generation_prompt", "continue_final_message"}

# No ``async`` below: these run in worker threads, since a long text takes its time.


class TemplateRequest(ChatRequest):
    """Body of POST /apply-template: what a chat request says of its prompt; the rest of it is ignored."""


class TokenizeRequest(Body):
    """Body of POST /tokenize: ``prompt``, or ``messages`` with what else a chat request says of its prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Object] | None = None
    tool_choice: str | Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None  # without effect: the models know no token before a text
    parse_special: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[StrictInt]


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
        chat = ChatRequest.model_validate(body.model_dump(include=CHAT_FIELDS))
        ids = chat_prompt(state, chat).ids
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
    """The prompt of a chat request as text, to be read: a text cannot keep contents and control tokens apart."""
    state: ServerState = request.app.state.qwen
    state.check_model(body.model)
    return {"prompt": state.tokenizer.decode(chat_prompt(state, body).ids)}


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
