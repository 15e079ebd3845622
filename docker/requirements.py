"""Print what a wheel needs, one requirement a line: ``requirements.py WHEEL [EXTRA]``.

The image installs it before the wheel itself, so that a change of our code does not install MindSpore again.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser


def requirements(metadata: str, extra: str = "") -> Iterator[str]:
    """The requirements in a wheel's METADATA: those without a condition and those of ``extra``.

    Raises:
        SystemExit: a condition other than one extra, which this cannot judge.
    """
    for line in HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []:
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        name = condition.replace("'", '"').removeprefix('extra == "').removesuffix('"')
        if condition and not name.isidentifier():
            raise SystemExit(f"error: cannot judge the condition of {line!r}")
        if name in ("", extra):
            yield requirement


def main() -> None:
    """Read the wheel named on the command line."""
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        (name,) = (entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
        text = wheel.read(name).decode()
    print("\n".join(requirements(text, *sys.argv[2:3])))


if __name__ == "__main__":
    main()
