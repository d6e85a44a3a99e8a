"""/v1/completions: prompts in four forms, and echo with logprobs as lm-evaluation-harness reads it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from server_client import client_of, events, real_server
from starlette.testclient import TestClient

from edgellm.llm import LLM
from edgellm.server.protocols import openai_completions
from edgellm.server.protocols.openai_completions import llama_timings
from edgellm.server.server import Server

__all__ = ["real_server"]

PATH = "/v1/completions"
PAIRS = [
    ("Rivers flow to the", " sea."),
    ("The capital of France is", " Paris, and the capital of Italy is Rome."),
    ("1 2 3 4 5 6 7", " 8"),
    ("Rivers flow to the", " purple under a 7"),
]


@pytest.fixture(scope="module")
def client(real_server: Server) -> Iterator[TestClient]:
    with client_of(real_server) as client:
        client.post(PATH, json={"prompt": "x", "max_tokens": 1})
        yield client


@pytest.fixture(scope="module")
def llm(client: TestClient, real_server: Server) -> LLM:
    (entry,) = real_server.models._given.values()  # type: ignore[union-attr]
    assert entry.llm is not None
    return entry.llm


def test_prompts_come_as_text_list_ids_or_lists_of_ids(client: TestClient, llm: LLM) -> None:
    texts = ["Name three rivers:", "Two and two is"]
    ids = [llm.tokenize(text, False) for text in texts]
    common = {"max_tokens": 6, "temperature": 0}
    alone = [client.post(PATH, json={"prompt": text, **common}).json()["choices"][0]["text"] for text in texts]
    for prompt, expected in ((texts, alone), (ids[0], alone[:1]), (ids, alone), ([texts[0]], alone[:1])):
        choices = client.post(PATH, json={"prompt": prompt, **common}).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(expected)))
        assert [choice["text"] for choice in choices] == expected


def test_echo_with_logprobs_is_the_loglikelihood_as_lm_eval_reads_it(client: TestClient, llm: LLM) -> None:
    prompts, starts, expected = [], [], []
    for context, continuation in PAIRS:
        whole, known = llm.tokenize(context + continuation, False), llm.tokenize(context, False)
        prompts.append(whole)
        starts.append(len(known))
        expected.append(llm.loglikelihood(context, continuation))
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    reply = client.post(PATH, json=body).json()
    for choice, start, ids, score in zip(reply["choices"], starts, prompts, expected, strict=True):
        rows = choice["logprobs"]
        assert rows["token_logprobs"][0] is None and len(rows["tokens"]) == len(ids) + 1
        said = rows["token_logprobs"][start:-1]
        assert sum(said) == pytest.approx(score.logprob, abs=1e-5)
        tops = rows["top_logprobs"][start:-1]
        assert all(one == max(top.values()) for one, top in zip(said, tops, strict=True)) == score.is_greedy
        assert choice["text"].startswith(llm.detokenize(ids))
        assert rows["text_offset"] == [len("".join(rows["tokens"][:n])) for n in range(len(rows["tokens"]))]


def test_the_one_token_of_an_echo_counts_even_when_it_ends_the_text(client: TestClient, llm: LLM) -> None:
    eos = llm.tokenizer.eos_id
    body: dict[str, Any] = {"prompt": llm.tokenize("Hello", False), "echo": True, "logprobs": 1, "max_tokens": 1}
    reply = client.post(PATH, json={**body, "logit_bias": {str(eos): 100_000}}).json()
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == len(body["prompt"]) + 1
    assert client.post(PATH, json={**body, "max_tokens": 0}).json()["choices"][0]["text"] == "Hello"


def test_echo_with_more_tokens_is_the_prompt_and_the_answer(client: TestClient) -> None:
    plain = client.post(PATH, json={"prompt": "Two and two", "max_tokens": 5, "temperature": 0, "logprobs": 2}).json()
    body = {"prompt": "Two and two", "max_tokens": 5, "temperature": 0, "logprobs": 2, "echo": True}
    whole = client.post(PATH, json=body).json()
    assert whole["choices"][0]["text"] == "Two and two" + plain["choices"][0]["text"]
    rows, answer = whole["choices"][0]["logprobs"], plain["choices"][0]["logprobs"]
    assert rows["token_logprobs"][-5:] == answer["token_logprobs"] and len(answer["tokens"]) == 5
    chunks = events(client.post(PATH, json={**body, "stream": True}).text)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    for column in rows:
        assert [one for part in told for one in part[column]] == rows[column]


def test_the_best_of_several_are_those_with_the_likeliest_tokens(client: TestClient) -> None:
    body = {"prompt": ["the", "an"], "max_tokens": 6, "seed": 3, "temperature": 1.5, "logprobs": 0}
    every = client.post(PATH, json={**body, "n": 5}).json()
    best = client.post(PATH, json={**body, "n": 2, "best_of": 5}).json()
    for first in (0, 5):
        rows = {choice["text"]: choice["logprobs"]["token_logprobs"] for choice in every["choices"][first : first + 5]}
        expected = sorted(rows, key=lambda text: -sum(rows[text]) / max(1, len(rows[text])))[:2]
        found = best["choices"][first // 5 * 2 :][:2]
        assert [choice["text"] for choice in found] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"] == every["usage"]  # what is made counts, chosen or not
    hidden = client.post(PATH, json={**body, "n": 2, "best_of": 5, "logprobs": None}).json()
    assert [(choice["text"], choice["logprobs"]) for choice in hidden["choices"]] == [
        (choice["text"], None) for choice in best["choices"]
    ]


def test_timings_are_those_of_the_first_choice(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    told, as_dict, order = list[Any](), openai_completions._Text.as_dict, itertools.count()

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        told.append(llama_timings(self.timings))
        return as_dict(self, *args, **options)

    monkeypatch.setattr(openai_completions._Text, "as_dict", noted)
    monkeypatch.setattr(openai_completions._Text, "likelihood", property(lambda self: next(order)))  # the last is best
    body = {"prompt": "the", "max_tokens": 4, "temperature": 1.5, "n": 2, "best_of": 3}
    assert client.post(PATH, json=body).json()["timings"] == told[0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": [1, "x"]}, "prompt[1]"),
        ({"prompt": ["x", 1]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
        ({"prompt": "x", "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_field(client: TestClient, body: Any, field: str) -> None:
    reply = client.post(PATH, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field
