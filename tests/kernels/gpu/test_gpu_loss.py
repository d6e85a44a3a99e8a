"""A GPU that goes away in mid-answer: the CPU goes on from the tokens, in the library, over HTTP and in the chat."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_device import device

import edgellm
from edgellm import loading
from edgellm.formats.errors import DeviceLostError, MemoryWouldExceedError, ParameterError
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.gpu import adapters
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.split import SplitExecutor
from edgellm.llm import LLM

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

DIVISIONS: dict[str, dict[str, Any]] = {"all": {}, "a layer": {"gpu_layers": 1}}


@pytest.fixture(scope="module")
def name() -> str:
    return device("gpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tiny_models.write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "gemma3", "Q8_0")
    return found


@pytest.fixture(params=DIVISIONS)
def llm(request: pytest.FixtureRequest, path: Path, name: str) -> Iterator[LLM]:
    with edgellm.load(path, executor=name, n_ctx=128, n_threads=1, n_parallel=4, **DIVISIONS[request.param]) as loaded:
        yield loaded


def destroy(llm: LLM) -> None:
    """What a driver that starts again does, between two steps."""

    def lose(_: Any, executor: Any) -> None:
        gpu = executor.parts[1] if isinstance(executor, SplitExecutor) else executor
        assert isinstance(gpu, GPUExecutor)
        gpu.device._device.destroy()

    llm.engine.call(lose)


def test_the_answer_goes_on_from_its_tokens(llm: LLM, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert llm.runs_on.startswith(name)
    talk, whole = llm.conversation(), llm.chat([{"role": "user", "content": "hi"}], max_tokens=40, temperature=0)
    answer = talk.stream("hi", max_tokens=40, temperature=0)
    chunks = [next(answer) for _ in range(2)]
    destroy(llm)
    chunks += list(answer)
    assert "".join(chunk.text for chunk in chunks) == whole.content, "greedy, and far from a tie"
    tokens = [chunk.token for chunk in chunks if chunk.token is not None]
    assert 2 < len(tokens) <= 40 and chunks[-1].finish_reason in ("length", "stop")
    assert isinstance(llm.executor, CPUExecutor) and llm.runs_on == "cpu"
    (notice,) = llm.take_notices()
    assert name in notice and "was lost" in notice and "CPU goes on" in notice and not llm.take_notices()
    assert talk.messages[0].content == "hi" and len(talk.messages) == 2
    assert talk.send("more", max_tokens=4).finish_reason
    assert capfd.readouterr() == ("", ""), "drivers and wgpu write nothing to the screen"


def test_all_answers_go_on_and_new_ones_begin(llm: LLM) -> None:
    streams = [llm.stream([3 + i, 4, 5], max_tokens=30, temperature=0.8, seed=i, logprobs=1) for i in range(4)]
    started = [next(stream) for stream in streams]
    destroy(llm)
    rest = [list(stream) for stream in streams]
    assert all(chunk.token is not None for chunk in started) and all(chunks[-1].finish_reason for chunks in rest)
    assert len(llm.take_notices()) == 1
    assert llm.generate([3, 4, 5], max_tokens=4, temperature=0).tokens
    assert llm.loglikelihood("a b", " c").logprob < 0


def test_what_is_lent_the_cache_finds_that_of_the_cpu(llm: LLM, tmp_path: Path) -> None:
    prompt = list(range(3, 70))
    llm.generate(prompt, max_tokens=1)
    destroy(llm)
    with pytest.raises(ParameterError, match="None of these"):  # what the device had is gone
        llm.save_state(tmp_path / "state", prompt)
    llm.generate(prompt, max_tokens=1)
    assert llm.save_state(tmp_path / "state", prompt) > 60


def test_without_memory_for_it_the_error_names_the_device_and_the_conversation_is_kept(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = llm.conversation()
    answer = talk.stream("hi", max_tokens=40, temperature=0)
    next(answer)

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryWouldExceedError("no room")

    monkeypatch.setattr(loading, "check_fits", refuse)
    destroy(llm)
    with pytest.raises(DeviceLostError, match="--device cpu") as raised:
        list(answer)
    assert llm.runs_on.split()[0] in str(raised.value)
    assert talk.messages[0].content == "hi"


def test_a_device_without_memory_says_so_when_it_loads_and_lets_the_cpu_go_on_later(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wgpu = adapters.wgpu_module()

    def exhausted(*_: Any, **__: Any) -> None:
        raise wgpu.GPUOutOfMemoryError("Out of memory")

    with edgellm.load(path, executor=name, n_ctx=128) as llm:
        executor: Any = llm.executor
        answer = llm.stream([3, 4, 5], max_tokens=60, temperature=0)
        next(answer)
        monkeypatch.setattr(executor.device, "run", exhausted_as(executor.device, exhausted))
        assert list(answer)[-1].finish_reason
        assert "no memory left" in llm.take_notices()[0]
    monkeypatch.setattr(Device, "buffer", lambda self, *_, **__: exhausted_as(self, exhausted)())
    with pytest.raises(MemoryWouldExceedError, match=r"no memory left .*--device cpu"):
        edgellm.load(path, executor=name, n_ctx=128)


def exhausted_as(gpu: Device, raises: Any) -> Any:
    """A function of a device that runs out of memory."""

    def run(*_: Any, **__: Any) -> None:
        with gpu._translated():
            raises()

    return run


def test_a_server_answers_to_the_end(path: Path, name: str) -> None:
    client_module = pytest.importorskip("starlette.testclient", reason="pip install edgellm[server]")
    from edgellm.server.app import App
    from edgellm.server.models import ModelEntry, Models
    from edgellm.server.server import Server

    told: list[str] = []
    options = loading.LoadOptions(n_ctx=128, executor=name, n_parallel=2)
    models = Models([ModelEntry(("tiny",), path)], options, tell=told.append)
    with client_module.TestClient(App(Server(models)), base_url="http://localhost") as client:
        asked = {"model": "tiny", "prompt": [3, 4, 5], "max_tokens": 60, "temperature": 0, "stream": True}
        client.post("/v1/completions", json={**asked, "stream": False, "max_tokens": 1})
        (entry,) = models.loaded()
        assert entry.llm is not None and entry.llm.memory_estimate.device is not None
        lost = threading.Timer(0.05, destroy, (entry.llm,))
        lost.start()
        for _ in range(8):
            lines = client.post("/v1/completions", json=asked).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert events[-1]["choices"][0]["finish_reason"] and lines[-2] == "data: [DONE]"
        lost.join()
        assert entry.llm.runs_on == "cpu"
        need, gpu = entry.llm.memory_estimate, models.device
        assert need.device is None and need.of_device(gpu) == 0, "the server reckons with the memory that it takes now"
        assert need.of_system(gpu) >= entry.llm.engine.cache.pool.nbytes
    assert len(told) == 1 and told[0].startswith(f"tiny: {name}")


def test_a_binding_of_32_mib_holds_a_matrix_of_more(name: str, tmp_path: Path) -> None:
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.program import Batch
    from edgellm.models import build_program

    index = int(name.partition(":")[2])
    made = tiny_models.write_tiny_model(tmp_path / "wide.gguf", "llama", "F32", n_embd=1024, n_ff=9000, tied=False)
    with GGUFFile.open(made) as gguf:
        program = build_program(gguf)
        logits = []
        for most in (None, 32 << 20):
            executor = GPUExecutor(program, 4, max_tokens=16, index=index, max_binding=most)
            logits.append(executor.run(Batch.single(program, [3, 4, 5, 6, 7])).copy())
            parts = max(len(matrix.parts) for matrix, _ in executor._there.matrices.values())
            assert parts == 1 if most is None else parts > 1
            executor.close()
    assert np.array_equal(*logits)
