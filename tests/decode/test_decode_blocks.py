"""The block pool: users, known blocks, eviction; against a plain model of what it must remember."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from research.qwen.decode.blocks import BlockPool, block_hash, root_hash

KEYS = [bytes([i]) for i in range(8)]


def test_alloc_and_free():
    pool = BlockPool(3)
    assert pool.alloc(4) is None
    blocks = pool.alloc(3)
    assert sorted(blocks) == [0, 1, 2] and pool.alloc(1) is None and pool.free_blocks == 0
    pool.free(blocks[:1])
    assert pool.alloc(1) == blocks[:1]


def test_a_known_block_is_shared_and_counts_its_users():
    pool = BlockPool(2)
    (block,) = pool.alloc(1)
    pool.publish(block, KEYS[0])
    assert pool.share([KEYS[0], KEYS[1]]) == [block] and pool.users(block) == 2
    pool.free([block])
    pool.free([block])
    assert pool.free_blocks == 2, "a known block without users is free"
    assert pool.share([KEYS[0]]) == [block], "and still known"


def test_only_an_unbroken_beginning_is_found():
    pool = BlockPool(3)
    for block, key in zip(pool.alloc(3), [KEYS[0], KEYS[2], KEYS[3]], strict=True):
        pool.publish(block, key)
    assert len(pool.share(KEYS[:4])) == 1


def test_plain_blocks_go_before_known_ones_and_ends_before_beginnings():
    pool = BlockPool(4)
    chain = pool.alloc(3)
    for block, key in zip(chain, KEYS, strict=False):
        pool.publish(block, key)
    pool.free(chain)
    spare = pool.alloc(1)
    assert spare[0] not in chain and pool.evictions == 0
    assert pool.alloc(2) == [chain[2], chain[1]] and pool.evictions == 2
    assert pool.share(KEYS[:3]) == chain[:1], "the beginning outlives the end"


def test_the_longest_unused_goes_first():
    pool = BlockPool(2)
    first, second = pool.alloc(2)
    pool.publish(first, KEYS[0])
    pool.publish(second, KEYS[1])
    pool.free([first])
    pool.free([second])
    pool.free(pool.share([KEYS[0]]))  # used again
    pool.alloc(1)
    assert not pool.share([KEYS[1]]) and pool.share([KEYS[0]]) == [first]


def test_the_first_block_with_a_hash_stays_the_known_one():
    pool = BlockPool(2)
    first, second = pool.alloc(2)
    pool.publish(first, KEYS[0])
    pool.publish(second, KEYS[0])
    pool.free([second])
    assert pool.known_blocks == 1 and pool.share([KEYS[0]]) == [first]


def test_forgotten_blocks_are_found_by_nobody_and_kept_by_their_users():
    pool = BlockPool(3)
    used, idle, other = pool.alloc(3)
    for block, key in zip((used, idle, other), KEYS, strict=False):
        pool.publish(block, key)
    pool.free([idle, other])
    pool.forget([used, idle])
    assert pool.share(KEYS[:1]) == pool.share(KEYS[1:2]) == []
    assert pool.users(used) == 1 and pool.free_blocks == 2
    pool.forget()
    assert pool.known_blocks == 0 and pool.free_blocks == 2


def test_a_block_without_users_cannot_be_freed():
    pool = BlockPool(1)
    pool.free(pool.alloc(1))
    with pytest.raises(AssertionError, match="no user"):
        pool.free([0])


def test_hashes_tell_tokens_order_factor_and_salt_apart():
    roots = {
        root_hash(1.0),
        root_hash(3.0),
        root_hash(1.0, "a"),
        root_hash(1.0, "b"),
        root_hash(1.0, "\ud800"),
    }
    assert len(roots) == 5
    one = block_hash(root_hash(1.0), [1, 2])
    assert one == block_hash(root_hash(1.0), (1, 2))
    others = [
        block_hash(root_hash(1.0), [2, 1]),
        block_hash(root_hash(3.0), [1, 2]),
        block_hash(one, [1, 2]),
        block_hash(root_hash(1.0), [1, 2 + 2**32]),
    ]
    assert len({one, *others}) == 5


class Pool(RuleBasedStateMachine):
    """Random use; the tables are lists of blocks as sequences hold them."""

    @initialize(size=st.integers(1, 7))
    def start(self, size):
        self.pool, self.size, self.tables = BlockPool(size), size, []

    @rule(count=st.integers(0, 4))
    def alloc(self, count):
        before = self.pool.free_blocks
        blocks = self.pool.alloc(count)
        assert (blocks is None) == (count > before)
        if blocks:
            assert all(self.pool.users(block) == 1 for block in blocks)
            self.tables.append(blocks)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def share(self, keys):
        blocks = self.pool.share(keys)
        assert [self.pool._hash_of[block] for block in blocks] == keys[: len(blocks)]
        if blocks:
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data, key):
        table = data.draw(st.sampled_from(self.tables))
        self.pool.publish(data.draw(st.sampled_from(table)), key)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data):
        place = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.free(self.tables.pop(place))

    @rule(blocks=st.one_of(st.none(), st.sets(st.integers(0, 0), max_size=1)))
    def forget(self, blocks):
        self.pool.forget(blocks)

    @invariant()
    def every_block_is_counted(self):
        if not hasattr(self, "pool"):
            return
        held = [block for table in self.tables for block in table]
        assert [held.count(block) for block in range(self.size)] == [
            self.pool.users(b) for b in range(self.size)
        ]
        assert self.pool.free_blocks == self.size - len(set(held))
        unused = [*self.pool._free, *self.pool._idle]
        assert sorted(unused) == sorted(set(range(self.size)) - set(held))
        assert self.pool._block_of == {key: block for block, key in self.pool._hash_of.items()}
        assert set(self.pool._idle) <= set(self.pool._hash_of)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
