"""A model file that is cut short while it is in use: an error with a name, and no process ends by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from edgellm.formats import bus_error
from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.gguf_writer import TensorPlan, write_gguf
from edgellm.formats.mapped_file import map_file
from edgellm.formats.validate import findings

pytestmark = pytest.mark.skipif(bus_error.system() is None, reason="no handler for this system")

SHORT = 8192  # bytes that are left of a file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model with weights of more than one page."""
    return tiny_models.write_tiny_model(tmp_path / "tiny.gguf", quant="Q8_0")


def child(code: str, *arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    """A program of its own: a signal would end this one."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, **options}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


ASK = """
    import os, sys
    import edgellm

    path, executor = sys.argv[1:]
    llm = edgellm.load(path, executor=executor, n_ctx=128)
    llm.generate("the", max_tokens=4, temperature=0)
    os.truncate(path, 8192)
    for prompt in ("another prompt", "the", "a third one"):
        try:
            print(llm.generate(prompt, max_tokens=8, temperature=0))
        except edgellm.EdgeLLMError as error:
            print(error.code)
    for look in (lambda: llm.score("a text"), lambda: llm.conversation().send("hi")):
        try:
            look()
        except edgellm.EdgeLLMError as error:
            print(error.code)
    llm.close()
    try:
        edgellm.load(path)
    except edgellm.EdgeLLMError as error:
        print(error.code)
"""


@pytest.mark.parametrize("executor", ["cpu", "reference"])
@pytest.mark.parametrize("handler", ["0", "1"])  # of faulthandler
def test_every_request_to_a_model_that_was_cut_short_is_an_error(model: Path, executor: str, handler: str) -> None:
    options = {"PYTHONFAULTHANDLER": "1"} if handler == "1" else {}
    ended = child(ASK, model, executor, **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["MODEL_FILE_CHANGED"] * 5 + ["MODEL_TRUNCATED"]


CUT_WHILE_IT_ANSWERS = """
    import os, sys
    import edgellm
    from edgellm.cli import main

    load, path = edgellm.load, sys.argv[1]

    def load_and_cut(*arguments, **options):
        llm = load(*arguments, **options)
        os.truncate(path, 8192)
        return llm

    edgellm.load = load_and_cut
    sys.exit(main(["run", path, "hello", "--raw", "-n", "8", *sys.argv[2:]]))
"""


def test_the_command_line_ends_with_a_message_and_status_1(model: Path) -> None:
    ended = child(CUT_WHILE_IT_ANSWERS, model)
    assert ended.returncode == 1 and "MODEL_FILE_CHANGED" in ended.stderr and "load it again" in ended.stderr
    assert ended.stdout == "" and "Traceback" not in ended.stderr


FOREIGN = """
    import mmap, os, sys
    from edgellm.formats import bus_error
    from edgellm.formats.mapped_file import map_file
    from pathlib import Path

    path = Path(sys.argv[1])
    assert bus_error.install() and bus_error.install()
    mapped = map_file(path)
    with open(path, "rb") as file:
        other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(path, 8192)
    print(sum(mapped[20_000:24_000]), flush=True)
    other[20_000]
"""


def test_a_fault_in_memory_that_is_not_ours_ends_as_it_did_before(model: Path) -> None:
    ended = child(FOREIGN, model)
    assert ended.returncode == -signal.SIGBUS and ended.stdout == "0\n"
    another = tiny_models.write_tiny_model(model.with_name("other.gguf"), quant="Q8_0")
    told = child(FOREIGN, another, PYTHONFAULTHANDLER="1")
    assert told.returncode == -signal.SIGBUS and "Bus error" in told.stderr


MANY = """
    import os, sys, threading
    from pathlib import Path
    from edgellm.formats import bus_error
    from edgellm.formats.mapped_file import map_file

    path = Path(sys.argv[1])
    path.write_bytes(bytes([1]) * 4_000_000)
    bus_error.install()
    maps = [map_file(path) for _ in range(8)]
    whole = Path(sys.argv[1] + ".whole")
    whole.write_bytes(bytes([1]) * 100_000)
    kept = map_file(whole)
    os.truncate(path, 4096)
    threads = [threading.Thread(target=lambda m=m: [m[i] for i in range(3_999_999, 0, -4096)]) for m in maps]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    os.truncate(path, 4_000_000)  # it is whole again, but was not
    for mapped in maps:
        try:
            mapped.check()
        except Exception as error:
            print(error.code)
    kept.check()
    for mapped in maps: mapped.close()
    for _ in range(3000): map_file(whole).close()
    print(sum(bus_error._table[1::3]) != 0, len([end for end in bus_error._table[1::3] if end]))
"""


def test_threads_that_read_at_once_go_on_and_a_file_that_grew_again_is_not_trusted(tmp_path: Path) -> None:
    ended = child(MANY, tmp_path / "file")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["MODEL_FILE_CHANGED"] * 8 + ["True", "1"]


def test_nothing_that_was_made_of_a_file_cut_short_gets_its_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeLLMError) as found, GGUFFile.open(model) as gguf:
        name, tensor = next(iter(gguf.tensors.items()))

        def chunks() -> object:
            os.truncate(model, SHORT)
            yield np.zeros(tensor.nbytes, np.uint8)

        plan = TensorPlan(name, tensor.shape, tensor.quant, chunks)
        write_gguf(tmp_path / "made.gguf", {"general.architecture": ("llama", "STRING")}, [plan])
    assert found.value.code == "MODEL_FILE_CHANGED" and not (tmp_path / "made.gguf").exists()


def test_a_look_at_a_file_that_was_cut_short_finds_nothing_wrong_with_it_silently(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.formats import validate

    check_values = validate._check_values

    def cut_first(part: object, report: object) -> None:
        os.truncate(model, SHORT)
        check_values(part, report)  # type: ignore[arg-type]

    monkeypatch.setattr(validate, "_check_values", cut_first)
    with pytest.raises(EdgeLLMError) as found:
        findings(model, check_tensors=True)
    assert found.value.code == "MODEL_FILE_CHANGED"


def test_a_file_that_stays_whole_is_never_complained_of(model: Path) -> None:
    mapped, written = map_file(model), model.read_bytes()
    mapped.check()
    with open(model, "ab") as file:
        file.write(b"more")
    mapped.check()
    other = model.with_name("other")
    other.write_bytes(b"x" * 100)
    os.replace(other, model)  # the map keeps the old file
    mapped.check()
    assert mapped[:] == written
    mapped.close()
    mapped.check()


def test_the_collector_may_let_go_of_a_map_while_the_table_is_locked(model: Path) -> None:
    mapped = map_file(model)
    with bus_error._lock:  # by this very thread, which the collector interrupts
        mapped.close()
    assert not bus_error._table[bus_error.SLOT_WORDS * mapped._slot + 1]
