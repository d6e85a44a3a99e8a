"""LangChain's standard suite for chat models, by its clients of OpenAI, Anthropic and Ollama, over scripted answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_executor import scripted_llm
from served import served
from server_client import scripted_server
from tool_template import TOOL_TEMPLATE, call_text

pytest.importorskip("llguidance", reason="grammars need the extra: pip install edgellm[structured]")
suite = pytest.importorskip(
    "langchain_tests.integration_tests", reason="pip install langchain-tests and a client of LangChain"
)


def answer(prompt: str) -> str:
    """A call of the first tool where nobody called one yet, with arguments of the kinds that it names; else text."""
    _, tools, described = prompt.partition("<tools>")
    if not tools or "<tool_response>" in prompt:
        joke = '{"setup": "Why do cats sit on keys?", "punchline": "They like the mouse."}'
        return joke if "joke" in prompt.lower() else "Hello to you, it is done."
    function = json.JSONDecoder().raw_decode(described)[0]["function"]
    said = re.findall(r"'([^']+)'", prompt.rpartition("<|im_start|>user")[2])
    made = {"integer": 3, "number": 3.5, "boolean": True, "array": [], "object": {}}
    properties = function.get("parameters", {}).get("properties", {})
    arguments = {
        name: made.get(schema.get("type", ""), said[0] if said else "Rome") for name, schema in properties.items()
    }
    return call_text(function["name"], json.dumps(arguments, ensure_ascii=False))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(scripted_server(scripted_llm(answer, TOOL_TEMPLATE))) as address:
        yield address


def client(package: str, name: str) -> Any:
    """A chat model of LangChain; skips where its package is absent."""
    return getattr(pytest.importorskip(package, reason=f"pip install {package.replace('_', '-')}"), name)


class Suite(suite.ChatModelIntegrationTests):  # type: ignore[name-defined,misc]
    """What all three share."""

    __test__ = False
    pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("ignore")]
    package: tuple[str, str]
    options: dict[str, Any]

    @pytest.fixture(autouse=True)
    def _at(self, url: str) -> None:
        self.url = url

    @property
    def chat_model_class(self) -> Any:
        return client(*self.package)

    @property
    def chat_model_params(self) -> dict[str, Any]:
        filled = {name: value.format(url=self.url) for name, value in self.options.items() if isinstance(value, str)}
        return {"model": "scripted", "temperature": 0, **self.options, **filled}


class TestChatOpenAI(Suite):
    __test__ = True
    package = ("langchain_openai", "ChatOpenAI")
    options = {"base_url": "{url}/v1", "api_key": "none", "max_retries": 0, "stream_usage": True, "max_tokens": 256}

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestChatAnthropic(Suite):
    __test__ = True
    package = ("langchain_anthropic", "ChatAnthropic")
    options = {"base_url": "{url}", "api_key": "none", "max_retries": 0, "max_tokens": 256}


class TestChatOllama(Suite):
    __test__ = True
    package = ("langchain_ollama", "ChatOllama")
    options = {"base_url": "{url}", "num_predict": 256}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return False  # the protocol has none
