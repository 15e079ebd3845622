"""The blocks of a paged cache: how many sequences use each, and which hold tokens that may come again.

A full block is known by the hash of its tokens and of all before them (``block_hash``), so the same beginning of
another prompt finds it. A block that nobody uses keeps its content until its place is needed; the one unused
longest goes first, and of one sequence its end before its beginning.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


def root_hash(alpha: float, salt: str = "", adapter: str = "") -> bytes:
    """What the first block of a sequence has before it: keys depend on the NTK factor and the adapter; salts share
    nothing."""
    owner = f"@{len(adapter)}:{adapter}" if adapter else ""  # no salt of another can spell this
    return hashlib.sha256(f"{float(alpha).hex()}{owner} {salt}".encode("utf-8", "surrogatepass")).digest()


def block_hash(parent: bytes, ids: Sequence[int]) -> bytes:
    """SHA-256 over the hash of the tokens before and the ids of one full block: another's cannot be forged."""
    return hashlib.sha256(parent + array("q", ids).tobytes()).digest()


class BlockPool:
    """Counts the users of every block. A block in use by two sequences is full, and none writes into it."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.evictions = 0
        self._free = deque(range(num_blocks))  # without content worth keeping
        self._idle: OrderedDict[int, None] = OrderedDict()  # known content, no user; the longest unused first
        self._users = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        """How many blocks have no user."""
        return len(self._free) + len(self._idle)

    @property
    def known_blocks(self) -> int:
        """How many blocks can be found by their hash, in use or not."""
        return len(self._block_of)

    def users(self, block: int) -> int:
        """How many sequences use a block."""
        return self._users[block]

    def alloc(self, count: int) -> list[int] | None:
        """``count`` blocks to write into, one user each, or None if there are not so many."""
        if count > self.free_blocks:
            return None
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Take one user from each of the blocks of a sequence."""
        for block in reversed(blocks):  # what was written last is the least likely to be shared
            if self._users[block] < 1:
                raise AssertionError(f"block {block} has no user")
            self._users[block] -= 1
            if not self._users[block]:
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def share(self, hashes: Iterable[bytes]) -> list[int]:
        """The known blocks for the longest beginning of ``hashes``; each gets one more user."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._users[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block known; the first one with a hash stays the known one."""
        if key not in self._block_of and block not in self._hash_of:
            self._block_of[key] = block
            self._hash_of[block] = key

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """Nobody finds these blocks any more (None: no block at all); who uses them keeps them."""
        for block in list(self._hash_of) if blocks is None else blocks:
            key = self._hash_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        self.evictions += 1
        return block
