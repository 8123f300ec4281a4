"""Where this checkout is, and how not to tell; without torch, for whoever starts often."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def without_folders(text: str) -> str:
    """
    >>> without_folders("cannot read /home/somebody/adcert/ops.py, and/or more")
    'cannot read ops.py, and/or more'
    """
    return re.sub(r"(?<![\w.])/(?:[^/\s'\":,]+/)+", "", text)
