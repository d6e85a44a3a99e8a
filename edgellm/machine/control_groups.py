"""The control groups that hold this process on Linux: a container's limits are written in their files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folder of each group that limits this process by ``controller``, from its own up to the root.

    With it, whether the group is of version 2, whose files have other names. Nothing where there are no groups.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _ROOT / controller if controllers else _ROOT
            folder = root / name.strip("/")
            for group in (folder, *folder.parents):
                if root != group and root not in group.parents:
                    break
                yield group, not controllers
