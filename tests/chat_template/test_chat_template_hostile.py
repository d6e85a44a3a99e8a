"""Hostile templates are stopped: with the right code, in seconds, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hostile_templates
import pytest
from hostile_templates import HOSTILE

HANG_GUARD_S = 30  # per template, against a hang; the budget itself is 2 s


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, float | str]]:
    """What became of each template in one process of 1 GiB."""
    pytest.importorskip("resource", reason="memory limits need POSIX")
    program = Path(hostile_templates.__file__)
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=HANG_GUARD_S * len(HOSTILE)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_there_are_at_least_25() -> None:
    assert len(HOSTILE) >= 25


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_stopped(name: str, outcomes: dict[str, dict[str, float | str]]) -> None:
    outcome = outcomes[name]
    assert outcome["code"] in ("TEMPLATE_BUDGET", "TEMPLATE_UNSAFE")
    assert float(outcome["seconds"]) < HANG_GUARD_S
    assert float(outcome["peak_mib"]) < 256
