"""Damaged models are refused or run, never crash; and a program ends, forks and hooks without waiting for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny_models

N_MUTANTS = 200
TESTS = Path(__file__).parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, with a guard against waiting for ever."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=TESTS)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context_length=4096)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_damaged_models_are_refused_or_run(tmp_path: Path) -> None:
    worker = python("hostile_models.py", str(tmp_path), "0", str(N_MUTANTS))
    lines = worker.stdout.splitlines()
    assert worker.returncode == 0, (worker.returncode, lines[-1:], worker.stderr[-2000:])
    outcomes = Counter(line.split()[1] for line in lines)
    assert set(outcomes) == {"ran", "refused", "stopped"}, [line for line in lines if " raised " in line]
    assert outcomes.total() == N_MUTANTS
    assert min(outcomes.values()) > N_MUTANTS // 20, outcomes


@pytest.mark.parametrize("attempt", range(2))
def test_the_interpreter_ends_while_a_model_answers(model_path: Path, attempt: int) -> None:
    program = (
        "import sys, threading, time, edgellm\n"
        "llm = edgellm.load(sys.argv[1], n_threads=2)\n"
        "for i in range(3):\n"
        "    threading.Thread(target=lambda: llm.generate([5] * 2000, max_tokens=2000), daemon=True).start()\n"
        "started = llm.stream([7, 8]); next(started)\n"
        "print('end')\n"
    )
    ended = python("-c", program, str(model_path))
    assert (ended.returncode, ended.stdout) == (0, "end\n"), ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_told_to_load_again(model_path: Path) -> None:
    program = (
        "import os, sys, edgellm\n"
        "llm = edgellm.load(sys.argv[1], n_threads=2); llm.generate([5], max_tokens=2)\n"
        "if os.fork() == 0:\n"
        "    try: llm.generate([5], max_tokens=2)\n"
        "    except edgellm.ClosedError as error: sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]), len(llm.generate([6], max_tokens=1).tokens) <= 1)\n"
    )
    ended = python("-c", program, str(model_path))
    assert (ended.returncode, ended.stdout) == (0, "7 True\n"), ended.stderr


def test_a_hook_that_asks_its_own_model_gets_an_error(model_path: Path) -> None:
    program = (
        "import sys, edgellm\n"
        "llm = edgellm.load(sys.argv[1], n_threads=1)\n"
        "try: llm.generate([5], max_tokens=1, hook=lambda *a: llm.generate([6], max_tokens=1))\n"
        "except edgellm.ParameterError as error: print(error)\n"
    )
    ended = python("-c", program, str(model_path))
    assert ended.stdout.startswith("A hook asked its own model"), ended.stderr


def test_wrong_callbacks_are_refused_before_the_engine_has_them(model_path: Path) -> None:
    import edgellm

    with edgellm.load(model_path, n_threads=1) as llm:
        for name in ("cancel", "hook", "progress"):
            with pytest.raises(edgellm.ParameterError, match=name):
                llm.generate([5], max_tokens=1, **{name: 5})
