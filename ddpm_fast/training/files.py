"""Files that are complete or absent, whatever interrupts their writing."""

__all__ = ["digest", "flush", "replacing", "write_text"]

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one operation. A symbolic link of that name is replaced, not followed."""
    with replacing(path) as temporary, open(temporary, "x", encoding="utf-8") as file:  # "x" does not follow links
        file.write(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to. When the block ends without an error, it replaces `path` in one operation.

    A symbolic link at either path is replaced or removed, not followed.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """The SHA-256 of a file, as sha256sum writes it."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk.

    Windows flushes only files that are open for writing, and cannot open folders.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
