"""The variables of running servers in a file that another terminal can source."""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NAME = "env"


@contextmanager
def kept_exports(directory: Path, exports: str) -> Generator[str]:
    """Keep *exports* in the file ``env`` of *directory*, 0600, for the length of a ``with`` block.

    The value is a line for the user: how to source the file, or why there is none. Servers without the file
    still serve, so nothing is raised.

    Args:
        directory: Created if needed, 0700, with a ``.gitignore`` that excludes all of it, and removed then at
            the end, unless other files were added.
        exports: Shell commands.
    """
    path = directory / NAME
    with ExitStack() as stack:
        try:
            if not directory.exists():
                stack.callback(_remove_directory, directory)
            _prepare(directory)
            file = _claim(path)
            stack.callback(_remove, path, file)
            os.ftruncate(file, 0)
            os.write(file, exports.encode())
        except BlockingIOError:
            note = f"{path} belongs to other running servers: copy these lines into another terminal"
        except OSError as error:
            note = f"{path} cannot be written ({error.strerror}): copy these lines into another terminal"
        else:
            note = f"In another terminal: . {shlex.quote(str(path))} (removed when the servers stop: Ctrl-C)"
        yield note


def _prepare(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    ignore = directory / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="ascii")


def _remove_directory(directory: Path) -> None:
    """Remove what `_prepare` made."""
    with suppress(OSError):
        if {path.name for path in directory.iterdir()} <= {".gitignore"}:
            (directory / ".gitignore").unlink(missing_ok=True)
            directory.rmdir()


def _claim(path: Path) -> int:
    """Open *path* for writing and lock it; what a killed process left there is taken over.

    Raises:
        BlockingIOError: A running process holds it.
        OSError: It cannot be opened, or is a link.
    """
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(file, 0o600)
            if _is_at(path, file):
                return file
        except OSError:
            os.close(file)
            raise
        # Its holder removed it between our two calls.
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _remove(path: Path, file: int) -> None:
    try:
        if _is_at(path, file):
            path.unlink()
    finally:
        os.close(file)
