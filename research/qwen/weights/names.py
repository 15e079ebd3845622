"""The closed table of tensors: every name a Qwen checkpoint may hold and its shape. Nothing else is read or
written.

MindSpore parameters carry the published names and layouts (n_out, n_in). The former MindFormers port of Qwen
had names of its own; they are accepted on reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.weights.dtypes import FLOATS

Shape = tuple[int, ...]
SHOWN = 3  # how many names an error spells out


@dataclass(frozen=True)
class Template:
    """One kind of tensor. ``{n}`` in a name is the layer number.

    ``former`` names the tensors of the former port that make it up, joined along the first axis in this
    order.
    """

    published: str
    mindspore: str
    shape: Callable[[QwenConfig], Shape]
    former: tuple[str, ...]


def _same(name: str, shape: Callable[[QwenConfig], Shape], *former: str) -> Template:
    return Template(name, name, shape, former)


_QKV = ("wq", "wk", "wv")
_OLD_LAYER = "transformer.layers.{n}"
TABLE: tuple[Template, ...] = (
    _same(
        "transformer.wte.weight",
        lambda c: (c.vocab_size, c.hidden_size),
        "transformer.wte.embedding_weight",
    ),
    _same("transformer.h.{n}.ln_1.weight", lambda c: (c.hidden_size,), f"{_OLD_LAYER}.attention_norm.weight"),
    _same(
        "transformer.h.{n}.attn.c_attn.weight",
        lambda c: (3 * c.hidden_size, c.hidden_size),
        *(f"{_OLD_LAYER}.attention.{part}.weight" for part in _QKV),
    ),
    _same(
        "transformer.h.{n}.attn.c_attn.bias",
        lambda c: (3 * c.hidden_size,),
        *(f"{_OLD_LAYER}.attention.{part}.bias" for part in _QKV),
    ),
    _same(
        "transformer.h.{n}.attn.c_proj.weight",
        lambda c: (c.hidden_size, c.hidden_size),
        f"{_OLD_LAYER}.attention.wo.weight",
    ),
    _same("transformer.h.{n}.ln_2.weight", lambda c: (c.hidden_size,), f"{_OLD_LAYER}.ffn_norm.weight"),
    _same(
        "transformer.h.{n}.mlp.w1.weight",
        lambda c: (c.mlp_width, c.hidden_size),
        f"{_OLD_LAYER}.feed_forward.w1.weight",
    ),
    _same(
        "transformer.h.{n}.mlp.w2.weight",
        lambda c: (c.mlp_width, c.hidden_size),
        f"{_OLD_LAYER}.feed_forward.w3.weight",
    ),
    _same(
        "transformer.h.{n}.mlp.c_proj.weight",
        lambda c: (c.hidden_size, c.mlp_width),
        f"{_OLD_LAYER}.feed_forward.w2.weight",
    ),
    _same("transformer.ln_f.weight", lambda c: (c.hidden_size,), "transformer.ln_f.weight"),
    _same("lm_head.weight", lambda c: (c.vocab_size, c.hidden_size), "lm_head.weight"),
)

# Buffers that early releases saved: masks and rotary tables, computed anew here. Read over on purpose.
DROPPED: tuple[str, ...] = (
    "transformer.h.{n}.attn.bias",
    "transformer.h.{n}.attn.masked_bias",
    "transformer.h.{n}.attn.logn_tensor",
    "transformer.h.{n}.attn.rotary_emb.inv_freq",
    "transformer.rotary_emb.inv_freq",
)
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_BY_PUBLISHED = {template.published: template for template in TABLE}
_BY_MINDSPORE = {template.mindspore: template for template in TABLE}
_FORMER = {old: template for template in TABLE for old in template.former}
_FORMER_ONLY = frozenset(_FORMER) - frozenset(_BY_PUBLISHED)


class TensorList(Protocol):
    """What ``check`` needs of a checkpoint (readers.Checkpoint is one)."""

    def names(self) -> list[str]:
        """Tensor names as published."""

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""

    def dtype(self, name: str) -> str:
        """Format of a tensor's numbers."""


def expected(config: QwenConfig) -> dict[str, Shape]:
    """Published name -> shape of every tensor of a model, in the order of the computation."""
    layers = [template for template in TABLE if "{n}" in template.published]
    out = {TABLE[0].published: TABLE[0].shape(config)}
    for n in range(config.num_layers):
        out.update({template.published.format(n=n): template.shape(config) for template in layers})
    out.update({t.published: t.shape(config) for t in TABLE[1:] if "{n}" not in t.published})
    return out


def to_mindspore(published: str) -> str:
    """MindSpore's parameter name of a published name; CheckpointError if the table does not hold it."""
    pattern, n = _split(published)
    if pattern not in _BY_PUBLISHED:
        raise CheckpointError(f"{published} is not a tensor of this model family")
    return _BY_PUBLISHED[pattern].mindspore.format(n=n)


def to_published(mindspore: str) -> str:
    """Published name of a MindSpore parameter name; CheckpointError if the table does not hold it."""
    pattern, n = _split(mindspore)
    if pattern not in _BY_MINDSPORE:
        raise CheckpointError(f"{mindspore} is not a parameter of this model family")
    return _BY_MINDSPORE[pattern].published.format(n=n)


def is_dropped(name: str) -> bool:
    """Whether a name is one of the buffers that are read over."""
    return _split(name)[0] in DROPPED


def is_former(names: Iterable[str]) -> bool:
    """Whether a checkpoint carries the names of the former MindFormers port."""
    return any(_split(name)[0] in _FORMER_ONLY for name in names)


def former_parts(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Published name -> the tensors of the former port to join for it; a name unknown there stands for
    itself."""
    parts: dict[str, tuple[str, ...]] = {}
    for name in names:
        pattern, n = _split(name)
        template = _FORMER.get(pattern)
        if template is None:
            parts[name] = (name,)
        else:
            parts[template.published.format(n=n)] = tuple(old.format(n=n) for old in template.former)
    return parts


def check(checkpoint: TensorList, config: QwenConfig) -> None:
    """Compare names, shapes and formats with the table; CheckpointError names what is missing, unexpected or
    wrong."""
    want, have = expected(config), checkpoint.names()
    quantised = [name for name in have if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    if quantised:
        raise CheckpointError(
            f"the checkpoint is quantised (GPTQ or ours: {quantised[0]}, {len(quantised)} such tensors); this needs "
            "the unquantised one"
        )
    problems = []
    missing = [name for name in want if name not in set(have)]
    if missing:
        problems.append(f"{_listed(missing)} missing")
    unexpected = [name for name in have if name not in want]
    if unexpected:
        problems.append(f"{_listed(unexpected)} unexpected")
    shapes = {name: checkpoint.shape(name) for name in have if name in want}
    problems += _shape_problems({n: s for n, s in shapes.items() if s != want[n]}, want)
    strange = [name for name in shapes if checkpoint.dtype(name) not in FLOATS]
    if strange:
        problems.append(
            f"{_listed(strange)} of type {checkpoint.dtype(strange[0])}, expected {', '.join(FLOATS)}"
        )
    if problems:
        raise CheckpointError(
            f"checkpoint does not fit its config ({config.num_layers} layers, hidden {config.hidden_size}, "
            f"vocabulary {config.vocab_size}): {'; '.join(problems)}"
        )


def _shape_problems(wrong: Mapping[str, Shape], want: Mapping[str, Shape]) -> list[str]:
    if not wrong:
        return []
    shown = ", ".join(
        f"{name} is {shape}, expected {want[name]}" for name, shape in list(wrong.items())[:SHOWN]
    )
    return [f"{_count(len(wrong))} of wrong shape: {shown}{', ...' if len(wrong) > SHOWN else ''}"]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{_count(len(names))} ({shown}{', ...' if len(names) > SHOWN else ''})"


def _count(number: int) -> str:
    return f"{number} tensor{'s' if number != 1 else ''}"


def _split(name: str) -> tuple[str, int]:
    """``transformer.h.3.ln_1.weight`` -> (``transformer.h.{n}.ln_1.weight``, 3); other names unchanged."""
    found = _NUMBER.search(name)
    if found is None or found.group() != str(int(found.group())):
        return name, -1
    return f"{name[: found.start()]}{{n}}{name[found.end() :]}", int(found.group())
