"""Programs that others wrote, against a real port: the official client, a generator of requests, an evaluation."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_executor import scripted_llm
from served import served
from server_client import entry, scripted_server

from edgellm.loading import LoadOptions
from edgellm.server.models import Models
from edgellm.server.server import Server

HELLO: Any = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[str, Server]]:
    server = Server(Models([entry()], LoadOptions(n_ctx=1024, n_parallel=4)))
    with served(server) as url:
        yield url, server


@pytest.fixture(scope="module")
def openai_client(real: tuple[str, Server]) -> Any:
    openai = pytest.importorskip("openai", reason="pip install openai")
    url, _ = real
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)


def test_the_official_client_reads_answers_strictly(openai_client: Any) -> None:
    """Its strict mode refuses what is not of its types."""
    asked: Any = {"model": "smollm2", "messages": HELLO, "max_tokens": 8, "temperature": 0, "logprobs": True}
    whole = openai_client.chat.completions.create(**asked, top_logprobs=2)
    chunks = list(openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert len(whole.choices[0].logprobs.content) == 8
    legacy: Any = {"model": "smollm2", "prompt": ["Two and", "One and"], "max_tokens": 4, "logprobs": 2, "seed": 1}
    legacy |= {"temperature": 0}
    text = openai_client.completions.create(**legacy)
    assert [choice.index for choice in text.choices] == [0, 1] and len(text.choices[0].logprobs.tokens) == 4
    plain = type(openai_client)(base_url=openai_client.base_url, api_key="none")  # strict forbids null here
    assert list(plain.completions.create(**legacy, stream=True))[-1].choices[0].finish_reason
    assert [model.id for model in openai_client.models.list()] == ["smollm2"]
    assert openai_client.models.retrieve("smollm2").id == "smollm2"


def test_the_official_client_has_an_exception_for_each_error(openai_client: Any) -> None:
    openai = pytest.importorskip("openai")

    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.chat.completions.create(model="nope", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        openai_client.chat.completions.create(model="smollm2", messages=HELLO, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as full:
        openai_client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "x " * 4000}])
    assert full.value.code == "context_length_exceeded"


def test_what_the_official_client_parses_keeps_its_schema(openai_client: Any) -> None:
    pytest.importorskip("llguidance", reason="grammars need the extra: pip install edgellm[structured]")
    pydantic = pytest.importorskip("pydantic", reason="pip install pydantic")

    class River(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        name: str = pydantic.Field(max_length=12)
        long: bool

    reply = openai_client.chat.completions.parse(model="smollm2", messages=HELLO, response_format=River, seed=1)
    assert isinstance(reply.choices[0].message.parsed, River)


def test_no_generated_request_is_a_server_error(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    server = scripted_server(scripted_llm(lambda prompt: "Yes.", n_ctx=512))
    tool = Path(sys.executable).with_name("schemathesis")
    with served(server) as url:
        options = ["--checks", "not_a_server_error", "--max-examples", "8", "--seed", "1", "--phases", "fuzzing"]
        options += ["--request-timeout", "60"]
        command = [str(tool), "run", f"{url}/openapi.json", *options]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    statuses = set(re.findall(r"\[(5\d\d)\]", run.stdout))
    assert "Test cases:" in run.stdout and statuses <= {"501"}, run.stdout[-3000:]  # 501 is what it says: not there


def test_lm_eval_gets_the_loglikelihoods_of_the_library(real: tuple[str, Server]) -> None:
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    completions = pytest.importorskip("lm_eval.models.openai_completions", reason="pip install 'lm-eval[api]'")
    instance = pytest.importorskip("lm_eval.api.instance", reason="pip install 'lm-eval[api]'")
    url, server = real
    warm = {"prompt": "x", "max_tokens": 1}
    httpx2 = pytest.importorskip("httpx2", reason="pip install httpx2")
    assert httpx2.post(f"{url}/v1/completions", json=warm, timeout=60).status_code == 200
    (model,) = server.models.loaded()
    assert model.llm is not None
    pairs = [("Rivers flow to the", " sea."), ("The capital of France is", " Paris"), ("1 2 3 4 5 6", " 7")]
    judge = completions.LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="smollm2", tokenizer_backend="remote", tokenized_requests=True
    )
    requests = [instance.Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    for (logprob, greedy), (context, continuation) in zip(judge.loglikelihood(requests), pairs, strict=True):
        score = model.llm.loglikelihood(context, continuation)
        assert logprob == pytest.approx(score.logprob, abs=1e-4) and greedy == score.is_greedy
