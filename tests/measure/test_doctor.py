"""``edgellm doctor``: what it finds, what it says of a kernel that computes wrong, and the cache of kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgellm.cli import main
from edgellm.kernels.gpu import adapters
from edgellm.machine.cpu import cpu_name
from edgellm.machine.paths import config_dir, models_dir, sessions_dir
from edgellm.measure import doctor


@dataclass(frozen=True)
class Result:
    """What the self-test gives for one kernel."""

    kernel: str
    form: str
    nmse: float
    limit: float
    ok: bool
    detail: str


REAL_GPU_FACTS = doctor.gpu_facts
GOOD = Result("matmul_q4_k", "avx2", 3e-8, 1e-6, True, "n_in=256")
BAD = Result("rms_norm", "avx2", float("inf"), 1e-9, False, "width=7")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    monkeypatch.delenv("EDGELLM_KERNEL_CACHE", raising=False)
    monkeypatch.setattr(doctor, "bandwidths", lambda: {1: 10e9, 2: 20e9})
    monkeypatch.setattr(doctor, "gpu_facts", lambda: [gpu_facts(software=True)])
    return tmp_path


def gpu_facts(*, software: bool) -> dict[str, Any]:
    return {
        "device": "gpu:0", "name": "a card", "interface": "Vulkan", "kind": "DiscreteGPU", "driver": "", "missing": [],
        "software": software, "memory_total": 8 << 30, "memory_available": 4 << 30,
        "memory_is_own": True,
    }  # fmt: skip


def self_test(monkeypatch: pytest.MonkeyPatch, *results: Result) -> None:
    def run() -> Iterator[Result]:
        yield from results

    monkeypatch.setattr(doctor, "self_test", run)


def test_a_healthy_machine_is_described_and_ends_with_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    self_test(monkeypatch, GOOD)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert cpu_name() in text and "20.0 GB/s" in text and "numba" in text and "Q4_K" in text
    assert "all kernels compute right" in text and "3.0e-08" in text
    for folder in (models_dir, sessions_dir, config_dir):
        assert str(folder()) in text.replace("\n", "")
    assert "qwen3moe" in text


@pytest.mark.parametrize(
    ("software", "flags", "tested"), [(False, (), [0]), (True, (), []), (True, ("--software-gpus",), [0])]
)
def test_gpus_are_listed_and_hardware_is_tested(
    software: bool,
    flags: tuple[str, ...],
    tested: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []

    def run(index: int) -> Iterator[Result]:
        asked.append(index)
        yield GOOD

    self_test(monkeypatch, GOOD)
    monkeypatch.setattr(doctor, "gpu_facts", lambda: [gpu_facts(software=software)])
    monkeypatch.setattr(doctor, "gpu_self_test", run)
    assert main(["doctor", *flags]) == 0
    text = capsys.readouterr().out
    assert "gpu:0" in text and "a card by Vulkan, 8.00 GiB" in text and ("never chosen by auto" in text) == software
    assert asked == tested


def test_the_gpus_of_this_machine_have_the_names_that_device_takes() -> None:
    if not adapters.is_installed():
        pytest.skip("the package wgpu is not installed: pip install edgellm[gpu]")
    facts = REAL_GPU_FACTS()
    assert [gpu["device"] for gpu in facts] == [f"gpu:{i}" for i in range(len(facts))]
    json.dumps(facts)


def test_a_wrong_kernel_is_named_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    self_test(monkeypatch, GOOD, BAD)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("rms_norm" in line and "WRONG" in line for line in lines)
    assert lines[-1].startswith("1 of 2 kernels")


def test_json_holds_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    self_test(monkeypatch, BAD)
    assert main(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is False and facts["self_test"][0]["kernel"] == "rms_norm"
    assert facts["read_bandwidth"] == {"1": 10_000_000_000, "2": 20_000_000_000}
    assert facts["kernels"]["form"] in facts["kernels"]["forms"]
    assert facts["machine"]["memory_total"] >= facts["machine"]["memory_available"] > 0
    assert set(facts["versions"]) == set(doctor.PACKAGES)


def test_what_takes_time_may_be_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def never() -> None:
        raise AssertionError("left out")

    monkeypatch.setattr(doctor, "self_test", never)
    monkeypatch.setattr(doctor, "bandwidths", never)
    assert main(["doctor", "--no-selftest", "--no-bandwidth", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "self_test" not in facts and "read_bandwidth" not in facts


def test_types_with_and_without_kernels_are_all_types() -> None:
    from edgellm.formats.quant_types import QUANT_TYPES

    facts = doctor.kernel_facts()
    assert sorted(facts["fast_types"] + facts["dequantized_types"]) == sorted(QUANT_TYPES)
    assert {"Q4_K", "Q6_K", "Q8_0", "F16"} <= set(facts["fast_types"])


def test_clear_cache_deletes_compiled_kernels_and_nothing_else(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "cache" / "kernels"
    folder.mkdir(parents=True)
    for name in ("add-avx2-0.kernel", ".add.kernel.abc.part", "notes.txt"):
        (folder / name).write_bytes(b"x")
    assert doctor.kernel_cache_state().n_stale == 1
    assert main(["doctor", "--clear-cache"]) == 0
    assert "2 compiled kernels deleted" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert main(["doctor", "--clear-cache"]) == 0


def test_a_folder_that_keeps_no_kernels_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(home / "file"))
    assert main(["doctor", "--no-selftest", "--no-bandwidth"]) == 0
    assert "NOT KEPT" in capsys.readouterr().out
    assert main(["doctor", "--no-selftest", "--no-bandwidth", "--json"]) == 0
    assert str(home / "file") in json.loads(capsys.readouterr().out)["kernel_cache"]["trouble"]


def test_the_real_self_test_finds_this_cpu_right() -> None:
    from edgellm.kernels.cpu.compile import selftest

    results = list(selftest.run(kernels=("add", "rms_norm")))
    assert [result.kernel for result in results] == ["add", "rms_norm"]
    assert all(result.ok for result in results)
