"""Files are known again by what they hold."""

from __future__ import annotations

from research.qwen.train.fingerprint import LOOKED_AT, fingerprint


def test_contents_count_and_names_do_not(tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 10)
    two.write_bytes(b"a" * 10)
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one, two) != fingerprint(one)
    two.write_bytes(b"a" * 11)
    assert fingerprint(one) != fingerprint(two)


def test_both_ends_of_a_large_file_are_looked_at(tmp_path) -> None:
    body = bytearray(3 * LOOKED_AT)
    path = tmp_path / "large"
    path.write_bytes(body)
    plain = fingerprint(path)
    for place in (0, len(body) - 1):
        changed = body.copy()
        changed[place] = 1
        path.write_bytes(changed)
        assert fingerprint(path) != plain
