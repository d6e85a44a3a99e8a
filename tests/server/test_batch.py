"""``edgellm batch``: every line answered once, whatever stops it; the answers are those of the server."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec", reason="the server needs its extra: pip install edgellm[server]")
pytest.importorskip("gguf", reason="the judge of files: pip install gguf")

from tiny_models import write_tiny_model

from edgellm.cli import main

BODIES: dict[str, Any] = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 4},
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 4},
    "/v1/embeddings": lambda text: {"input": text},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("batch") / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1)


def line(custom_id: Any, url: str = "/v1/completions", body: Any = None, **more: Any) -> str:
    body = {"model": "tiny", "temperature": 0, **BODIES[url](f"the {custom_id}")} if body is None else body
    if url == "/v1/embeddings":
        body.pop("temperature", None)
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()]


def run(requests: Path, out: Path, model: Path) -> int:
    return main(["batch", str(requests), str(out), "-m", str(model), "-t", "1", "-c", "128"])


def test_lines_are_answered_as_the_server_answers_them(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("httpx2", reason="starlette's client needs it: pip install httpx2")
    from server_client import client_of

    from edgellm.loading import LoadOptions
    from edgellm.server.models import ModelEntry, Models
    from edgellm.server.server import Server

    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(f"{url} {n}", url) for n in range(3) for url in BODIES]
    requests.write_text("\ufeff" + "\r\n\n".join(lines), "utf-8")  # a mark, blank lines, no end of the last one
    assert run(requests, out, model) == 0
    found = {answer["custom_id"]: answer for answer in answers(out)}
    server = Server(Models([ModelEntry(("tiny",), model)], LoadOptions(n_ctx=128, n_threads=1, n_parallel=4)))
    with client_of(server) as client:
        for text in lines:
            asked = json.loads(text)
            answer = found.pop(asked["custom_id"])
            assert answer["id"].startswith("batch_req_") and answer["error"] is None
            assert answer["response"]["status_code"] == 200 and answer["response"]["request_id"].startswith("req_")
            reply = client.post(asked["url"], json=asked["body"]).json()
            assert said(answer["response"]["body"]) == said(reply) != []
    assert not found


def said(body: dict[str, Any]) -> list[Any]:
    """What was answered, without ids and times."""
    if "output" in body:
        return [part["text"] for item in body["output"] for part in item["content"]]
    if "data" in body:
        return [one["embedding"] for one in body["data"]]
    return [one.get("text") or one["message"]["content"] for one in body["choices"]]


WRONG: list[tuple[str, str | None, int | None, str]] = [
    ("no JSON", None, None, "line 2: it is no request"),
    ('{"custom_id": 7}', None, None, "line 3: it is no request"),
    ('{"custom_id": "a"}', "a", None, "line 4: it is no request of a batch: object missing required field method"),
    (line("b").replace("POST", "GET"), "b", None, "line 5: method is 'get'"),
    (line("c").replace("/v1/completions", "/v1/models"), "c", None, "line 6: url is '/v1/models'. a batch takes"),
    (line("d", further=1), "d", None, "line 7: it is no request of a batch: object contains unknown field further"),
    (line("e", body={"model": "tiny", "prompt": "a", "stream": True}), "e", 400, "a batch gives whole answers"),
    (line("f", body={"model": "none", "prompt": "a"}), "f", 404, "there is no 'none' here"),
    (line("g", body={"model": "tiny", "prompt": "a", "flavour": 1}), "g", 400, "flavour"),
    (line("h", body=[1]), "h", 400, "it must be an object"),
    (line("i", body={"model": "tiny", "prompt": "a " * 500}), "i", 400, "the context has room for 128"),
    ("[" * 100_000, None, None, "line 13: it is no request"),
]


def test_bad_lines_become_errors_and_the_others_answers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join([line("good"), *(text for text, *_ in WRONG)]), "utf-8")
    for n_new in (13, 0):  # what was wrong stays so: the status is the same again
        assert run(requests, out, model) == 1
        assert f"{n_new} lines answered in" in capsys.readouterr().err
    found = answers(out)
    assert len({answer["id"] for answer in found}) == 13
    for text, custom_id, status, told in WRONG:
        fitting = [one for one in found if one["custom_id"] == custom_id and told in json.dumps(one).lower()]
        assert len(fitting) == 1, text[:80]
        response = fitting[0]["response"]
        assert (response and response["status_code"]) == status and (fitting[0]["error"] is None) == (
            status is not None
        )
    (good,) = [one for one in found if one["custom_id"] == "good"]
    assert good["response"]["status_code"] == 200


def test_a_model_that_cannot_be_loaded_answers_no_line_also_of_those_that_name_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, out, torn = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "torn.gguf"
    torn.write_bytes(model.read_bytes()[:-1000])
    requests.write_text("\n".join(line(n, body={"prompt": n, "max_tokens": 1}) for n in "abc"), "utf-8")
    assert run(requests, out, torn) == 1
    assert "torn.gguf" in capsys.readouterr().err and answers(out) == []
    assert run(requests, out, model) == 0
    assert [one["response"]["status_code"] for one in answers(out)] == [200] * 3


def test_what_may_go_well_another_time_is_no_answer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.formats.errors import ClosedError, MemoryWouldExceedError
    from edgellm.server import batch
    from edgellm.server.errors import ServerError

    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    passing = [MemoryError(), MemoryWouldExceedError("no room"), ClosedError("closed"), RuntimeError("lost")]
    passing.append(ServerError("overloaded", "busy"))
    requests.write_text("\n".join(line(f"r{n}") for n in range(len(passing) + 2)), "utf-8")
    call_route = batch.call_route

    async def call(*arguments: Any) -> Any:
        if passing:
            raise passing.pop()
        return await call_route(*arguments)

    monkeypatch.setattr(batch, "call_route", call)
    assert run(requests, out, model) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "2 lines answered in" in said and "5 lines are left; the same command tries them again. busy" in said
    assert run(requests, out, model) == 0
    assert Counter(one["custom_id"] for one in answers(out)) == Counter(f"r{n}" for n in range(7))
    assert all(one["response"]["status_code"] == 200 for one in answers(out))


def test_a_custom_id_that_is_there_twice_stops_the_batch_before_it_begins(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join([line("a"), line("b"), "", line("a", body={"prompt": "b"})]), "utf-8")
    assert run(requests, out, model) == 1
    said = capsys.readouterr().err
    assert "'a' stands in the lines 1 and 4" in " ".join(said.split()) and not out.exists()


def test_what_is_no_answer_of_the_batch_is_refused_and_left_as_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, other = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    requests.write_text(line("a"), "utf-8")
    assert run(requests, other, model) == 0
    changed = tmp_path / "changed.jsonl"
    changed.write_text(line("a", body={"model": "tiny", "prompt": "another"}), "utf-8")
    notes, torn = tmp_path / "notes.txt", tmp_path / "torn.txt"
    notes.write_text("my notes\n", "utf-8")
    torn.write_text("my notes", "utf-8")
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(other.read_bytes() * 2)
    for given, out, told in (
        (changed, other, "answers no line of this batch"),
        (requests, notes, "no answer of a batch"),
        (requests, torn, "no answer of a batch"),
        (requests, twice, "answered twice"),
        (requests, requests, "the file of the requests"),
    ):
        before = out.read_bytes()
        assert run(given, out, model) == 1
        assert told in " ".join(capsys.readouterr().err.split()) and out.read_bytes() == before


@pytest.mark.parametrize(
    "left", [b"", b"{", b'{"id":"batch_req_', b"\0" * 100], ids=["whole", "brace", "begun", "nulls"]
)
def test_a_torn_line_is_cut_off_and_answered_anew(model: Path, tmp_path: Path, left: bytes) -> None:
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(map(line, "abc")), "utf-8")
    assert run(requests, out, model) == 0
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(whole[0] + whole[1] + left)
    assert run(requests, out, model) == 0
    assert out.read_bytes().startswith(whole[0] + whole[1])
    assert Counter(one["custom_id"] for one in answers(out)) == Counter("abc")


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_batch_that_is_killed_again_and_again_answers_each_line_once(model: Path, tmp_path: Path) -> None:
    n, kills, rng = 300, 3, random.Random(1)
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(line(f"r{number}") for number in range(n)), "utf-8")
    code = "import sys; from edgellm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "batch", str(requests), str(out), "-m", str(model), "-t", "1"]
    command += ["-c", "128", "--at-once", "4"]
    for _ in range(kills):
        before = out.stat().st_size if out.exists() else 0
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while child.poll() is None and (not out.exists() or out.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(0.1 * rng.random())
        child.kill()
        child.wait()
    done = out.read_bytes().count(b"\n")
    assert done > 0
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    found = answers(out)
    assert Counter(one["custom_id"] for one in found) == Counter(f"r{number}" for number in range(n))
    assert all(one["response"]["status_code"] == 200 for one in found)
