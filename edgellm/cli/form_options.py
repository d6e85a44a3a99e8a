"""What an answer on the command line must be: a JSON schema, a regular expression, a grammar."""

from __future__ import annotations

from typing import Any

import click

from edgellm.cli.generation_options import read_text
from edgellm.cli.options import option_group
from edgellm.formats.json_text import parse_json

form_options = option_group(
    click.option("-j", "--json-schema", "json_schema", metavar="FILE|TEXT",
                 help="The answer is JSON that keeps this schema; {} is any JSON."),
    click.option("--grammar", "grammar", metavar="FILE|TEXT", help="It keeps a grammar, in GBNF or Lark."),
    click.option("--regex", "regex", metavar="TEXT", help="All of it matches a regular expression."),
)  # fmt: skip


def given_form(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments for ``LLM.stream``; FormatError for what is no JSON, OSError for what cannot be opened."""
    names = {"json_schema": "--json-schema", "grammar": "--grammar", "regex": "--regex"}
    given = [option for name, option in names.items() if values[name] is not None]
    if len(given) > 1:
        raise click.UsageError(f"an answer can keep only one of {' and '.join(given)}. Give one of them.")
    form: dict[str, Any] = {}
    if values["json_schema"] is not None:
        text = values["json_schema"] if "{" in values["json_schema"] else read_text(values["json_schema"])
        form["response_format"] = parse_json(text, "--json-schema", "SCHEMA", advice="")
    if values["grammar"] is not None:
        form["grammar"] = values["grammar"] if ":" in values["grammar"][2:] else read_text(values["grammar"])
    if values["regex"] is not None:
        form["regex"] = values["regex"]
    return form
