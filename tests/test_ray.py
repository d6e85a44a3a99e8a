"""Ray: answers survive their replicas, a prompt goes where its beginning has been read, and stages make one model."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray is an extra: pip install edgellm[ray]")
pytest.importorskip("gguf", reason="the judge of files: pip install gguf")

from adapter_files import lora_pairs, write_lora
from ray_cluster import cluster as cluster
from tiny_models import write_tiny_model

import edgellm
import edgellm.ray
from edgellm.cli import main
from edgellm.formats.errors import DeviceLostError, EdgeLLMError, FormatError, ParameterError, UnsupportedError
from edgellm.loading import LoadOptions
from edgellm.server.security import Access

with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = free.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
N_TOKENS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("ray") / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1, context_length=1024
    )


@pytest.fixture(scope="module")
def served(cluster: Any, model: Path) -> Iterator[None]:
    """Two replicas behind one address."""
    from ray import serve

    how = LoadOptions(n_ctx=1024, n_parallel=4, n_threads=1)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"log_level": "ERROR"})
    serve.run(edgellm.ray.app(str(model), options=how, access=Access(), replicas=2), name="edgellm")
    yield
    serve.shutdown()


def opened(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def replicas() -> list[str]:
    import ray

    return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "#model-tiny#" in one["name"]]


def test_a_stream_survives_all_its_replicas(served: None, model: Path) -> None:
    import ray

    body = {"model": "tiny", "prompt": "the rain", "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
    with edgellm.load(model, n_ctx=1024, n_threads=1) as llm:
        options = {"max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
        expected = str(llm.generate(llm.tokenize("the rain", True, True), **options))
    events: list[Any] = []
    with opened("/v1/completions", {**body, "stream": True}) as reply:
        for raw in reply:
            if not raw.startswith(b"data: "):
                continue
            events.append(raw[6:].decode().strip())
            if len(events) == 5:
                before = replicas()
                for name in before:
                    ray.kill(ray.get_actor(name, namespace="serve"))
    assert events.pop() == "[DONE]" and len(before) == 2
    told = [json.loads(event) for event in events]
    assert "".join(event["choices"][0]["text"] for event in told) == expected
    assert len({event["id"] for event in told}) == 1
    assert [event["choices"][0]["finish_reason"] for event in told if event["choices"][0]["finish_reason"]] == [
        "length"
    ]
    with opened("/v1/completions", body) as reply:
        assert json.load(reply)["choices"][0]["text"] == expected
    assert not set(before) & set(replicas())


def test_a_prompt_goes_where_its_beginning_has_been_read(served: None) -> None:
    rng = random.Random(2)
    texts = [" ".join(rng.choices(["rain", "wind", "sea", "house", "in", "the", "and"], k=60)) for _ in range(6)]
    shares = []
    for _ in range(3):
        rng.shuffle(texts)
        for number, text in enumerate(texts):
            with opened("/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": 1}) as reply:
                usage = json.load(reply)["usage"]
            shares.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
            texts[number] = f"{text} and more of it"
    assert min(shares[6:]) > 0.7, "every later turn finds the earlier one"


def test_every_protocol_is_there(served: None) -> None:
    question = [{"role": "user", "content": "rain?"}]
    for path, body in (
        ("/v1/chat/completions", {"model": "tiny", "messages": question, "max_tokens": 4}),
        ("/v1/messages", {"model": "tiny", "messages": question, "max_tokens": 4}),
        ("/api/chat", {"model": "tiny:latest", "messages": question, "options": {"num_predict": 4}}),
        ("/v1/responses", {"model": "tiny", "input": "rain?", "max_output_tokens": 4}),
        ("/v1/embeddings", {"model": "tiny", "input": "rain"}),
        ("/tokenize", {"content": "rain"}),
    ):
        with opened(path, body) as reply:
            assert reply.status == 200 and json.loads(reply.read().splitlines()[-1])
    for path in ("/v1/models", "/health", "/openapi.json", "/api/tags"):
        with opened(path) as reply:
            assert reply.status == 200


def test_an_update_loses_no_request_and_mixes_no_two_models(served: None, model: Path, tmp_path: Path) -> None:
    from ray import serve

    other = write_tiny_model(tmp_path / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1, seed=1)
    body = {"model": "tiny", "prompt": "the rain", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    may = []
    for path in (model, other):
        with edgellm.load(path, n_ctx=256, n_threads=1) as llm:
            options = {"max_tokens": 48, "temperature": 0, "ignore_eos": True}
            may.append(str(llm.generate(llm.tokenize("the rain", True, True), **options)))
    assert may[0] != may[1]
    before, has_begun, is_over = replicas(), threading.Event(), threading.Event()

    def ask_on() -> list[str]:
        texts = []
        while not is_over.is_set():
            with opened("/v1/completions", {**body, "stream": True}) as reply:
                events = [raw[6:].decode() for raw in reply if raw.startswith(b"data: ")]
            assert events.pop().strip() == "[DONE]"
            texts.append("".join(json.loads(event)["choices"][0]["text"] for event in events))
            has_begun.set()
        return texts

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on) for _ in range(3)]
        try:
            assert has_begun.wait(120)
            how = LoadOptions(n_ctx=256, n_parallel=4, n_threads=1)
            serve.run(edgellm.ray.app(str(other), options=how, access=Access(), replicas=2), name="edgellm")
        finally:
            is_over.set()
        texts = [text for one in asking for text in one.result()]
    assert set(texts) <= set(may) and may[0] in texts
    assert not set(before) & set(replicas())
    with opened("/v1/completions", body) as reply:
        assert json.load(reply)["choices"][0]["text"] == may[1]


def test_replicas_follow_their_requests_and_what_these_want_of_the_cache() -> None:
    from edgellm.ray.scaling import KV, QueueAndCache

    policy = QueueAndCache(target_kv=0.8)
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    for current, requests, wanted, expected in (
        (0, 9, {}, 1),  # none runs: as many as there shall be
        (1, 2, {}, 0.5),
        (1, 10, {"a": 0.4}, 2.5),
        (1, 2, {"a": 1.6}, 2),
        (3, 6, {"a": 0.2, "b": 0.1, "c": 0.1}, 1.5),
        (3, 6, {"a": 0.9, "b": 0.8, "c": 0.9}, 3.25),
    ):
        context: Any = SimpleNamespace(
            current_num_replicas=current, target_num_replicas=1, total_num_requests=requests, config=config,
            aggregated_metrics={KV: wanted} if wanted else None,
        )  # fmt: skip
        assert policy(context) == (pytest.approx(expected), {})
    told = edgellm.ray.app("tiny", access=Access(), replicas=(1, 3), target_kv=0.5)._bound_deployment
    scaling = told.init_args[-1]._bound_deployment._deployment_config.autoscaling_config
    assert scaling.policy.policy_kwargs == {"target_kv": 0.5} and scaling.policy.get_policy()(0.5)(context)[0] == 5.2


def test_the_router_prefers_the_longest_prefix_that_is_not_too_busy() -> None:
    import asyncio

    from edgellm.ray.prefix_router import PrefixRouter
    from edgellm.ray.same_file import Made

    router = PrefixRouter.__new__(PrefixRouter)
    router.initialize_state(n_keys=100, slack=2)
    loads: dict[str, int] = {}
    router._replica_queue_len_cache = loads
    some = [SimpleNamespace(replica_id=name, routing_stats={}, replica_metadata={}) for name in "abc"]
    some[1].routing_stats = {"prefixes": [1, 2, 3]}

    def chosen(keys: list[int], front: Any = None, begun: bool = False) -> list[list[str]]:
        call, context = SimpleNamespace(begun=begun), SimpleNamespace(should_backoff=False)
        request: Any = SimpleNamespace(args=[call], kwargs={"prefix": keys, "front": front}, routing_context=context)
        ranks = asyncio.run(router.choose_replicas(some, request))
        assert context.should_backoff, "it asks again after a while, and not at once"
        return [[one.replica_id for one in rank] for rank in ranks]

    assert chosen([1, 2, 9])[0] == ["b"] and len(chosen([1, 2, 9])) == 2
    assert len(chosen([9])) == 1 and len(chosen([9])[0]) == 2
    router.on_request_routed(SimpleNamespace(kwargs={"prefix": [1, 2, 9]}), "c", None)
    assert chosen([1, 2, 9])[0] == ["c"] and chosen([1, 2, 3])[0] == ["b"]
    loads["c"] = 3
    assert len(chosen([1, 2, 9])) == 1, "it has more to do than the idlest and two"
    loads.update(a=1, b=1)
    assert chosen([1, 2, 9])[0] == ["c"]
    # while an update replaces them
    for one, made in zip(some, (("old", "x"), ("new", "y"), ("old", "y")), strict=True):
        one.replica_metadata = dict(zip(("version", "files"), made, strict=True))
    for front, begun, may in (
        (Made("old", "x"), False, "ab"),
        (Made("new", "y"), True, "bc"),
        (Made("old", "z"), False, "b"),
        (Made("old", "z"), True, "abc"),  # who is asked refuses it
    ):
        assert {one for rank in chosen([1, 2, 9], front, begun) for one in rank} <= set(may), (front, begun)
    router.by_prefix = False
    assert len(chosen([1, 2, 9])) == 1


def test_what_cannot_be_meant_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for wrong in ({"replicas": 0}, {"replicas": (2, 1)}, {"target_kv": 0}, {"target_kv": 2}):
        with pytest.raises(ParameterError):
            edgellm.ray.app("tiny", access=Access(), **wrong)
    with pytest.raises(ParameterError, match="no model"):
        edgellm.ray.app(access=Access())
    with pytest.raises(ParameterError, match="access is missing"):
        edgellm.ray.app("tiny")
    for arguments, told in (
        (["--ray"], "--ray needs the models by name"),
        (["smollm2", "--rate-limit", "3"], "go with --ray"),
        (["smollm2", "--ray", "--cache-dir", "x"], "--cache-dir is of one server"),
        (["smollm2", "--ray", "--keep-alive", "-1"], "--keep-alive is of one server"),
        (["smollm2", "--ray", "--alias", "x"], "--alias is of one server"),
        (["smollm2", "--ray", "--memory", "2"], "--memory is of one server"),
        (["smollm2", "--ray", "--port", "0"], "--port 0 does not go with --ray"),
        (["smollm2", "--ray", "--replicas", "3-1"], "the least and the most"),
    ):
        assert main(["serve", *arguments]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
    files = [__file__, str(tmp_path / "answers")]
    for arguments, told in (
        (["--ray"], "--ray needs the models by name"),
        (["-m", "smollm2", "--ray", "--memory", "2"], "--memory is of one server"),
        (["-m", "smollm2", "--workers", "2"], "--workers goes with --ray"),
    ):
        assert main(["batch", *files, *arguments]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


def test_cpus_that_others_have_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch, deep: Path) -> None:
    import ray

    from edgellm.ray import pipeline, room, running

    free = [0.0, 0.0, 4.0]
    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free.pop(0) if len(free) > 1 else free[0]})
    assert room.cpus_wanting(4) is None, "what has just been let go of counts"
    assert room.cpus_wanting(5) == "4 of the cluster's 4 are free"
    monkeypatch.setattr(room, "PATIENCE_S", 0.0)
    free[:] = [1.0]
    with pytest.raises(ParameterError, match="want 2 CPUs, and 1 of the cluster's 4 are free"):
        pipeline.pipeline(deep, 2, options=LoadOptions(n_threads=1))
    with pytest.raises(EdgeLLMError, match="want 2 CPUs, and 1 of the cluster's 4 are free"):
        running._check_room(1, (2, 4), 1)


def test_a_stage_that_finds_no_machine_is_named_with_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from edgellm.ray.pipeline import _wait_for_places

    def get(what: Any, timeout: float) -> str:
        if what == "second":
            raise ray.exceptions.GetTimeoutError("not yet")
        return "a node"

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0, "memory": 1e9})
    first, second = (
        SimpleNamespace(node=SimpleNamespace(remote=lambda name=name: name)) for name in ("first", "second")
    )
    with pytest.raises(DeviceLostError, match=r"Stage 1 .* wants {'CPU': 2}, and the cluster has {'CPU': 3.0} free"):
        _wait_for_places([first, second], {"CPU": 2})


def test_who_is_too_many_is_told_so_and_does_not_wait_in_the_proxy() -> None:
    import asyncio

    from ray.serve.exceptions import BackPressureError

    from edgellm.ray.same_file import Made
    from edgellm.ray.serving import _send
    from edgellm.server.relay import Failed

    gate = edgellm.ray.app("tiny", access=Access(), max_requests=1024)._bound_deployment
    assert gate.max_ongoing_requests > 1024 and 0 < gate.max_queued_requests <= 1024
    replicas = gate.init_args[-1]._bound_deployment
    assert 0 < replicas.max_queued_requests <= 1024

    async def full(*_: Any, **__: Any) -> Any:
        raise BackPressureError(1, 1)
        yield

    answer = SimpleNamespace(remote=full)
    handle = SimpleNamespace(options=lambda **_: SimpleNamespace(answer=answer))

    async def asked() -> list[Any]:
        call: Any = None
        return [part async for part in _send({"tiny": (handle, Made("now", "hash"))}, "tiny", call, ())]

    (failed,) = asyncio.run(asked())
    assert isinstance(failed, Failed) and failed.status == 503 and failed.headers["retry-after"]


def test_a_replica_counts_requests_and_not_their_answers_and_refuses_those_of_another_file(model: Path) -> None:
    import asyncio

    from edgellm.ray.same_file import Made, proved
    from edgellm.ray.serving import Replica
    from edgellm.server.relay import Failed, RelayedCall, Whole

    async def ask_all() -> list[Any]:
        replica, how = Replica.__new__(Replica), LoadOptions(n_ctx=256, n_parallel=4, n_threads=1)
        await replica.__init__(str(model), how, 64, "now")  # type: ignore[misc]
        for task in replica._tending:
            task.cancel()
        body = {"prompt": "the", "max_tokens": 1, "n": 16}
        call = RelayedCall("POST", "/v1/completions", json.dumps(body).encode(), {}, {}, {}, bytes(16), 0.0)

        async def last() -> Any:
            return [part async for part in replica.answer(call)][-1]

        found = await asyncio.gather(*(last() for _ in range(8)))
        right, begun = Made("now", proved(model, how)), call._replace(begun=True)
        assert await replica.record_replica_metadata() == right._asdict()
        for asking, front, status, told in (
            (call, right, 200, ""),
            (begun, right._replace(version="before"), 200, ""),
            (call, Made("before", "other files"), 200, ""),  # an update goes on
            (begun, Made("before", "other files"), 503, "was replaced in the midst"),
            (call, Made("now", "other files"), 500, "other files of the model"),
        ):
            (*_, part) = [part async for part in replica.answer(asking, (), front)]
            assert part.status == status
            assert isinstance(part, Failed) == (status != 200) and told in getattr(part, "message", "")
        assert (await replica.record_autoscaling_stats())["kv_wanted"] >= 0
        await replica.server.models.close()
        return found

    assert all(isinstance(part, Whole) and part.status == 200 for part in asyncio.run(ask_all()))


def test_a_server_that_listens_elsewhere_gets_no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.ray import cluster, running

    done: list[str] = []

    def there(host: str, port: int) -> None:
        config = SimpleNamespace(host=host, port=port)
        monkeypatch.setattr(running, "_get_global_client", lambda: SimpleNamespace(http_config=config))

    def note(name: str) -> Any:
        return lambda *_, **__: done.append(name)

    monkeypatch.setattr(cluster.ray, "init", lambda address, **_: done.append(address))
    monkeypatch.setattr(cluster.ray, "shutdown", note("leave"))
    monkeypatch.setattr(running, "named", lambda *_: ())
    deployed: list[float | None] = [None]
    monkeypatch.setattr(running, "_deployed", lambda: deployed.pop(0) if len(deployed) > 1 else deployed[0])
    monkeypatch.setattr(running, "_end", note("end"))
    monkeypatch.setattr(running, "_check_room", lambda *_: None)
    for name in ("start", "run"):
        monkeypatch.setattr(running.serve, name, note(name))

    def stop(url: str) -> None:
        raise KeyboardInterrupt

    arguments: Any = (("tiny",), "127.0.0.1", 8080, "auto", stop)
    for host, port in (("0.0.0.0", 8080), ("127.0.0.1", 8000)):
        there(host, port)
        with pytest.raises(EdgeLLMError, match=f"already, at {host}:{port}, and not at 127.0.0.1:8080"):
            running.run(*arguments, access=Access())
        assert done == ["auto", "start", "leave"], "an application of another's is left to it"
        done.clear()
    there("127.0.0.1", 8080)
    with pytest.raises(KeyboardInterrupt):
        running.run(*arguments, access=Access())
    assert done == ["auto", "start", "run", "end", "leave"]
    for deployed[:], is_ended in (([None, 1.0, 1.0], True), ([None, 1.0, 2.0], False), ([1.0, 2.0, 2.0], True)):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            running.run(*arguments, access=Access())
        assert ("end" in done) == is_ended, "an application that has replaced this one goes on"
    deployed[:] = [None]
    # without an address a cluster is started, whatever runs here or RAY_ADDRESS says
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        running.run(("tiny",), "127.0.0.1", 8080, None, stop, access=Access())
    assert done == ["local", "start", "run", "end", "leave"]


def test_files_are_proved_before_a_cluster_is_started_and_those_beside_the_model_count(
    model: Path, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.adapters.loading import AdapterChoice
    from edgellm.ray import cluster, running
    from edgellm.ray.same_file import proved

    def start(**_: Any) -> None:
        raise AssertionError("nothing starts")

    monkeypatch.setattr(cluster.ray, "init", start)
    one, two = (tmp_path / f"{name}.gguf" for name in ("one", "two"))
    for seed, path in enumerate((one, two)):
        write_lora(path, lora_pairs(model, ("attn_q.weight",), seed=seed))
    wrong: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "none.gguf", {}),
        (model, {"draft": one}),
        (model, {"lora": (AdapterChoice(model),)}),
        (deep, {"speculate": "mtp"}),
    ]
    for path, options in wrong:
        how = LoadOptions(n_ctx=128, **options)
        with pytest.raises(EdgeLLMError):
            running.run((str(path),), "127.0.0.1", 8080, None, print, access=Access(), options=how)
    plain = LoadOptions(n_ctx=128)
    beside = [{}, {"draft": deep}, {"lora": (AdapterChoice(one),)}, {"lora": (AdapterChoice(two),)}]
    assert len({proved(model, replace(plain, **options)) for options in beside}) == 4
    monkeypatch.chdir(tmp_path)
    how = LoadOptions(draft="two.gguf", lora=(AdapterChoice(Path("one.gguf")),))
    names, how = cluster.from_anywhere(("one.gguf", "smollm2"), how)
    assert names == (str(one), "smollm2") and how.draft == two and how.lora[0].path == one


# --- a batch -------------------------------------------------------------------------------------------------


def test_a_batch_by_workers_that_are_lost_answers_each_line_once(cluster: Any, model: Path, tmp_path: Path) -> None:
    import asyncio

    import ray

    from edgellm.ray.batch import Workers
    from edgellm.server.batch import answer_batch
    from edgellm.server.batch_file import Answers, Requests

    n, kills = 150, [30, 60, 100]
    bodies = [{"model": "tiny", "prompt": f"the {number}", "max_tokens": 4, "temperature": 0} for number in range(n)]
    lines = [
        json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body})
        for number, body in enumerate(bodies)
    ]
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join([*lines, "no JSON", lines[0].replace("r0", "none").replace("tiny", "none")]), "utf-8")
    how = LoadOptions(n_ctx=128, n_parallel=4, n_threads=1)

    async def run(requests: Requests, answers: Answers) -> Any:
        workers = Workers([str(model)], how, 2)

        def progress(done: int, of: int) -> None:
            if kills and done >= kills[0]:
                kills.pop(0)
                ray.kill(workers.actors[len(kills) % 2], no_restart=False)

        try:
            return await answer_batch(workers, requests, answers, progress, at_once=8)
        finally:
            await workers.close()

    for n_new in (n + 2, 0):
        with Requests(given) as requests, Answers(out, {place.id for place in requests.places}) as answers:
            outcome = asyncio.run(run(requests, answers))
        assert (outcome.n_lines - outcome.n_before, outcome.n_left) == (n_new, 0)
    assert not kills
    found = [json.loads(text) for text in out.read_text("utf-8").splitlines()]
    expected = ["", "none", *(f"r{number}" for number in range(n))]
    assert sorted(one["custom_id"] or "" for one in found) == sorted(expected)
    with edgellm.load(model, n_ctx=128, n_threads=1) as llm:
        for one in found:
            if (one["custom_id"] or "none") != "none":
                text = llm.tokenize(bodies[int(one["custom_id"][1:])]["prompt"], True, True)
                told = one["response"]["body"]["choices"][0]["text"]
                assert told == str(llm.generate(text, max_tokens=4, temperature=0)), one["custom_id"]


def test_a_worker_with_another_file_stops_the_batch(model: Path) -> None:
    import asyncio

    from edgellm.ray.batch import Worker

    worker = Worker([str(model)], LoadOptions(n_ctx=128, n_threads=1), {"tiny": "that of another file"})

    async def load() -> None:
        try:
            await worker.load("tiny")
        finally:
            await worker._here.close()

    with pytest.raises(FormatError, match="another file than that of whoever writes the answers"):
        asyncio.run(load())


# --- a pipeline of stages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    return write_tiny_model(folder / "deep.gguf", n_layer=4, n_embd=64, n_ff=64, n_head=1, n_head_kv=1)


def test_a_pipeline_answers_as_one_machine_also_when_a_stage_is_gone(cluster: Any, deep: Path) -> None:
    import ray

    from edgellm.ray.pipeline import pipeline

    prompts = [f"the {word} in the house" for word in ("rain", "sea", "wind", "sun", "snow")]
    greedy = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    drawn = {"max_tokens": 20, "temperature": 1.5, "seed": 3}
    with edgellm.load(deep, n_ctx=128, n_threads=1) as llm:
        expected = [llm.generate(text, **greedy).tokens for text in prompts]
        by_seed = llm.generate(prompts[0], **drawn).tokens
    options = LoadOptions(n_ctx=128, n_threads=1, n_parallel=2)
    with pipeline(deep, 2, options=options) as model:
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(lambda text: model.generate(text, **greedy).tokens, prompts))
        assert found == expected and model.generate(prompts[0], **drawn).tokens == by_seed
        assert len({id(lane.engine) for lane in model.lanes}) == 2
        first, second = model.facts()
        assert first.layers == (0, 1) and second.layers == (2, 4)
        assert second.weights_nbytes < sum(tensor.nbytes for tensor in model.program.tensors.values())
        tokens, chunks = [], model.stream(prompts[1], **greedy)
        for chunk in chunks:
            if chunk.token is not None:
                tokens.append(chunk.token)
            if len(tokens) == 5:
                ray.kill(model.stages[1])
        assert tuple(tokens) == expected[1] and model.n_restarts == 1
        assert [model.generate(text, **greedy).tokens for text in prompts] == expected
        assert model.n_restarts == 1
        with pytest.raises(UnsupportedError, match="other machines"):
            list(model.stream("a", max_tokens=1, hook=lambda *_: None))


def test_what_stages_do_not_know_is_refused_by_name(cluster: Any, deep: Path) -> None:
    from edgellm.ray.pipeline import pipeline

    for name, value in (("speculate", "ngram"), ("cache_dir", deep.parent), ("executor", "reference")):
        with pytest.raises(UnsupportedError, match=name):
            pipeline(deep, 2, options=LoadOptions(**{name: value}))
    with pytest.raises(ParameterError, match="want 80 CPUs"):
        pipeline(deep, 2, options=LoadOptions(n_threads=40))


def test_stages_share_the_weights_evenly_and_each_has_a_layer(deep: Path) -> None:
    from edgellm.loading import open_program
    from edgellm.ray.pipeline import stage_sides

    with open_program(deep) as (gguf, program):
        for n in (1, 2, 3, 4):
            sides = stage_sides(program, n)
            assert list(sides) == sorted(sides) and set(sides) == set(range(n))
        for n in (0, 5):
            with pytest.raises(ParameterError, match="4 layers"):
                stage_sides(program, n)
    gguf.close()


def test_a_stage_takes_no_other_file_than_that_of_who_starts_it(deep: Path, tmp_path: Path) -> None:
    import numpy as np

    from edgellm.loading import open_program
    from edgellm.ray.pipeline import Stage, stage_sides
    from edgellm.ray.same_file import file_hash

    with open_program(deep) as (gguf, program):
        expected, sides = file_hash(gguf), stage_sides(program, 2)
        last = max(tensor.data.__array_interface__["data"][0] for tensor in gguf.tensors.values())
        raw = deep.read_bytes()
        (tensor,) = [one for one in gguf.tensors.values() if one.data.__array_interface__["data"][0] == last]
        at = raw.rindex(np.ascontiguousarray(tensor.data).tobytes())
    gguf.close()
    same, weights, metadata = (tmp_path / f"{name}.gguf" for name in ("same", "weights", "metadata"))
    same.write_bytes(raw)
    weights.write_bytes(raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :])
    metadata.write_bytes(raw.replace(b"general.name", b"general.mane", 1))
    how: Any = (None, 128, sides, 1, (8,), 1, 64, expected)
    Stage(0).load(str(same), *how)
    for path in (weights, metadata):
        with pytest.raises(FormatError, match=f"{path.name} on .* is another file than that of whoever starts"):
            Stage(0).load(str(path), *how)


def test_without_ray_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; from edgellm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "smollm2", "--ray"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "pip install 'edgellm[ray]'" in run.stderr


class FakeWorker:
    """An actor by its two methods, which may fail as Ray lets them."""

    def __init__(self, load: Exception | None = None, answer: Exception | None = None) -> None:
        def method(wrong: Exception | None, found: Any) -> Any:
            async def call(*_: Any) -> Any:
                await asyncio.sleep(0.01)
                if wrong is not None:
                    raise wrong
                return found

            return SimpleNamespace(remote=call)

        self.load, self.answer = method(load, None), method(answer, (b"{}", False))


def fake_workers(monkeypatch: pytest.MonkeyPatch, *actors: FakeWorker) -> Any:
    from edgellm.ray import batch

    left = iter(actors)
    made = SimpleNamespace(remote=lambda *_: next(left))
    monkeypatch.setattr(batch, "cpus_wanting", lambda n: None)
    monkeypatch.setattr(batch, "named", lambda *_: [])
    monkeypatch.setattr(batch.ray, "remote", lambda _: SimpleNamespace(options=lambda **_: made))
    return batch.Workers([], LoadOptions(), len(actors))


def its_error(text: str) -> Exception:
    from ray.exceptions import RayTaskError

    return RayTaskError("load", "", EdgeLLMError(text))


@pytest.mark.parametrize("wrong", [{"load": "no room"}, {"answer": "another file"}], ids=str)
def test_a_worker_that_cannot_load_the_model_is_left_out_of_a_batch(
    wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.server.batch_file import Place

    bad = {method: its_error(text) for method, text in wrong.items()}

    async def answered(*actors: FakeWorker) -> list[Any]:
        workers = fake_workers(monkeypatch, *actors)
        await workers.load("m")
        places = [Place(i, 0, 1, str(i), "m") for i in range(8)]
        return await asyncio.wait_for(asyncio.gather(*(workers.answer(place, b"") for place in places)), 60)

    assert len(asyncio.run(answered(FakeWorker(), FakeWorker(**bad)))) == 8
    with pytest.raises(EdgeLLMError, match="|".join(wrong.values())):
        asyncio.run(answered(FakeWorker(**bad), FakeWorker(**bad)))
