"""Whether files are those of before, without reading all of what may be 140 GB."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Final

LOOKED_AT: Final = 1 << 20  # bytes, at either end


def fingerprint(*paths: Path) -> str:
    """Eight hexadecimal digits from the sizes of the files and their first and last MiB; names do not count.

    Raises OSError if one cannot be read.
    """
    found = 0
    for path in paths:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            found = zlib.crc32(str(size).encode(), found)
            found = zlib.crc32(stream.read(LOOKED_AT), found)
            stream.seek(max(size - LOOKED_AT, 0))
            found = zlib.crc32(stream.read(LOOKED_AT), found)
    return f"{found:08x}"
