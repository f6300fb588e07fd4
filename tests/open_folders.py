"""Folders of a test that other users may pass through, so that a program under a user of its own can be given something in them."""

import os
from pathlib import Path


def opened(folder: Path) -> Path:
    """The folder, open to everybody together with those of pytest's above it."""
    for place in (folder, *folder.parents):
        if "pytest" in str(place) and place.stat().st_uid == os.geteuid():
            place.chmod(0o777)
    return folder
