"""Source code in colours: Pygments finds the words, the palette has the styles."""

from __future__ import annotations

import functools
import threading
from typing import Any

from rich.text import Text

from edgellm.tui.palette import Palette

MAX_LENGTH = 60_000  # characters; longer code stays plain
# the head of a Pygments token type -> a style of the palette; the first that fits
STYLES = (
    ("Comment", "comment"),
    ("Literal.String", "string"),
    ("Literal.Number", "number"),
    ("Keyword.Constant", "number"),
    ("Keyword.Type", "class"),
    ("Keyword", "keyword"),
    ("Operator.Word", "keyword"),
    ("Name.Function", "function"),
    ("Name.Decorator", "function"),
    ("Name.Builtin", "function"),
    ("Name.Class", "class"),
    ("Name.Exception", "class"),
    ("Name.Tag", "keyword"),
    ("Name.Attribute", "function"),
)
_making = threading.Lock()  # Pygments makes a lexer's rules with its first instance


def highlighted(code: str, language: str, palette: Palette) -> Text:
    """``code`` as text with styles; plain for a language that nobody knows."""
    lexer = _lexer(language.strip().lower()) if language and len(code) <= MAX_LENGTH else None
    text = Text(style=palette.code, no_wrap=True, end="")
    if lexer is None:
        return text.append(code)
    for kind, piece in lexer.get_tokens(code):
        text.append(piece, palette.syntax[_style_name(str(kind))])
    return text


@functools.lru_cache(maxsize=512)
def _style_name(kind: str) -> str:
    plain = kind.removeprefix("Token.")
    return next((name for head, name in STYLES if plain.startswith(head)), "plain")


@functools.lru_cache(maxsize=32)
def _lexer(language: str) -> Any:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        with _making:
            return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
