"""Whether a regular expression of an untrusted tokenizer cuts any text in linear time.

Patterns of the table of pre-tokenizers are known. Another one is first read: what nests repetitions, or refers back, is
refused. Then it cuts texts of the kinds that people write, each one long run. One that reads on to the end of a run
again and again takes 18 to 120 times as long as a cut at every character, a sound one up to 1.3 times; the limit lies
far from both, and only the best of several measurements of this thread's own time can be over it.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache

from tokenizers import Regex, pre_tokenizers

from edgellm.formats.findings import short
from edgellm.tokenizer import pre_tokenizers as table
from edgellm.tokenizer.library_faults import LibraryFault, library_faults

MAX_PATTERN_CHARS = 4096
RUN_LENGTHS = (4096, 32768)  # characters; the short one shows the worst patterns in a 64th of the time
MAX_SLOWER = 12  # than a cut at every character
N_MEASUREMENTS = 5
KNOWN = frozenset(step for rule in table.PRE_TOKENIZERS.values() for step in rule.steps) | {r"\s+", " {2,}", r"\s"}
# back references, named ones, calls, conditions, callouts, the absence operator
_UNBOUNDED = re.compile(r"\\[1-9kg]|\(\?(?:\(|P|[&RC0-9+]|~)|\(\*|\\K")
_RUNS = ("a", "A", " ", "\n", "7", ".", "_", "中", "é", "a ", "aA", "a1", "'s", " \n", "ab c. ")


class Unfit(Exception):
    """Why a description is not believed."""


class Slow(Unfit):
    """It is sound for short texts, and takes more than linear time for long ones."""


def check_pattern(pattern: str) -> None:
    """Raise Unfit, or Slow, for a pattern that is not believed."""
    kind, reason = _judged(pattern)
    if kind is not None:
        raise kind(f"the pattern {short(pattern)} {reason}")


@lru_cache(maxsize=64)
def _judged(pattern: str) -> tuple[type[Unfit] | None, str]:
    if pattern in KNOWN:
        return None, ""
    if len(pattern) > MAX_PATTERN_CHARS:
        return Unfit, f"has {len(pattern):,} characters, more than {MAX_PATTERN_CHARS:,}"
    if _UNBOUNDED.search(pattern):
        return Unfit, "refers back or calls itself"
    if _nests_repetition(pattern):
        return Unfit, "repeats what repeats"
    try:
        with library_faults():
            slow = _slow(pattern)
    except LibraryFault as fault:
        return Unfit, f"fails: {fault}"
    return (Slow, slow) if slow else (None, "")


def _nests_repetition(pattern: str) -> bool:
    """Whether a group that holds an unbounded repetition is itself repeated without bound; classes hold none."""
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]", "x", plain)
    repeats = [False]  # for each open group
    i = 0
    while i < len(plain):
        if plain[i] == "(":
            repeats.append(False)
        elif plain[i] == ")" and len(repeats) > 1:
            inner = repeats.pop()
            unbounded = re.match(r"[*+]|\{\d*,\}", plain[i + 1 :]) is not None
            if inner and unbounded:
                return True
            repeats[-1] |= inner or unbounded
        elif re.match(r"[*+]|\{\d*,\}", plain[i : i + 16]):
            repeats[-1] = True
        i += 1
    return False


def _slow(pattern: str) -> str:
    """Which run takes this pattern too long, or ""."""
    every_character = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    seconds = min(_seconds(every_character, "a" * RUN_LENGTHS[0]) for _ in range(N_MEASUREMENTS)) / RUN_LENGTHS[0]
    cuts = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    own = dict.fromkeys(c for c in pattern if c.isascii() and c.isalnum())
    for n in RUN_LENGTHS:
        for run in (*_RUNS, *list(own)[:8]):
            text = run * (n // len(run)) + "!x"
            if all(_seconds(cuts, text) > MAX_SLOWER * seconds * n for _ in range(N_MEASUREMENTS)):
                return f"takes more than linear time, with {n:,} characters of {run!r} for example"
    return ""


def _seconds(cuts: pre_tokenizers.PreTokenizer, text: str) -> float:
    start = time.thread_time()
    cuts.pre_tokenize_str(text)
    return time.thread_time() - start
