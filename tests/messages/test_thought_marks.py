"""An answer as one text has the same marks around what was thought, whatever marks the model writes."""

from __future__ import annotations

import pytest
from scripted_executor import scripted_llm

from edgellm.generation import Generation
from edgellm.llm import LLM

MARKS = ("<think>", "</think>")
WANTED = "<think>\nHm. A river.\n</think>\n\nThe Danube."
QUESTION = [{"role": "user", "content": "Which river?"}]
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
KEPT = "{% if false %}<think>{{ messages[0].reasoning_content }}</think>{% endif %}"
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if false %}<|channel|>analysis<|message|>{% endif %}<|start|>assistant"
)
MARKERS = ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>", "<|call|>")
FORMS = {
    "the marks themselves": (TURNS + KEPT, f"{WANTED}", ()),
    "opened by the prompt": (TURNS + "<think>\n" + KEPT, WANTED.removeprefix("<think>\n"), ()),
    "channels of control tokens": (
        CHANNELS,
        "<|channel|>analysis<|message|>Hm. A river.<|end|><|start|>assistant<|channel|>final<|message|>The Danube.",
        MARKERS,
    ),
    "nothing thought": (TURNS, "The Danube.", ()),
}


def model(form: str, answers: int = 1) -> LLM:
    template, answer, control = FORMS[form]
    return scripted_llm([answer] * answers, template, control=control)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_text_and_the_tokens_stay(form: str) -> None:
    llm = model(form, 2)
    answer = Generation.of(llm.stream(QUESTION, thoughts=MARKS, logprobs=0))
    assert answer.text == ("The Danube." if form == "nothing thought" else WANTED)
    plain = Generation.of(llm.stream(QUESTION, logprobs=0))
    assert answer.tokens == plain.tokens and answer.timings.generation_n == plain.timings.generation_n
    assert [row.token for row in answer.logprobs] == list(answer.tokens)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_goes_on_from_any_token_as_if_it_had_not_been_cut(form: str) -> None:
    whole = Generation.of(model(form).stream(QUESTION, thoughts=MARKS))
    for n in range(1, len(whole.tokens)):
        llm = scripted_llm([[*whole.tokens[n:], 2]], FORMS[form][0], control=FORMS[form][2])
        prompt, begun = llm.prompt_ids(QUESTION), list(whole.tokens[:n])
        text = llm.answer_text(prompt, begun, MARKS)
        rest = Generation.of(llm.stream([*prompt, *begun], thoughts=MARKS, begun=n))
        assert text + rest.text == whole.text, n
