"""The tokenizer in MindFormers' registry: the pure one of ``text`` behind MindFormers' tokenizer interface."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import yaml
from mindformers import MindFormerModuleType, MindFormerRegister
from mindformers.models import PreTrainedTokenizer

from research.qwen.config import read_json
from research.qwen.errors import ConfigError, PromptError, RequestError, VocabularyError
from research.qwen.messages import Message
from research.qwen.text import chatml
from research.qwen.text.tokenizer import QwenTokenizer as PureTokenizer
from research.qwen.text.tokenizer import find_vocab_file
from research.qwen.text.vocabulary import END_OF_TEXT, VOCAB_NAME

SpecialNames = Literal["all"] | Collection[str]
Token = bytes | str  # a control token is its name, any other its bytes

CONFIG_NAME = "tokenizer_config.json"
_SAVED = (
    "errors",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "bos_token",
    "eos_token",
    "pad_token",
)


class _Tokens(list[Token]):
    """Tokens that still know their ids, so that nothing is looked up twice."""

    def __init__(self, tokens: Sequence[Token], ids: list[int]) -> None:
        super().__init__(tokens)
        self.ids = ids


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class QwenTokenizer(PreTrainedTokenizer):
    """Published ids through MindFormers' interface: callable, with padding, truncation, batches and tensors.

    Control tokens in a text are ordinary text unless ``allowed_special`` names them (or is "all"), in ``tokenize``,
    ``encode`` and the call. ``pad``, ``eos`` and ``bos`` are all ``<|endoftext|>``; nothing is added to a text.

    Args:
        vocab_file: path of qwen.tiktoken or a folder with it; None: see text.tokenizer.find_vocab_file.
        extra_vocab_file: an additional vocabulary.
        errors: what becomes of broken UTF-8 in ``decode``: replace, ignore or strict.
    Raises:
        VocabularyError: the vocabulary is missing or corrupt, or a special token is not part of it.
        RequestError: a chat template other than ChatML.
    """

    vocab_files_names: dict[str, str] = {}  # from_pretrained finds it; MindFormers would demand it in YAML
    FILE_LIST = [CONFIG_NAME]
    model_input_names = ["input_ids", "attention_mask"]
    _support_list: list[str] = []

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        extra_vocab_file: str | os.PathLike[str] | None = None,
        errors: str = "replace",
        bos_token: str = END_OF_TEXT,
        eos_token: str = END_OF_TEXT,
        pad_token: str = END_OF_TEXT,
        unk_token: str | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        if chat_template not in (None, chatml.CHAT_TEMPLATE):
            raise RequestError("chat_template: this tokenizer renders ChatML only; leave it out")
        # The base class asks for the vocabulary while it is being initialised.
        self.pure = PureTokenizer(vocab_file or None, extra_vocab_file=extra_vocab_file, errors=errors)
        self.special_tokens = self.pure.special_tokens
        self.eod_id, self.im_start_id, self.im_end_id = (
            self.pure.eod_id,
            self.pure.im_start_id,
            self.pure.im_end_id,
        )
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            chat_template=chatml.CHAT_TEMPLATE,
            **options,
        )
        self.init_kwargs["vocab_file"] = os.fspath(self.pure.vocab_file)
        self.init_kwargs["errors"] = errors

    # ---- size and vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Number of ids: control tokens and an additional vocabulary included."""
        return self.pure.vocab_size

    def __len__(self) -> int:
        return self.pure.vocab_size

    @property
    def errors(self) -> str:
        """How ``decode`` treats broken UTF-8 by default."""
        return self.pure.errors

    @cached_property
    def _ids_of(self) -> dict[Token, int]:
        names = {i: name for name, i in self.special_tokens.items()}
        tokens: dict[Token, int] = {}
        for i in range(self.pure.vocab_size):
            try:
                tokens[names[i] if i in names else self.pure.token_bytes(i)] = i
            except PromptError:
                continue  # an additional vocabulary may leave holes
        return tokens

    def get_vocab(self) -> dict[Token, int]:
        """Token (bytes; control tokens by name) -> id."""
        return dict(self._ids_of)

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        for token in new_tokens or ():
            if str(token) not in self.special_tokens:
                raise VocabularyError(
                    f"{str(token)!r} is not in the vocabulary, and adding tokens is not supported: the model has no "
                    "row for them; use one of <|extra_0|> to <|extra_204|>, or extra_vocab_file"
                )
        return 0

    # ---- text to ids ----

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        *,
        allowed_special: SpecialNames = frozenset(),
        disallowed_special: SpecialNames = frozenset(),
    ) -> list[Token]:
        """Tokens of a text: bytes, and names of the control tokens that were allowed."""
        ids = self.pure.encode(text, allowed_special, disallowed_special)
        if pair is not None:
            ids += self.pure.encode(pair, allowed_special, disallowed_special)
        return _Tokens([self._convert_id_to_token(i) for i in ids], ids)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of tokens (or of one); VocabularyError for a token that does not exist."""
        if isinstance(tokens, _Tokens):
            return tokens.ids
        if tokens is None or isinstance(tokens, bytes | str):
            return None if tokens is None else self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_token_to_id(self, token: Token) -> int:
        known = self.special_tokens.get(token) if isinstance(token, str) else None
        if known is None:
            known = self._ids_of.get(token.encode() if isinstance(token, str) else token)
        if known is None:
            raise VocabularyError(f"there is no token {token!r} in the vocabulary")
        return known

    def _convert_id_to_token(self, index: int) -> Token:
        token = self.pure.token_bytes(int(index))
        return token.decode() if self.eod_id <= index < self.eod_id + len(self.special_tokens) else token

    # ---- ids to text ----

    def convert_tokens_to_string(self, tokens: Sequence[Token]) -> str:
        """Text of tokens as ``tokenize`` returns them."""
        joined = b"".join(token.encode() if isinstance(token, str) else token for token in tokens)
        return joined.decode("utf-8", self.errors)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
    ) -> Any:
        """Text of ids (a list, an array, a Tensor, one id), or the list of texts of several lists."""
        listed = [int(token_ids)] if isinstance(token_ids, Integral) else token_ids
        return super().decode(listed, skip_special_tokens, clean_up_tokenization_spaces, errors=errors)

    def _decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,  # never: it would change what the model said
        errors: str | None = None,
    ) -> str:
        ids = [int(i) for i in token_ids]
        return self.pure.decode(ids, errors, skip_special_tokens)

    # ---- conversations ----

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """ChatML of a list of role and content mappings (or Message values): ids, or text with ``tokenize=False``.

        Without a system message the published default is put first. Contents never yield control ids.
        """
        if chat_template not in (None, chatml.CHAT_TEMPLATE):
            raise RequestError("chat_template: this tokenizer renders ChatML only; leave it out")
        turns = [_as_message(turn) for turn in getattr(conversation, "messages", conversation)]
        if turns and turns[0].role != "system":
            turns.insert(0, Message("system", chatml.DEFAULT_SYSTEM))
        if not tokenize:
            return chatml.render_text(turns, add_generation_prompt=add_generation_prompt)
        ids = chatml.render(turns, self.pure, add_generation_prompt=add_generation_prompt)
        if not (padding or truncation or return_tensors):
            return ids
        return self.prepare_for_model(
            ids,
            add_special_tokens=False,
            padding="max_length" if padding is True else padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            prepend_batch_axis=True,
        )["input_ids"]

    # ---- folders ----

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the vocabulary file into a folder; returns its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + VOCAB_NAME)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or not target.samefile(self.pure.vocab_file):
            shutil.copyfile(self.pure.vocab_file, target)
        return (os.fspath(target),)

    def save_pretrained(
        self,
        save_directory: str,
        save_name: str = "mindspore_model",
        file_format: str = "yaml",
        save_json: bool = False,
    ) -> tuple[str, ...]:
        """Write the vocabulary and ``save_name``.yaml (a processor section, joined with what the file holds), or with
        ``save_json`` (or file_format "json") tokenizer_config.json; ``from_pretrained`` reads both."""
        if file_format not in ("yaml", "json"):
            raise RequestError(f"file_format must be yaml or json, got {file_format!r}")
        if self.pure.extra_vocab_file is not None:
            raise RequestError(
                "a tokenizer with an additional vocabulary is saved by copying both of its files"
            )
        files = self.save_vocabulary(save_directory)
        options = {key: str(value) if "token" in key else value for key, value in self._options().items()}
        if save_json or file_format == "json":
            target = Path(save_directory) / CONFIG_NAME
            values = {
                **options,
                "tokenizer_class": type(self).__name__,
                "chat_template": chatml.CHAT_TEMPLATE,
            }
            target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            target = Path(save_directory) / f"{save_name}.yaml"
            held = yaml.safe_load(target.read_text(encoding="utf-8")) if target.exists() else None
            section = {"type": type(self).__name__, "vocab_file": VOCAB_NAME, **options}
            merged = {**(held or {}), "processor": {"tokenizer": section}}
            target.write_text(yaml.safe_dump(merged, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return (*files, os.fspath(target))

    def _options(self) -> dict[str, Any]:
        values = {key: getattr(self, key, None) for key in _SAVED}
        if values["model_max_length"] and values["model_max_length"] > 10**9:
            values["model_max_length"] = None  # the base class' word for "no limit"
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> QwenTokenizer:
        """Load from a folder: one of save_pretrained, a converted one, or a downloaded Hugging Face folder.

        Raises:
            VocabularyError: no such folder, or no vocabulary in it or anywhere else.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            raise VocabularyError(f"{folder} is not a folder; give the folder that holds {VOCAB_NAME}")
        values = {**_stored_options(folder), **options}
        values.setdefault("vocab_file", find_vocab_file(None, folder))
        return cls(**values)


def _stored_options(folder: Path) -> dict[str, Any]:
    """What the folder's tokenizer_config.json or YAML says, without the keys that are only other code's business."""
    stored: Mapping[str, Any] = {}
    if (folder / CONFIG_NAME).exists():
        stored = read_json(folder / CONFIG_NAME)
    else:
        for file in sorted(folder.glob("*.yaml")):
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
            section = content.get("processor") if isinstance(content, Mapping) else None
            found = section.get("tokenizer") if isinstance(section, Mapping) else None
            if isinstance(found, Mapping):
                stored = found
                break
    return {key: stored[key] for key in _SAVED if isinstance(stored.get(key), str | int)}


def _as_message(turn: Any) -> Message:
    if isinstance(turn, Message):
        return turn
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        raise RequestError(f"a message is a mapping with role and content (both text), got {turn!r}")
    role: Any = turn.get("role")  # the renderer checks it
    return Message(role, turn["content"])
