"""Files that are complete or absent, whatever interrupts their writing."""

__all__ = ["flush", "write_text"]

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one operation. A symbolic link of that name is replaced, not followed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="utf-8") as file:  # "x" does not follow links either
            file.write(text)
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
