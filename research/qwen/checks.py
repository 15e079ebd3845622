"""What a value of a settings file may be: small checks, each of which answers what is wanted instead, or None.

Shared by the YAML files of a run (settings.py) and the recipes of fine-tuning (train/recipe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from research.qwen.config import suggest
from research.qwen.errors import ConfigError

# A check answers what a value must be, or None if it is that. Null is never checked: it means "not given".
Check = Callable[[Any], str | None]


def anything(value: Any) -> str | None:
    """Any value."""
    return None


def integer(low: int) -> Check:
    """A whole number of at least ``low``."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
        return None if fits else f"an integer of at least {low}"

    return check


def number(low: float, high: float = float("inf"), *, open_low: bool = False) -> Check:
    """A number in [low, high], or (low, high]; the text 1e-6 counts too, for YAML 1.1 takes it as one."""

    def check(value: Any) -> str | None:
        try:
            found = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = float("nan")
        fits = low <= found <= high and not (open_low and found == low)
        bound = "" if high == float("inf") else f" and at most {high:g}"
        return None if fits else f"a number {'above' if open_low else 'of at least'} {low:g}{bound}"

    return check


def boolean(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "True or False"


def text(value: Any) -> str | None:
    """A string."""
    return None if isinstance(value, str) else "text"


def one_of(*allowed: Any) -> Check:
    """One of the values given; True is not 1 here."""

    def check(value: Any) -> str | None:
        fits = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
        return None if fits else f"{'one of ' if len(allowed) > 1 else ''}{', '.join(map(repr, allowed))}"

    return check


def token_ids(value: Any) -> str | None:
    """A token id, or a list of at least one."""
    ids = value if isinstance(value, list) else [value]
    fits = ids and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids)
    return None if fits else "a token id or a list of them"


def named(check: Check, names: str) -> dict[str, Check]:
    """The same check for every name of a space-separated list."""
    return dict.fromkeys(names.split(), check)


def check_value(path: str, value: Any, check: Check, where: str) -> None:
    """ConfigError ``where: path must be ..., got ...`` if the value is not what the check wants. None always is."""
    complaint = None if value is None else check(value)
    if complaint:
        raise ConfigError(f"{where}: {path} must be {complaint}, got {value!r}")


def check_key(
    path: str, key: str, known: Mapping[str, Any], where: str, others: Mapping[str, str] | None = None
) -> None:
    """ConfigError for a key that is not known; ``others`` are the spellings people bring from elsewhere."""
    if key not in known:
        other = (others or {}).get(key)
        hint = f" (did you mean {other!r}?)" if other in known else suggest(key, list(known))
        raise ConfigError(f"{where}: unknown key {path}{hint}")
