"""One process at a time: a lock file that the operating system lets go of when its owner dies.

The file holds the owner's process id, for the one who waits to name. Two threads of one process exclude each other too.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

if sys.platform == "win32":
    import msvcrt

    def try_lock(fd: int) -> bool:
        """Lock a file until it is closed; False when another process holds it."""
        try:
            os.lseek(fd, 1 << 30, os.SEEK_SET)  # a byte far behind the text, so that others can read the owner's id
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def try_lock(fd: int) -> bool:
        """Lock a file until it is closed; False when another process holds it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            # some network file systems have no locks: better alone than not at all
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        return True


POLL_S = 0.2


class FileLock:
    """Holds ``path`` as a context manager. The file is gone when the lock is free (Windows may leave it behind).

    ``on_wait`` is called with the owner's process id (0 when unknown) each time the lock is found taken.
    """

    def __init__(self, path: Path, on_wait: Callable[[int], None] | None = None) -> None:
        self.path = path
        self._on_wait = on_wait
        self._fd = -1

    def __enter__(self) -> FileLock:
        while not self._acquire():
            if self._on_wait is not None:
                self._on_wait(self._owner())
            time.sleep(POLL_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if sys.platform != "win32":  # Windows cannot delete an open file
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._fd)
            self._fd = -1

    def _acquire(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not try_lock(fd) or not self._is_still(fd):
                os.close(fd)
                return False
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, str(os.getpid()).encode())
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def _is_still(self, fd: int) -> bool:
        """Whether the locked file is the one under the name: the last owner may have deleted it in between."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _owner(self) -> int:
        try:
            return int(self.path.read_text() or 0)
        except (OSError, ValueError):
            return 0
