"""localrl's folder in the user's cache, for files that it can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return localrl's folder in the user's cache, as the system names it; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME")
    mac = Path.home() / "Library" / "Caches"
    folder = Path(home) if home else mac if sys.platform == "darwin" else Path.home() / ".cache"
    return folder / "localrl"
