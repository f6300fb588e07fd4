"""Writing so that what is on disk is always whole: a temporary name, fsync, rename; a full disk is named as such."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"  # what a killed write leaves behind; ignored by readers, removed by the next run
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors and torch report a failed write in their own exceptions, without an errno
_FULL_MESSAGES = ("os error 28", "os error 122", "os error 27", "inline_container", "PytorchStreamWriter failed writing")


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(message in str(error) for message in _FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns whatever a library raises on a full disk into one `OSError` (ENOSPC) that names `path` and the remedy."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        remedy = "free some space, then go on with --resume_from_checkpoint latest; files written before are intact"
        raise OSError(errno.ENOSPC, f"no space left on the device (or quota reached); {remedy}", str(path)) from error


def fsync_directory(path: Path) -> None:
    """Makes renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, text: str) -> None:
    """Replaces `path` by `text`: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the disk is full; the old file is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with disk_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def files_below(folder: Path) -> list[str]:
    """Every file in `folder` and its subfolders, as sorted relative names."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
