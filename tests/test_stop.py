"""Stop strings: the text is the same however it was cut, and exactly what may become a stop string is held."""

from __future__ import annotations

import random

import pytest

from edgellm.formats.errors import ParameterError
from edgellm.stop import MAX_STOP_LENGTH, MAX_STOP_STRINGS, StopMatcher, stop_strings


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The answer one character at a time: the first end at which some stop string is complete, the longest of them."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def stream(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces:
        out.append(matcher.add(piece))
        if matcher.found is not None:
            break
    return "".join(out) + matcher.flush(), matcher.found


def cut(rng: random.Random, text: str) -> list[str]:
    ends = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, len(text) + 1)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def test_ten_thousand_random_cuts_give_the_same_text() -> None:
    rng = random.Random(5)
    for _ in range(10_000):
        letters = rng.choice(["ab", "abc", "aé語🙂", "\n#ab"])
        text = "".join(rng.choices(letters, k=rng.randint(0, 30)))
        stops = ["".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(rng.randint(0, 4))]
        assert stream(cut(rng, text), stops) == expected(text, stops), (text, stops)


def test_ten_thousand_random_cuts_hold_exactly_what_may_become_a_stop_string() -> None:
    rng = random.Random(6)
    for _ in range(10_000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 20)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
        matcher = StopMatcher(stops)
        seen = ""
        for piece in cut(rng, text):
            seen += piece
            matcher.add(piece)
            if matcher.found is None:
                ends = [seen[i:] for i in range(len(seen)) if any(stop.startswith(seen[i:]) for stop in stops)]
                assert matcher.held == (ends[0] if ends else "")


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "found"),
    [
        (["Hello", " wor", "ld"], [], "Hello world", None),
        (["one\n", "\n", "two"], ["\n\n"], "one", "\n\n"),
        (["Us", "er", ":"], ["User:"], "", "User:"),
        (["Use", "less"], ["User:"], "Useless", None),
        (["the end is U", "s"], ["User:"], "the end is Us", None),
        (["aaa", "b"], ["aab"], "a", "aab"),
        (["日", "本", "語"], ["本語"], "日", "本語"),
        (["x<|im", "_end|>y"], ["<|im_end|>", "<|im"], "x", "<|im"),
        (["abcdef"], ["cd", "bcdefg"], "ab", "cd"),
        (["xabc"], ["abc", "bc"], "x", "abc"),
    ],
)
def test_stop_strings_end_the_text(pieces: list[str], stops: list[str], text: str, found: str | None) -> None:
    assert stream(pieces, stops) == (text, found)


def test_nothing_comes_after_a_stop_string() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.add("ax") == "a"
    assert matcher.add("b") == matcher.flush() == ""


@pytest.mark.parametrize("stop", ["", ["a", ""], ["a" * (MAX_STOP_LENGTH + 1)], [3], ["a"] * (MAX_STOP_STRINGS + 1)])
def test_senseless_stop_strings_are_refused(stop: object) -> None:
    with pytest.raises(ParameterError, match=r"stop string"):
        stop_strings(stop)  # type: ignore[arg-type]


def test_one_stop_string_or_several() -> None:
    assert stop_strings(None) == ()
    assert stop_strings("ab") == ("ab",)
    assert stop_strings(["b", "a", "b"]) == ("b", "a")
