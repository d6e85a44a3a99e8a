"""The judge is judged: a scripted model says what it was told to, whoever else is asking."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from scripted_executor import scripted_llm

HI = [{"role": "user", "content": "Hi"}]


def test_answers_come_in_turn_also_to_the_same_prompt() -> None:
    with scripted_llm(["Hello.", "Hello you.", "<x> third"], control=["<x>"]) as llm:
        assert llm.generate(HI) == "Hello."
        assert llm.generate(HI) == "Hello you."
        third = llm.generate(HI, special=True)
        assert third == "<x> third<|im_end|>" and third.finish_reason == "stop"


def test_many_at_once_get_each_their_own() -> None:
    def echo(prompt: str) -> str:
        return f"echo {prompt.rsplit('number', 1)[1][:4]}" * 20

    prompts = [[{"role": "user", "content": f"number {i:03}"}] for i in range(8)]
    with scripted_llm(echo, n_ctx=512) as llm, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(llm.generate, prompts))
    assert answers == [f"echo  {i:03}" * 20 for i in range(8)]
