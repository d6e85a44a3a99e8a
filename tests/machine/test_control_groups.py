"""The limits of a container: which groups hold this process, and the CPUs that they pay for."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.machine import control_groups, cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of groups; its file ``membership`` says where this process is."""
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def test_every_group_up_to_the_root_counts(groups: Path) -> None:
    (groups / "membership").write_text("0::/outer/inner\n")
    expected = [(groups / "outer" / "inner", True), (groups / "outer", True), (groups, True)]
    assert list(control_groups.control_groups("cpu")) == expected


def test_version_1_has_a_tree_for_each_controller(groups: Path) -> None:
    (groups / "membership").write_text("5:memory:/a\n4:cpu,cpuacct:/b\n1:name=systemd:/c\n")
    assert list(control_groups.control_groups("memory")) == [
        (groups / "memory" / "a", False),
        (groups / "memory", False),
    ]
    assert next(control_groups.control_groups("cpu")) == (groups / "cpu" / "b", False)


@pytest.mark.parametrize("text", [None, "", "no colons\n", "0::\n"])
def test_a_system_without_groups_has_no_limit(groups: Path, text: str | None) -> None:
    if text is not None:
        (groups / "membership").write_text(text)
    assert cores._quota() >= 1 << 16


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 2), ("max 100000", 4), ("400000 100000", 4)])
def test_the_least_quota_of_all_groups_counts(groups: Path, quota: str, expected: int) -> None:
    (groups / "membership").write_text("0::/outer/inner\n")
    (groups / "outer" / "inner").mkdir(parents=True)
    (groups / "outer" / "inner" / "cpu.max").write_text(quota)
    (groups / "outer" / "cpu.max").write_text("400000 100000")
    assert cores._quota() == expected


def test_a_quota_of_version_1_counts(groups: Path) -> None:
    (groups / "membership").write_text("4:cpu:/b\n")
    (groups / "cpu" / "b").mkdir(parents=True)
    (groups / "cpu" / "b" / "cpu.cfs_quota_us").write_text("250000\n")
    (groups / "cpu" / "b" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores._quota() == 3
    (groups / "cpu" / "b" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores._quota() >= 1 << 16
