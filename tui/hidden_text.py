"""What an input cannot show as it is, held in letters that it can: control characters, and large pastes as one word.

A control character is a letter of the last private plane in the input, and drawn as a picture of one cell. The word
for a paste ends with such a letter too: nothing that is typed or pasted can be taken for it. ``shown`` gives back what
was hidden, to the last character.
"""

from __future__ import annotations

import re

from edgellm.machine.terminal import UNSAFE

FIRST = 0x100000  # of the private plane
WORD_END = "\U0010fffd"  # drawn as the bracket that closes the word

_UNSHOWN = re.compile(f"[{UNSAFE}\U00100000-\U0010ffff]")
_WORD = re.compile(rf"\[pasted \d+: [\w, ]*{WORD_END}")
_HIDDEN = re.compile(rf"{_WORD.pattern}|[\U00100000-\U0010fffc]")


class HiddenText:
    """The letters and words of one input, and what they stand for."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}
        self._meanings: dict[str, str] = {}  # of letters, and of the words for pastes
        self._pastes: dict[str, str] = {}

    def hide(self, text: str) -> str:
        """The text as the input holds it."""
        return _UNSHOWN.sub(lambda found: self._letter(found[0]), text)

    def hide_pastes(self, text: str) -> str:
        """The same, with the words for pastes that stand in it."""
        hidden = self.hide(text)
        for word, pasted in self._pastes.items():
            if pasted in text:
                hidden = hidden.replace(self.hide(pasted), word)
        return hidden

    def fold(self, text: str) -> str:
        """The word for a large paste."""
        for word, pasted in self._pastes.items():
            if pasted == text:
                return word
        n_lines = text.count("\n") + 1
        word = f"[pasted {len(self._pastes) + 1}: {n_lines} lines, {len(text)} characters{WORD_END}"
        self._pastes[word] = self._meanings[word] = text
        return word

    def shown(self, held: str) -> str:
        """The text that the input holds, with all that is hidden."""
        return _HIDDEN.sub(lambda found: self._meanings.get(found[0], found[0]), held)

    def drawn(self, held: str) -> str:
        """The same number of letters, each as the screen may show it."""
        return _UNSHOWN.sub(lambda found: self._picture(found[0]), held)

    def words(self, line: str) -> list[tuple[int, int]]:
        """Where the words for pastes stand in a line of the input."""
        return [found.span() for found in _WORD.finditer(line)]

    def _letter(self, character: str) -> str:
        letter = self._letters.get(character)
        if letter is None:
            letter = chr(FIRST + len(self._letters))
            if letter >= WORD_END:  # all of them are taken
                return "\ufffd"
            self._letters[character] = letter
            self._meanings[letter] = character
        return letter

    def _picture(self, letter: str) -> str:
        if letter == WORD_END:
            return "]"
        code = ord(self._meanings.get(letter, letter))
        if code < 32:
            return chr(0x2400 + code)
        return "\u2421" if code == 127 else "\ufffd"
