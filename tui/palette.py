"""The colours of the chat: two themes of our own, and the styles that text is drawn with, made from any theme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.color import Color
from rich.style import Style
from textual.theme import Theme

DARK = Theme(
    name="edgellm-dark",
    primary="#7aa2f7",
    secondary="#9d8cf2",
    accent="#e0af68",
    foreground="#cdd3de",
    background="#14161b",
    surface="#1a1d24",
    panel="#22262f",
    success="#8fc77c",
    warning="#e0af68",
    error="#ef7b85",
    dark=True,
    variables={"footer-key-foreground": "#7aa2f7", "input-selection-background": "#7aa2f7 30%"},
)
LIGHT = Theme(
    name="edgellm-light",
    primary="#3059b8",
    secondary="#6b4fbb",
    accent="#9a6400",
    foreground="#22262f",
    background="#fbfbf9",
    surface="#f2f2ee",
    panel="#e7e7e1",
    success="#3b7a2a",
    warning="#9a6400",
    error="#b3303c",
    dark=False,
    variables={"footer-key-foreground": "#3059b8", "input-selection-background": "#3059b8 25%"},
)
N_SHADES = 12  # steps between an unlikely and a certain token


@dataclass(frozen=True)
class Palette:
    """Rich styles by what they are for. ``shades`` colour tokens, from the least to the most likely."""

    base: Style
    muted: Style
    faint: Style
    accent: Style
    user: Style
    heading: Style
    strong: Style
    emphasis: Style
    struck: Style
    inline_code: Style
    link: Style
    code: Style
    code_head: Style
    quote: Style
    mark: Style
    selected: Style
    selection: Style  # text that the mouse has selected
    warning: Style
    error: Style
    ink: Style  # the colour of plain text, without a ground
    syntax: Mapping[str, Style]
    shades: tuple[Style, ...]
    cursor: Style


def palette_of(variables: Mapping[str, str], dark: bool, no_color: bool = False) -> Palette:
    """The styles of a theme, from its CSS variables."""

    def colour(name: str, fallback: str) -> str:
        value = variables.get(name, fallback)
        return value if value.startswith("#") else fallback

    text = colour("foreground", "#cdd3de" if dark else "#22262f")
    back = colour("background", "#14161b" if dark else "#fbfbf9")
    surface = colour("surface", back)
    primary, secondary = colour("primary", text), colour("secondary", text)
    accent, good = colour("accent", text), colour("success", text)
    warn, bad = colour("warning", text), colour("error", text)
    muted, faint = mixed(text, back, 0.42), mixed(text, back, 0.68)
    base = Style(color=text, bgcolor=back)
    on_code = Style(bgcolor=surface)
    return Palette(
        base=base,
        muted=Style(color=muted),
        faint=Style(color=faint),
        accent=Style(color=accent),
        user=Style(color=text, bgcolor=surface),
        heading=Style(color=primary, bold=True),
        strong=Style(bold=True),
        emphasis=Style(italic=True),
        struck=Style(strike=True),
        inline_code=Style(color=accent, bgcolor=surface),
        link=Style(color=primary, underline=True),
        code=on_code + Style(color=text),
        code_head=on_code + Style(color=muted),
        quote=Style(color=mixed(text, back, 0.2), italic=True),
        mark=Style(color=primary),
        selected=Style(color=accent, bold=no_color),
        selection=Style(color=text, bgcolor=mixed(back, primary, 0.35), reverse=no_color),
        warning=Style(color=warn),
        error=Style(color=bad),
        ink=Style(color=text),
        syntax={
            "keyword": on_code + Style(color=secondary),
            "function": on_code + Style(color=primary),
            "string": on_code + Style(color=good),
            "number": on_code + Style(color=accent),
            "comment": on_code + Style(color=muted, italic=True),
            "class": on_code + Style(color=accent),
            "plain": on_code + Style(color=text),
        },
        shades=_shades(text, back, bad, warn, good, no_color),
        cursor=Style(color=back, bgcolor=primary, bold=True, reverse=no_color),
    )


def _shades(text: str, back: str, bad: str, warn: str, good: str, no_color: bool) -> tuple[Style, ...]:
    """From red over yellow to green, as the background of a token; without colours the unlikely stand out."""
    shades = []
    for i in range(N_SHADES):
        share = i / (N_SHADES - 1)
        if no_color:
            shades.append(Style(color=text, bgcolor=back, reverse=share < 0.25, underline=share < 0.6, dim=share > 0.9))
            continue
        hue = mixed(bad, warn, share * 2) if share < 0.5 else mixed(warn, good, share * 2 - 1)
        shades.append(Style(color=text, bgcolor=mixed(back, hue, 0.5 - 0.28 * share)))
    return tuple(shades)


def shade_of(palette: Palette, probability: float) -> Style:
    """The style of a token of this probability."""
    return palette.shades[min(int(max(probability, 0.0) * N_SHADES), N_SHADES - 1)]


def mixed(one: str, other: str, share: float) -> str:
    """A colour between two, ``share`` of the way to the other."""
    a, b = (Color.parse(name).get_truecolor() for name in (one[:7], other[:7]))
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(a, b, strict=True))
