"""Bodies of /v1/chat/completions and /v1/completions: OpenAI's fields, and what vLLM adds to them.

Unknown fields are ignored, since clients send many that do not concern an answer; a field that asks for something
this server cannot do is refused. Ranges are checked where the values are used (``SamplingParams``), once.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

StopField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
    ),
]
PromptField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                {"type": "null"},
            ]
        }
    ),
]
ContentField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
    ),
]
Object = dict[str, Any]


class Body(BaseModel):
    """Base of request bodies: unknown fields pass unseen."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    """``include_usage`` asks for a last chunk with the token counts; ``continuous_usage_stats`` for them in each."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Body):
    """What both routes take for decoding; None means that the request does not say."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: StopField = None
    stop_token_ids: list[int] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Object | None = None
    structured_outputs: Object | None = None
    guided_json: Object | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    use_beam_search: bool | None = None
    user: str | None = None


class ChatMessage(Body):
    """One message of a conversation."""

    role: str
    content: ContentField = None
    name: str | None = None
    tool_calls: list[Object] | None = None
    tool_call_id: str | None = None
    function_call: Object | None = None


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Object] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Object] | None = None
    function_call: str | Object | None = None
    modalities: list[str] | None = None
    audio: Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: PromptField = None
    logprobs: Annotated[int | None, Field(description="best tokens to report for each token")] = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
