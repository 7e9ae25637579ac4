"""Published weights on a shared disk: one folder a version, old ones removed."""

from __future__ import annotations

import shutil
from pathlib import Path


def remove_old_versions(weights: Path, keep: Path) -> None:
    """Removes every published version but `keep`, which all servers have loaded and read back."""
    for folder in weights.glob("v*"):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
