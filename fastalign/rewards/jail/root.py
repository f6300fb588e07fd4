"""A root folder of the sandbox's own: what may be read is bound read-only, a work folder in memory, nothing else."""

from __future__ import annotations

import os

import kernel

WORK = "/sandbox"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_SAFE = kernel.MS_NOSUID | kernel.MS_NODEV


def build(folder: str, readable: list[str], disk_bytes: int, owner: tuple[int, int]) -> None:
    """Makes the root on the empty `folder` and enters it. The caller is in a mount namespace of its own, first of a process namespace.

    Args:
        folder: an empty folder of the host; it stays empty there.
        readable: absolute files and folders, bound where they are; one that does not exist is left out.
        disk_bytes: how much may be written under WORK.
        owner: user and group of WORK.

    Raises:
        OSError: where the kernel refuses a step.
    """
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", folder, "tmpfs", _SAFE, "size=4m,mode=755")
    for path in sorted(set(readable)):
        _bind(folder, path, kernel.MS_RDONLY | _SAFE)
    for path in DEVICES:
        _bind(folder, path, kernel.MS_RDONLY | kernel.MS_NOSUID)
    os.makedirs(folder + "/dev", exist_ok=True)
    os.symlink(WORK, folder + "/dev/shm")
    os.symlink("/proc/self/fd", folder + "/dev/fd")
    os.makedirs(folder + "/proc", exist_ok=True)
    try:  # noqa: SIM105  (contextlib takes longer to import than the rest)
        kernel.mount("proc", folder + "/proc", "proc", _SAFE | kernel.MS_RDONLY | kernel.MS_NOEXEC)
    except OSError:  # the host's own is masked; a program that looks itself up misses it, and so does `watch.resident_bytes`
        pass
    os.makedirs(folder + WORK, exist_ok=True)
    if not os.path.lexists(folder + "/tmp"):  # what must be read may lie there
        os.symlink(WORK, folder + "/tmp")
    options = f"size={disk_bytes},nr_inodes=16384,mode=700,uid={owner[0]},gid={owner[1]}"
    kernel.mount("tmpfs", folder + WORK, "tmpfs", _SAFE, options)
    kernel.mount("", folder, "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _SAFE)
    kernel.pivot_root(folder)


def _bind(root: str, path: str, attributes: int) -> None:
    target = root + path
    if not os.path.lexists(path) or os.path.lexists(target):  # a folder above it may have brought it along
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(path, target, "", kernel.MS_BIND | kernel.MS_REC)
    kernel.read_only(target, attributes)
