"""Adapters in the loop: a cached block is only ever used with the adapter it was written with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from research.qwen.decode.blocks import root_hash
from research.qwen.decode.loop import Chunk, GenerationLoop
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import RequestError
from tests.fakes import FakeLM

PROMPT = list(range(1, 14))
PARAMS = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)


class AdapterLM(FakeLM):
    """FakeLM whose answers depend on the adapter, and which refuses a cache written with another one."""

    adapters = ("one", "two")

    def __init__(self, **options: int):
        super().__init__(**options)
        self.writer = np.full(len(self.cache), "?", object)

    def forward(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """As FakeLM's, turned by the number of the adapter."""
        rows = super().forward(chunks)
        out, first = [], 0
        for chunk in chunks:
            slots = self._slots(chunk, chunk.start + len(chunk.ids))
            self.writer[slots[chunk.start :]] = chunk.adapter
            assert (self.writer[slots] == chunk.adapter).all(), "keys of another adapter"
            turn = ("", *self.adapters).index(chunk.adapter)
            out.append(np.roll(rows[first : first + chunk.logits], turn, axis=1))
            first += chunk.logits
        return np.concatenate(out)


def answers(loop: GenerationLoop, names: Sequence[str], **options: str) -> list[list[int]]:
    """The tokens of one request for each adapter, all in the loop at once."""
    keys = [loop.add(PROMPT, PARAMS, adapter=name, **options) for name in names]
    got: dict[int, list[int]] = {key: [] for key in keys}
    while loop.busy:
        for event in loop.step():
            got[event.key].append(event.token)
    return [got[key] for key in keys]


@pytest.mark.parametrize("num_blocks", [64, 9])
def test_no_block_is_shared_between_adapters(num_blocks: int) -> None:
    names = ["one", "", "two", "one", "", "two"]
    alone = [answers(GenerationLoop(AdapterLM()), [name])[0] for name in names]
    assert len({tuple(ids) for ids in alone[:3]}) == 3
    loop = GenerationLoop(AdapterLM(num_blocks=num_blocks), prefix_caching=True, prefill_chunk=6)
    for _ in range(3):
        assert answers(loop, names) == alone
    assert loop.counters.prefix_hits > 0
    assert (loop.counters.preemptions > 0) == (num_blocks == 9)


def test_what_is_shared_with_one_adapter() -> None:
    loop = GenerationLoop(AdapterLM(), prefix_caching=True)
    answers(loop, ["one"])
    for name, hits in (("two", 0), ("", 0), ("one", 12)):
        before = loop.counters.prefix_hits
        answers(loop, [name])
        assert loop.counters.prefix_hits - before == hits, name


def test_no_salt_spells_an_adapter() -> None:
    keys = [
        root_hash(1.0, salt, adapter)
        for adapter in ("", "a", "ab", "a b")
        for salt in ("", "a", "b", "@1:a", "@1:a ", " ", "a b")
    ]
    assert len(set(keys)) == len(keys)
    assert root_hash(1.0, "x") == root_hash(1.0, "x", "")


def test_several_choices_and_an_unknown_adapter() -> None:
    lm = AdapterLM()
    loop = GenerationLoop(lm)
    loop.add(PROMPT, SamplingParams(n=3, max_new_tokens=2, seed=1), adapter="two")
    while loop.busy:
        loop.step()
    assert {chunk.adapter for chunks in lm.passes for chunk in chunks} == {"two"}
    with pytest.raises(RequestError, match="no adapter 'three'; loaded: one, two"):
        loop.add(PROMPT, PARAMS, adapter="three")
    with pytest.raises(RequestError, match="loaded: none"):
        GenerationLoop(FakeLM()).add(PROMPT, PARAMS, adapter="one")
    assert not loop.busy
