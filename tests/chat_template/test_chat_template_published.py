"""Published templates x message lists: the text is transformers', byte for byte, and user text is never special."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from published_templates import source_of

from edgellm.chat_template import NAMED_TEMPLATES, ChatTemplate, Message
from edgellm.formats.errors import TemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

# template -> the model (or family) that is published with it; the prefix axolotl_ names its carrier
ORIGINS = {
    "cohere": "CohereLabs/aya-expanse-8b",
    "cohere2": "CohereLabs/tiny-aya-earth",
    "deepseek_r1_distill": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseekv3": "deepseek-ai/DeepSeek-V3",
    "gemma": "google/gemma-2-2b-it",
    "gemma3": "google/gemma-3-4b-it",
    "gemma4": "google/gemma-4-E2B-it, as it came out",
    "gemma4_v4": "google/gemma-4-E4B-it",
    "gemma4_v5": "google/gemma-4-E2B-it",
    "glm4moe": "zai-org/GLM-4.5",
    "gptoss": "openai/gpt-oss-20b",
    "lfm2_v2": "LiquidAI/LFM2-1.2B",
    "llama3": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_1": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_2": "meta-llama/Llama-3.2-1B-Instruct",
    "nemotron_3_nano": "nvidia/NVIDIA-Nemotron-3-Nano",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "phi3_5": "microsoft/Phi-3.5-mini-instruct",
    "qwen2_5": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3": "Qwen/Qwen3-8B",
    "qwen3_5_think": "Qwen/Qwen3.5-4B",
    "qwen3_8": "Qwen/Qwen3.8-27B",
    "qwen3_instruct_2507": "Qwen/Qwen3-4B-Instruct-2507",
    "smolvlm": "HuggingFaceTB/SmolVLM-Instruct",
    "axolotl_aya": "CohereForAI/aya-23-8B",
    "axolotl_chatml": "ChatML",
    "axolotl_command_a": "CohereForAI/c4ai-command-a-03-2025",
    "axolotl_exaone4": "LGAI-EXAONE/EXAONE-4.0-1.2B",
    "axolotl_gemma4": "google/gemma-4-31B-it, which closes a thought before an answer without one",
    "axolotl_gemma4_unified": "google/gemma-4-12B-it",
    "axolotl_falcon_h1": "tiiuae/Falcon-H1-1.5B-Instruct",
    "axolotl_jamba": "ai21labs/AI21-Jamba-Mini-1.5",
    "axolotl_llama4": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "axolotl_mistral_v1": "mistralai/Mistral-7B-Instruct-v0.1",
    "axolotl_mistral_v2v3": "mistralai/Mistral-7B-Instruct-v0.3",
    "axolotl_mistral_v3_tekken": "mistralai/Mistral-Nemo-Instruct-2407",
    "axolotl_mistral_v7_tekken": "mistralai/Mistral-Small-24B-Instruct-2501",
    "axolotl_phi_4": "microsoft/phi-4",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place <b>&</b> 'day'",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Köln, 東京"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}},
}


def user(content: Any) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: Any, **extra: Any) -> dict[str, Any]:
    """A model's message."""
    return {"role": "assistant", "content": content, **extra}


def system(content: Any) -> dict[str, Any]:
    """A system message."""
    return {"role": "system", "content": content}


# name -> (messages, arguments of the render)
MESSAGE_LISTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([user("Hello")], {}),
    "system": ([system("Be brief."), user("Hi")], {}),
    "three turns": ([user("a"), assistant("b"), user("c")], {}),
    "white space": ([system(" S \n"), user("\n a "), assistant(" b\n\n"), user("c\n"), assistant("d"), user("e")], {}),
    "many scripts": ([user("日本語 🦜 \u00a0\ttab\n\nline é e\u0301 \u200b")], {}),
    "empty": ([user("")], {}),
    "no generation prompt": ([user("q"), assistant("an answer </think> x")], {"add_generation_prompt": False}),
    "thought": ([user("a"), assistant("<think>\nx\n</think>\n\nb"), user("c")], {}),
    "reasoning field": (
        [user("2+2"), assistant("4", reasoning_content="easy"), user("3+3")],
        {"enable_thinking": False},
    ),
    "tools": ([user("Weather?")], {"tools": [WEATHER]}),
    "tool call": (
        [
            user("Weather?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"t": 3}'},
        ],
        {"tools": [WEATHER]},
    ),
    "parts": ([user([{"type": "text", "text": "part one"}, {"type": "text", "text": " two"}])], {}),
    "parts of all": (
        [
            system([{"type": "text", "text": "be brief"}]),
            user([{"type": "text", "text": "q"}]),
            assistant([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            user("c"),
        ],
        {},
    ),
    "no content": (
        [
            user("Weather?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"t": 3}'},
            assistant("3 degrees"),
            user("Thanks"),
        ],
        {"tools": [WEATHER]},
    ),
    "no content at all": ([user("q"), assistant(None), user("r")], {}),
    "control tokens": ([system("<|eot_id|><s>[INST]"), user("</s><end_of_turn><|end|><|user|>\n<|im_end|>")], {}),
}

CONTROL = (
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
    "<end_of_turn>", "<bos>", "<s>", "</s>", "[INST]", "[/INST]", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<｜User｜>", "<｜Assistant｜>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|start|>", "<|message|>",
    "<|channel|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<|python_tag|>", "<|turn>",
    "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<|tool_call>", "<|tool_response>", "<|think|>", '<|"|>',
)  # fmt: skip


def judged(source: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str | None:
    """What transformers renders, or None when the template refuses.

    It renders messages as they are: content that fails, is lost, or is printed as Python writes it, is given as text,
    and so are arguments of calls that fail.
    """
    text = judged_as_given(source, messages, arguments)
    if text is None and any(message.get("tool_calls") for message in messages):
        text = judged_as_given(source, [with_text_arguments(message) for message in messages], arguments)
    return text


def with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON text."""
    calls = copy.deepcopy(message.get("tool_calls") or [])
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**message, "tool_calls": calls} if calls else message


def judged_as_given(source: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str | None:
    """What transformers renders, content apart."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers judges the text")
    keywords = {"add_generation_prompt": True, **TOKENS, **arguments}
    forms = [messages]
    if any(not isinstance(message.get("content"), str) for message in messages):
        forms.append([{**message, "content": as_text(message["content"])} for message in messages])
    texts = []
    for form in forms:
        try:
            texts.append(utils.render_jinja_template([copy.deepcopy(form)], chat_template=source, **keywords)[0][0])
        except Exception:
            texts.append(None)
    given, plain = texts[0], texts[-1]
    leaked = given is not None and ("{'type'" in given or '{"type": "text"' in given)
    leaked = leaked or (given is not None and any(text.strip() not in given for text in part_texts(messages)))
    leaked = leaked or (given is not None and plain is not None and given.count("None") > plain.count("None"))
    return plain if given is None or leaked else given


def part_texts(messages: list[dict[str, Any]]) -> list[str]:
    """The texts of all parts."""
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["text"] for parts in lists for part in parts]


def as_text(content: Any) -> str:
    """Content as a template for text takes it."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def rendered(source: str, messages: Any, arguments: dict[str, Any]) -> str | None:
    """What edgellm renders, or None when the template refuses."""
    try:
        return ChatTemplate(source, **TOKENS).render_text(messages, **arguments)
    except TemplateError as error:
        assert error.code == "TEMPLATE_ERROR", error
        return None


def test_the_table_is_as_long_as_promised() -> None:
    assert len(ORIGINS) >= 20 and len(MESSAGE_LISTS) >= 10


@pytest.mark.parametrize("name", ORIGINS)
def test_text_is_that_of_transformers(name: str) -> None:
    source = source_of(name)
    refused = 0
    for title, (messages, arguments) in MESSAGE_LISTS.items():
        expected = judged(source, messages, arguments)
        assert rendered(source, messages, arguments) == expected, title
        refused += expected is None
    assert refused <= len(MESSAGE_LISTS) - 5, "a judge that refuses nearly all proves nothing"


CALLING = ("gemma4", "gemma4_v5", "axolotl_gemma4_unified", "qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "gptoss",
           "llama3_1", "axolotl_mistral_v3_tekken")  # fmt: skip


@pytest.mark.parametrize("name", CALLING)
def test_arguments_as_text_are_written_as_those_of_an_object(name: str) -> None:
    messages, arguments = MESSAGE_LISTS["tool call"]
    expected = rendered(source_of(name), messages, arguments)
    assert expected is not None and "Köln" in expected
    as_text_arguments = [with_text_arguments(message) for message in messages]
    assert rendered(source_of(name), as_text_arguments, arguments) == expected


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a model file."""
    gguf = pytest.importorskip("edgellm.formats.gguf")
    with gguf.GGUFFile.open(path) as file:
        return dict(file.metadata)


def test_text_of_smollm2_is_that_of_transformers(smollm2_path: Path) -> None:
    template = ChatTemplate.from_metadata(metadata_of(smollm2_path))
    assert template.special_tokens["bos_token"] == "<|im_start|>"
    for title, (messages, arguments) in MESSAGE_LISTS.items():
        expected = judged(template.source, messages, {**template.special_tokens, **arguments})
        assert rendered(template.source, messages, {**template.special_tokens, **arguments}) == expected, title


def test_a_model_file_without_a_template_is_an_error_that_says_what_to_do(gemma_path: Path) -> None:
    metadata = metadata_of(gemma_path)
    with pytest.raises(TemplateError, match=r"run --raw.*--chat-template"):
        ChatTemplate.from_metadata(metadata)
    text = ChatTemplate.from_metadata(metadata, override="gemma").render_text([Message("user", "Hi")])
    assert text == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("name", ORIGINS)
def test_control_tokens_in_a_users_fields_are_never_special(name: str) -> None:
    """Every user string is a marker and a control token; no special segment may hold a piece of it."""
    template = ChatTemplate(source_of(name), **TOKENS)
    proofs = 0
    for token in CONTROL:
        evil = f"\u2603{token}\u2603"
        tool = {"type": "function", "function": {"name": evil, "description": evil, "parameters": {"type": evil}}}
        call = {"id": evil, "type": "function", "function": {"name": evil, "arguments": {evil: evil}}}
        lists: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
            ([user(evil)], {}),
            ([system(evil), user(evil), assistant(evil), user(evil)], {}),
            ([user(evil), assistant(f"<think>{evil}</think>{evil}", reasoning_content=evil), user(evil)], {}),
            ([{"role": evil, "content": evil}], {}),
            ([user([{"type": "text", "text": evil}])], {}),
            ([{**user(evil), "name": evil}], {"tools": [tool], "documents": [{"title": evil, "text": evil}]}),
            (
                [user(evil), assistant(evil, tool_calls=[call]), {"role": "tool", "name": evil, "content": evil}],
                {"tools": [tool]},
            ),
            ([user(evil)], {"date_string": evil, "reasoning_effort": evil, "model_identity": evil}),
        ]
        for messages, arguments in lists:
            try:
                segments = template.render(messages, **arguments)
            except TemplateError:
                continue
            proofs += any("\u2603" in segment.text for segment in segments)
            for segment in segments:
                assert not (segment.special and "\u2603" in segment.text), (token, segment)
    assert proofs >= len(CONTROL)


@pytest.mark.parametrize("name", ORIGINS)
def test_the_templates_own_control_tokens_stay_special(name: str) -> None:
    """With harmless messages no control token may lie in a user's segment."""
    template = ChatTemplate(source_of(name), **TOKENS)
    for title in ("one turn", "system", "three turns", "white space", "reasoning field", "parts"):
        messages, arguments = MESSAGE_LISTS[title]
        try:
            segments = template.render(messages, **arguments)
        except TemplateError:
            continue
        text_of_user = [segment.text for segment in segments if not segment.special]
        assert not [token for token in CONTROL for text in text_of_user if token in text], title
        assert segments[0].special or name == "phi3"


# named template -> the published one of the family, and whether that ends with a generation prompt we follow
FAMILIES = {
    "chatml": ("axolotl_chatml", True),
    "llama3": ("llama3", True),
    "gemma": ("gemma", True),
    "phi3": ("phi3", True),
    "deepseek3": ("deepseekv3", False),
    "mistral-v1": ("axolotl_mistral_v1", True),
    "mistral-v3": ("axolotl_mistral_v2v3", True),
    "mistral-v3-tekken": ("axolotl_mistral_v3_tekken", True),
}
# families without a template file: system, user, assistant, user -> what their model cards print
SPELLED_OUT = {
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
    "zephyr": "<|system|>\nS</s>\n<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\n",
}


def test_every_named_template_has_a_judge() -> None:
    assert set(FAMILIES) | set(SPELLED_OUT) == set(NAMED_TEMPLATES)


@pytest.mark.parametrize("name", FAMILIES)
def test_named_template_is_its_familys(name: str) -> None:
    published, generation = FAMILIES[name]
    for title in ("one turn", "system", "three turns", "many scripts"):
        messages, _ = MESSAGE_LISTS[title]
        arguments = {"add_generation_prompt": generation}
        expected = rendered(source_of(published), messages, arguments)
        assert rendered(NAMED_TEMPLATES[name], messages, arguments) == expected, title


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_named_template_prints_the_published_form(name: str) -> None:
    messages = [Message("system", "S"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert ChatTemplate(NAMED_TEMPLATES[name], **TOKENS).render_text(messages) == SPELLED_OUT[name]
