"""The kernel cache: private, keyed, checked; whatever happens to its files, kernels are compiled again, quietly."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cache_corruptions
import numpy as np
import pytest
from cache_corruptions import CORRUPTIONS, corrupt, expected_logits, small_program, start_and_run

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.compile import compile_crew, isa, jit, kernel_cache, kernel_table, trials
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache, cache_key, default_folder
from edgellm.kernels.cpu.encoders import ENCODERS
from edgellm.kernels.cpu.run.executor import CPUExecutor

posix = pytest.mark.skipif(os.name != "posix", reason="owners, modes and links as POSIX has them")

N_REAL_STARTS = 51  # of the 200 corruptions, each before a real start of an executor
PRODUCT = kernel_cache.CPU_FOLDER.parents[1]
ALL_KERNELS = (*kernel_table.KERNELS, *ENCODERS)
KERNELS = ("add", "rms_norm", "rope", "quantize", "attention")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that a cache compiles, in order; a stand-in makes the object code, as long as a real one."""
    names: list[str] = []

    def compile_object(name: str, function: Any, target: isa.Isa) -> bytes:
        names.append(name)
        return np.random.default_rng(len(name)).bytes(20_000) + name.encode()

    monkeypatch.setattr(kernel_cache.jit, "compile_object", compile_object)
    monkeypatch.setattr(kernel_cache.kernel_table, "function", lambda name, form: None)
    return names


def fresh(folder: Path | None = None) -> KernelCache:
    return KernelCache(isa.detect(), folder or default_folder())


# ---- corruption ------------------------------------------------------------------------------------------------------


@posix
def test_corrupted_files_are_never_believed(folder: Path, compiled: list[str]) -> None:
    """149 corruptions, read by a fresh cache: the object code is always that of the kernel."""
    expected = fresh().objects(KERNELS)
    rng = np.random.default_rng(0)
    for i in range(200 - N_REAL_STARTS):
        done = corrupt(folder, rng, i)
        compiled.clear()
        cache = fresh()
        assert cache.objects(KERNELS) == expected, done
        assert cache.n_compiled == len(compiled) and len(compiled) <= 3, done
        if done not in ("unreadable", "link_to_another"):  # root may read all; a link to a sound file is refused
            assert compiled, done


@posix
@pytest.mark.parametrize("batch", range(3))
def test_an_executor_starts_over_any_corruption(batch: int, folder: Path) -> None:
    """51 corruptions before real starts, in subprocesses: no crash, no warning, no wrong value."""
    n = N_REAL_STARTS // 3
    assert n >= len(CORRUPTIONS)
    done = subprocess.run(
        [sys.executable, cache_corruptions.__file__, str(batch), str(n)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == n
    assert {right for _, _, right in lines} == {"True"}
    assert all(int(n_compiled) <= 3 for _, n_compiled, _ in lines)


# ---- the folder ------------------------------------------------------------------------------------------------------


@posix
def test_folder_and_files_belong_to_the_user_alone(folder: Path, compiled: list[str]) -> None:
    old = os.umask(0)
    try:
        fresh().objects(KERNELS)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == len(KERNELS)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@posix
def test_a_folder_open_to_others_is_closed(folder: Path, compiled: list[str]) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    fresh().objects(KERNELS)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@posix
def test_a_folder_of_another_owner_or_a_link_is_not_used(folder: Path, compiled: list[str]) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")
    assert fresh().folder is None
    assert fresh().objects(KERNELS)
    assert not list((folder.parent / "elsewhere").iterdir())
    if os.getuid() == 0:
        folder.unlink()
        folder.mkdir(0o700)
        os.chown(folder, 12345, 12345)
        assert fresh().folder is None
        fresh().objects(KERNELS)
        assert not list(folder.iterdir())


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/edgellm-kernels", None])
def test_without_a_usable_folder_kernels_are_compiled_each_time_and_one_word_says_so(
    place: str | None, tmp_path: Path, compiled: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    where = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "kernels", None: None}
    for _ in range(2):
        compiled.clear()
        cache = KernelCache(isa.detect(), where.get(place, Path(str(place))))
        assert cache.folder is None and cache.path("add") is None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert set(cache.objects(KERNELS)) == set(compiled) == set(KERNELS)
        assert ["EDGELLM_KERNEL_CACHE" in str(warning.message) for warning in said] == ([True] if place else [])
        cache.mark_verified("add")
        assert cache.is_verified("add") and not cache.is_verified("rope")


@posix
def test_a_full_disk_leaves_nothing_half_written(folder: Path, compiled: list[str]) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        found = fresh().objects(KERNELS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(found) == set(KERNELS)
    assert not list(folder.iterdir())


@posix
def test_a_folder_without_write_permission_is_read_and_no_more(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fresh().objects(KERNELS[:2])

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # root may write everywhere
    compiled.clear()
    found = fresh().objects(KERNELS)
    assert sorted(compiled) == sorted(KERNELS[2:])
    assert {name: found[name] for name in KERNELS[:2]} == expected


# ---- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", kernel_cache.GROUPS)
def test_a_groups_key_changes_with_every_file_that_its_kernels_import_and_no_other(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("kernels", "formats"):
        shutil.copytree(PRODUCT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kernel_cache, "CPU_FOLDER", tmp_path / "kernels" / "cpu")
    target = isa.detect()
    key, changing = cache_key(target, group), set[str]()
    for path in tmp_path.rglob("*.py"):
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        if cache_key(target, group) != key:
            changing.add(str(path.relative_to(tmp_path)))
        path.write_bytes(text)
    assert cache_key(target, group) == key
    assert ("kernels/cpu/encoders/lanes.py" in changing) == (group == "encoders")
    assert ("kernels/cpu/kernels/attention.py" in changing) == (group == "kernels")
    assert "kernels/cpu/lib/simd.py" in changing and "kernels/cpu/run/lowering.py" not in changing
    made_here = {
        f"kernels/cpu/{kernel_table.module(name)}.py" for name in ALL_KERNELS if kernel_cache.group_of(name) == group
    }
    assert _all_imports(made_here) <= changing


def _all_imports(files: set[str]) -> set[str]:
    """These files of the product and those they import, as paths below its folders."""
    found: set[str] = set()
    waiting = sorted(files)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse((PRODUCT / path).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgellm."):
                module = (node.module or "").removeprefix("edgellm.").replace(".", "/")
                names = [f"{module}.py", *(f"{module}/{alias.name}.py" for alias in node.names)]
                waiting += [n for n in names if (PRODUCT / n).is_file()]
    return found


def test_the_key_changes_with_the_form_the_cpu_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    target = isa.detect()
    keys = {cache_key(target)}
    for change in ({"name": "x"}, {"cpu": "x"}, {"triple": "x"}, {"features": "x"}, {"primitives": "x"}):
        keys.add(cache_key(dataclasses.replace(target, **change)))
    version = kernel_cache.importlib.metadata.version
    for package in ("numba", "llvmlite"):
        monkeypatch.setattr(
            kernel_cache.importlib.metadata, "version", lambda name, p=package: "0" if name == p else version(name)
        )
        keys.add(cache_key(target))
    assert len(keys) == 8


# ---- real starts -----------------------------------------------------------------------------------------------------

START = f"""
import sys; sys.path.insert(0, {str(Path(cache_corruptions.__file__).parent)!r})
from cache_corruptions import *
program = small_program()
logits, n_compiled, _ = start_and_run(program)
print(n_compiled, np.array_equal(logits, expected_logits(program)), "numba" in sys.modules)
"""


def test_two_processes_may_start_at_once_and_the_next_start_is_warm(folder: Path) -> None:
    """Both compile, both are right; after them nothing is compiled and numba is not imported."""
    command = [sys.executable, "-c", START]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0 and err == ""
        n_compiled, right, _ = out.split()
        assert int(n_compiled) <= 8 and right == "True"
    assert len(list(folder.glob("*.kernel"))) == 8
    assert not list(folder.glob("*.part"))
    warm = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert warm.stdout.split() == ["0", "True", "False"], warm.stderr


def test_kernels_that_other_versions_left_long_ago_are_deleted(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    old, young = folder / "add-avx2-0123.kernel", folder / "rope-avx2-0123.kernel"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    cache = KernelCache(isa.detect(), folder)
    cache.objects(["add"])
    mine = cache.path("add")
    assert mine is not None
    assert {path.name for path in folder.glob("*.kernel")} == {young.name, mine.name}
    os.utime(mine, (0, 0))
    cache.objects(["rope"])
    assert mine.exists()  # however old, it is of this version


# ---- the first-run test ----------------------------------------------------------------------------------------------


def do_nothing(op, step, thread, n_threads):  # type: ignore[no-untyped-def]
    pass


_real_objects: dict[tuple[str, str, bool], bytes] = {}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """The set of (form, kernel) that compile to a kernel which does nothing."""
    wrong: set[tuple[str, str]] = set()
    compile_object = jit.compile_object

    def compile_or_break(name: str, function: Any, target: isa.Isa) -> bytes:
        key = (name, target.name, (target.name, name) in wrong)
        if key not in _real_objects:
            _real_objects[key] = compile_object(name, do_nothing if key[2] else function, target)
        return _real_objects[key]

    monkeypatch.setattr(kernel_cache.jit, "compile_object", compile_or_break)
    yield wrong


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that went through the self-test."""
    names: list[str] = []
    try_kernel = trials.try_kernel

    def record(kernel: str, *rest: Any) -> trials.SelfTestResult:
        names.append(kernel)
        return try_kernel(kernel, *rest)

    monkeypatch.setattr(trials, "try_kernel", record)
    return names


SMALL = ["add", "embed_f32", "select_outputs", "team_decode", "top_k"]  # what a start with the small program tests


def test_compiled_kernels_are_tested_once(folder: Path, broken: set[tuple[str, str]], tested: list[str]) -> None:
    program = small_program()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start_and_run(program)
        assert sorted(tested) == SMALL
        tested.clear()
        assert start_and_run(program)[1] == 0
    assert tested == []


def test_kernels_whose_test_was_cut_short_are_tested_at_the_next_start(
    folder: Path, broken: set[tuple[str, str]], tested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = small_program()
    KernelCache(isa.detect(), folder).objects([*{*kernel_table.TEAM, *SMALL}])
    assert start_and_run(program)[1] == 0
    assert sorted(tested) == SMALL


@pytest.mark.skipif(len(isa.available_forms()) < 2, reason="this CPU runs one form only")
def test_a_form_that_computes_wrong_numbers_gives_way_to_the_next_with_one_warning(
    folder: Path, broken: set[tuple[str, str]]
) -> None:
    best, second, *_ = isa.available_forms()
    broken.add((best, "add"))
    program = small_program()
    for _ in range(2):  # the second start finds all compiled, and still does not believe the best form
        with pytest.warns(RuntimeWarning, match=rf"The {best} kernels compute wrong numbers.*add") as caught:
            logits, _, form = start_and_run(program)
        assert len(caught) == 1
        assert form == second
        assert np.array_equal(logits, expected_logits(program))


def test_when_every_form_is_wrong_the_error_says_so(folder: Path, broken: set[tuple[str, str]]) -> None:
    broken |= {(form, "add") for form in isa.available_forms()}
    with pytest.raises(UnsupportedError, match="add") as caught:
        start_and_run(small_program())
    assert caught.value.code == "KERNEL_SELFTEST"


def test_the_self_test_finds_a_kernel_that_does_nothing(folder: Path, broken: set[tuple[str, str]]) -> None:
    """Each kernel in turn; the small ones, since every one is compiled here."""
    form = isa.available_forms()[0]
    for kernel in ("add", "select_outputs", "embed_f32", "store_kv", "rope", "rms_norm"):
        broken.clear()
        broken.add((form, kernel))
        cache = KernelCache(isa.detect(form), None)
        result = trials.try_kernel(kernel, cache, CPUExecutor)
        assert not result.ok and result.nmse > result.limit, kernel


# ---- helpers that compile beside us ----------------------------------------------------------------------------------

HEAVY = ("embed_f32", "attention", "matmul_q8_0", "add")


def test_helpers_bring_the_kernels_that_they_took(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[str] = []
    compile_object = jit.compile_object

    def noted(name: str, function: Any, target: isa.Isa) -> bytes:
        ours.append(name)
        time.sleep(1.5)  # so that a helper gets its turn on a machine with little to spare
        return compile_object(name, function, target)

    monkeypatch.setattr(compile_crew, "_n_cores", lambda: 2)
    monkeypatch.setattr(jit, "compile_object", noted)
    cache = fresh()
    objects = cache.objects(HEAVY)
    assert set(objects) == set(HEAVY) and cache.n_compiled == len(HEAVY)
    assert len(ours) < len(HEAVY)
    assert not list(folder.glob(".claims-*"))
    code = jit.CodeMemory()
    assert all(code.load(name, found) for name, found in objects.items())


@pytest.mark.parametrize("command", ["false", "sleep"])
def test_helpers_that_die_or_hang_cost_nothing_but_time(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start_another(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
        (Path(arguments[5]) / "attention").touch()  # it takes a kernel, and brings nothing
        started.append(popen([sys.executable, "-c", {"false": "", "sleep": "import time; time.sleep(600)"}[command]]))
        return started[-1]

    monkeypatch.setattr(compile_crew, "_n_cores", lambda: 2)
    monkeypatch.setattr(compile_crew, "WAIT_S", 0.5)
    monkeypatch.setattr(compile_crew.subprocess, "Popen", start_another)
    assert set(fresh().objects(HEAVY)) == set(HEAVY)
    assert sorted(compiled) == sorted(HEAVY) and compiled[-1] == "attention"
    assert [process.poll() is not None for process in started] == [True]


def test_a_program_that_is_no_python_starts_no_helpers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_crew.subprocess, "Popen", lambda *arguments, **options: pytest.fail("started one"))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with compile_crew.CompileCrew("avx2", tmp_path, HEAVY) as crew:
        assert crew.claim("attention") and crew.n_claimed() == 0


_AROUND_A_LARGE_MODEL = """
import mmap, sys
sys.path.insert(0, sys.argv[1])
from cpu_programs import FORMS, kernel_cache
from edgellm.kernels.cpu.compile import jit

names = sys.argv[2:]
objects = kernel_cache(FORMS[0]).objects(names)
walls = [mmap.mmap(-1, 12288) for _ in range(400)]
model = mmap.mmap(-1, 3 << 30)  # nobody writes to it, so it takes no memory
for wall in walls[::2]:
    wall.close()  # holes above the model, too small for some sections
code = jit.CodeMemory()
print(sum(code.load(name, objects[name]) != 0 for name in names))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a map of this size is paid for there")
def test_kernels_load_when_a_large_model_divides_the_free_memory() -> None:
    names = [name for name in kernel_table.KERNELS if name.startswith("matmul")]
    command = [sys.executable, "-c", _AROUND_A_LARGE_MODEL, str(Path(cache_corruptions.__file__).parent), *names]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (child.returncode, child.stdout.strip()) == (0, str(len(names))), child.stderr[-1000:]
