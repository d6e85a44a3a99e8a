"""The page in a real browser: chats stream, stop, branch and survive; what a model says is text; nothing leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources

import pytest
from browser import Page, chromium
from scripted_executor import scripted_llm
from served import served
from server_client import client_of, scripted_server

from edgellm.server.protocols import page as routes

MARKDOWN = """# A title

Some **bold**, *slanted* and `code` with a [link](https://example.com/a) and <b>no tags</b>.

1. one
2. two
   - inner

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<script>alert(1)</script>")
```

> quoted"""
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"> [a](javascript:document.title='owned') "
    "<script>document.title='owned'</script> ![p](https://example.com/p.png) [b](data:text/html,x) "
    + "> " * 200
    + "**a" * 200
)
RUNNING = "document.body.classList.contains('running')"
BODY = "document.querySelector('article.assistant:last-child .body')"


def test_the_page_is_served_to_browsers_with_a_policy_that_lets_nothing_else_in() -> None:
    with client_of(scripted_server(scripted_llm([]))) as client:
        page = client.get("/", headers={"accept": "text/html,*/*"})
        for name, kind in routes.TYPES.items():
            part = client.get(f"/page/{name}")
            assert (
                part.headers["content-type"] == kind and "default-src 'none'" in part.headers["content-security-policy"]
            )
        assert client.get("/page/../app.py").status_code == 404 and client.get("/page/index.html").status_code == 404
    assert (
        page.headers["content-type"].startswith("text/html") and "unsafe" not in page.headers["content-security-policy"]
    )


def test_the_files_of_the_page_name_no_other_place_and_make_no_html_of_text() -> None:
    folder = resources.files("edgellm.server").joinpath("page")
    files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    assert set(files) == {*routes.TYPES, "index.html"}
    for name, text in files.items():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}
        assert not found and not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|document\.write", text), name
    assert " style=" not in files["index.html"] and " on" not in re.sub(r">[^<]*<", "><", files["index.html"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


def opened(browser: Page, url: str) -> None:
    """The page with nothing remembered."""
    browser.open(url)
    browser.run("localStorage.clear()")
    browser.run("addEventListener('pagehide', event => event.stopImmediatePropagation(), true)")
    browser.problems.clear()
    browser.requested.clear()
    browser.open(f"{url}/?{id(url)}")
    browser.click("#prompt")


def ask(browser: Page, text: str) -> None:
    browser.click("#prompt")
    browser.type(text)
    browser.press("Enter")


def asked(browser: Page, text: str) -> None:
    """Ask and wait for the whole answer."""
    n = browser.run("document.querySelectorAll('article.assistant').length")
    ask(browser, text)
    browser.until(f"document.querySelectorAll('article.assistant').length > {n} && !{RUNNING}")


def text_of(browser: Page, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText.trim())")


def test_an_answer_is_shown_as_markdown_with_its_figures(browser: Page) -> None:
    with served(scripted_server(scripted_llm([MARKDOWN]))) as url:
        opened(browser, url)
        asked(browser, "Show me.")
        count = lambda selector: browser.run(f"{BODY}.querySelectorAll({json.dumps(selector)}).length")  # noqa: E731
        for selector in (
            "h2",
            "strong",
            "em",
            "p code",
            "ol > li",
            "li ul > li",
            "td.right",
            "blockquote",
            "figure pre",
        ):
            assert count(selector), selector
        assert count("b") == 0 and "<b>no tags</b>" in browser.run(f"{BODY}.innerText")
        assert browser.run(f"{BODY}.querySelector('pre').textContent") == 'print("<script>alert(1)</script>")'
        assert browser.run(f"{BODY}.querySelector('a').href") == "https://example.com/a"
        assert re.search(r"\d+ tokens · \d+ per second · prompt \d+", text_of(browser, ".figures")[0])
        assert not browser.problems and all(asked.startswith(url) for asked in browser.requested)


def test_what_a_model_says_stays_text(browser: Page) -> None:
    with served(scripted_server(scripted_llm([HOSTILE]))) as url:
        opened(browser, url)
        asked(browser, "<img src=x onerror=\"document.title='owned'\">")
        assert browser.run("document.title") == "edgellm"
        assert browser.run("document.querySelectorAll('article :is(img, script, iframe, b)').length") == 0
        addresses = browser.run("[...document.querySelectorAll('article a')].map(a => a.href)")
        assert addresses and all(address.startswith("https://example.com") for address in addresses)
        assert "onerror" in text_of(browser, ".bubble")[0]
        assert all(asked.startswith(url) for asked in browser.requested)


def test_escape_stops_an_answer_and_what_came_stays(browser: Page) -> None:
    llm = scripted_llm(["river " * 300, "Yes."])
    llm.executor.pause_s = 0.02  # type: ignore[attr-defined]
    with served(scripted_server(llm)) as url:
        opened(browser, url)
        ask(browser, "Go.")
        browser.until(f"{BODY}?.innerText.length > 20")
        browser.press("Escape")
        browser.until(f"!{RUNNING}")
        assert "stopped" in text_of(browser, ".figures")[0]
        said = text_of(browser, "article.assistant .body")[0]
        assert 20 < len(said) < 1500
        browser.open(f"{url}/?again")
        assert text_of(browser, "article.assistant .body") == [said]  # a reload brings it back
        asked(browser, "Again?")
        assert text_of(browser, "article.assistant .body") == [said, "Yes."]


def test_an_answer_that_never_came_is_not_told_to_the_model(browser: Page) -> None:
    llm = scripted_llm(["", "Yes."])
    with served(scripted_server(llm)) as url:
        opened(browser, url)
        asked(browser, "Are you there?")
        asked(browser, "Now?")
        assert text_of(browser, "article.assistant .body") == ["", "Yes."]
        prompt = llm.tokenizer.decode(llm.executor.script.prompts[-1], special=True)  # type: ignore[attr-defined]
    assert "Are you there?" in prompt and prompt.count("<|im_start|>assistant") == 1


def test_a_message_stays_in_the_input_while_there_is_no_model(browser: Page) -> None:
    with served(scripted_server(scripted_llm([]))) as url:
        opened(browser, url)
        browser.run("document.querySelector('#model').replaceChildren()")
        ask(browser, "Are you there?")
        assert "no model" in text_of(browser, "#notice")[0] and not text_of(browser, "article")
        assert browser.run("document.querySelector('#prompt').value") == "Are you there?"


def test_editing_and_answering_again_make_branches_to_turn_between(browser: Page) -> None:
    with served(scripted_server(scripted_llm(["One.", "Two.", "Three."]))) as url:
        opened(browser, url)
        asked(browser, "First?")
        browser.click("[aria-label='Answer again']")
        browser.until(f"{BODY}?.innerText === 'Two.' && !{RUNNING}")
        assert text_of(browser, "article.assistant .versions") == ["2 of 2"]
        browser.click("[aria-label='Earlier version']")
        assert text_of(browser, "article.assistant .body") == ["One."]
        browser.click("[aria-label='Edit and ask again']")
        browser.run("document.querySelector('.edit').value = ''")
        browser.type("Other?")
        browser.press("Enter")
        browser.until(f"{BODY}?.innerText === 'Three.' && !{RUNNING}")
        assert text_of(browser, ".bubble") == ["Other?"] and text_of(browser, ".versions") == ["2 of 2"]
        browser.click("[aria-label='Earlier version']")
        assert text_of(browser, ".bubble") == ["First?"] and text_of(browser, "article.assistant .body") == ["One."]
        assert not browser.problems


def test_tokens_show_their_probability_and_another_one_may_be_taken(browser: Page) -> None:
    llm = scripted_llm(["It is three degrees.", " Yes."])
    script = llm.executor.script  # type: ignore[attr-defined]
    with served(scripted_server(llm)) as url:
        opened(browser, url)
        asked(browser, "How warm?")
        browser.click("[aria-label='Tokens by probability']")
        assert text_of(browser, ".token") == ["It", "is", "three", "degrees", "."]
        browser.run("document.querySelector('.token').focus()")
        assert browser.run("!document.querySelector('#tokens').hidden")
        browser.press("ArrowRight")
        assert browser.run("document.activeElement.textContent") == " is"
        assert text_of(browser, "#tokens .row.taken .word") == ["·is"] and len(text_of(browser, "#tokens .row")) > 1
        browser.press("ArrowDown")
        assert browser.run("document.activeElement.className") == "row taken"
        browser.press("Escape")
        assert browser.run("document.querySelector('#tokens').hidden")
        browser.press("ArrowDown")
        other = browser.run("document.activeElement.nextElementSibling.querySelector('.word').textContent")
        browser.press("ArrowDown")
        browser.press("Enter")
        browser.until(f"{BODY}?.innerText.endsWith(' Yes.') && !{RUNNING}")
        assert text_of(browser, "article.assistant .versions") == ["2 of 2"]
        assert not browser.problems
    gone_on = llm.tokenizer.decode(script.prompts[1])
    assert gone_on.endswith("It" + other.replace("·", " ")) and "three" not in gone_on


def test_everything_can_be_reached_with_a_keyboard(browser: Page) -> None:
    with served(scripted_server(scripted_llm(["One."]))) as url:
        opened(browser, url)
        asked(browser, "First?")
        browser.run("document.activeElement.blur()")
        reached = []
        for _ in range(20):
            browser.press("Tab")
            reached.append(
                browser.run("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id")
            )
        for name in (
            "Chats",
            "model",
            "New chat",
            "Settings",
            "Answer again",
            "Tokens by probability",
            "prompt",
            "Send",
        ):
            assert name in reached, reached
        browser.run("document.querySelector('#open-settings').click()")
        assert browser.run("document.activeElement.name") == "system"
        browser.press("Escape")
        assert browser.run(
            "document.querySelector('#settings').hidden && document.activeElement.id === 'open-settings'"
        )


def test_settings_reach_the_server_and_are_remembered(browser: Page) -> None:
    llm = scripted_llm(["One two three four five."])
    script = llm.executor.script  # type: ignore[attr-defined]
    with served(scripted_server(llm)) as url:
        opened(browser, url)
        for name, value in (("system", "Speak like a pirate."), ("max_tokens", "2"), ("temperature", "0")):
            browser.run(
                f"(() => {{ const e = document.querySelector('[name={name}]'); e.value = {json.dumps(value)};"
                " e.dispatchEvent(new Event('input', {bubbles: true})); })()"
            )
        asked(browser, "Go.")
        assert text_of(browser, "article.assistant .body") == ["One two"]
        assert "stopped at the limit" in text_of(browser, ".figures")[0]
        browser.open(f"{url}/?again")
        assert browser.run("document.querySelector('[name=system]').value") == "Speak like a pirate."
        prompt = llm.tokenizer.decode(script.prompts[0])
    assert "Speak like a pirate." in prompt


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone_and_text_can_be_read(browser: Page, scheme: str) -> None:
    with served(scripted_server(scripted_llm([MARKDOWN + "\n\n" + "wide" * 200]))) as url:
        browser.resize(360, 640, mobile=True)
        browser.prefer(scheme)
        try:
            opened(browser, url)
            asked(browser, "W" * 300)
            assert browser.run("document.documentElement.scrollWidth") <= 360
            inside = "filter(e => !e.closest('pre, .table')).map(e => e.getBoundingClientRect().right)"
            assert browser.run(f"Math.max(...[...document.querySelectorAll('article *')].{inside})") <= 360
            ink, paper = (
                browser.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
            )
            assert contrast(ink, paper) > 7
            assert contrast(browser.run("getComputedStyle(document.querySelector('.figures')).color"), paper) > 4.5
        finally:
            browser.send("Emulation.clearDeviceMetricsOverride")
            browser.prefer("light")


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_storage_is_bounded_and_a_damaged_one_is_begun_anew(browser: Page) -> None:
    with served(scripted_server(scripted_llm(["One."]))) as url:
        opened(browser, url)
        size = browser.run(
            """import('/page/chats.js').then(({ Chats }) => {
                let kept = null;
                const storage = { getItem: () => kept, setItem: (key, text) => { kept = text; } };
                const chats = new Chats(storage);
                for (let n = 0; n < 130; n += 1) {
                    chats.begin();
                    const node = chats.add(chats.add('root', 'user', 'Q' + n).id, 'assistant', 'x'.repeat(30000));
                    node.tokens = Array.from({ length: 500 }, () => ['x', 0.5, [['x', 0.5]]]);
                    if (!chats.save()) return -1;
                }
                const again = new Chats(storage);
                return again.all.length > 20 && again.path()[0].text === 'Q129' ? kept.length : -2;
            })"""
        )
        assert 0 < size <= 2_000_000
        browser.run("localStorage.setItem('edgellm', '{broken')")
        browser.run("addEventListener('pagehide', event => event.stopImmediatePropagation(), true)")
        browser.open(f"{url}/?broken")
        asked(browser, "First?")
        assert text_of(browser, "article.assistant .body") == ["One."]


def test_a_server_with_a_key_asks_for_it(browser: Page) -> None:
    from edgellm.server.security import Access

    with served(scripted_server(scripted_llm(["One."]), access=Access(keys=("secret",)))) as url:
        browser.run("sessionStorage.clear()")
        browser.send("Page.navigate", url=f"{url}/")
        browser.until("document.querySelector('#notice')?.innerText.includes('API key')")
        assert browser.run("document.activeElement.name") == "key"
        browser.type("secret")
        browser.until("document.querySelector('#model').options.length > 0")
        asked(browser, "First?")
        assert text_of(browser, "article.assistant .body") == ["One."]
        browser.run("sessionStorage.clear()")
