"""``edgellm embed``: texts to vectors, a line for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from edgellm.cli import standard_input
from edgellm.cli.generation_options import read_text
from edgellm.cli.models import load_model
from edgellm.cli.options import WholeNumber, device_options, override_option
from edgellm.formats.errors import ParameterError
from edgellm.machine.terminal import echo, json_text, note

_NO_CHAT = dict.fromkeys(("chat_template", "template_file", "speculate", "draft"))
STEP = 1024  # texts whose vectors are written together


@click.command("embed")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("-f", "--file", "text_file", metavar="FILE", help="File with a text on each line; - is standard input.")
@click.option("--json", "form", flag_value="json", help="One JSON object: the model, and a list of vectors.")
@click.option("--jsonl", "form", flag_value="jsonl", help="A JSON object for each text: index, text, embedding.")
@click.option("--array", "form", flag_value="array", help="One JSON array of arrays.")
@click.option("--pooling", type=click.Choice(("mean", "cls", "last")), help="In place of the file's.")
@click.option("--dimensions", type=WholeNumber(1), metavar="N", help="Only the first N numbers of each vector.")
@click.option("--no-normalize", is_flag=True, help="Leave vectors as long as they are.")
@click.option("--truncate", is_flag=True, help="Cut the end of texts that are too long, instead of an error.")
@click.option("--prompt", metavar="TEXT", help='Stands before each text, such as "query: ".')
@click.option("-m", "--model", "model_option", metavar="MODEL", help="A name, a .gguf file, hf:owner/repo:QUANT.")
@click.option("-c", "--ctx-size", "n_ctx", type=WholeNumber(0), metavar="N", help="Tokens of a text at most.")
@click.option("-t", "--threads", "n_threads", type=WholeNumber(1), metavar="N", help="Threads.")
@device_options
@override_option
@click.option("--force", is_flag=True, help="Load even when the free memory looks too small.")
def command(texts: tuple[str, ...], **values: Any) -> None:
    """Turn texts into vectors.

    Every TEXT is one; without any, every line of standard input or of a file is, those left out that are blank. A line
    for each vector goes to standard output, its numbers with blanks between them, or JSON.

    \b
    Examples:
      edgellm embed -m model.gguf "Name three rivers."
      edgellm embed -m model.gguf --jsonl < lines.txt > vectors.jsonl
    """
    given = list(texts) or _lines(values["text_file"])
    if texts and values["text_file"] is not None:
        raise click.UsageError("there are texts as arguments and a file. Give one of them.")
    if not given:
        raise click.UsageError("there is no text. Give it as an argument, with -f, or through a pipe.")
    if values["model_option"] is None:
        raise click.UsageError("there is no model. Name one with -m, such as -m model.gguf.")
    options = {name: values[name] for name in ("pooling", "dimensions", "truncate", "prompt")}
    with load_model(values["model_option"], values | _NO_CHAT, needs_template=False) as llm:
        if values["pooling"] is None and llm.pooling == "none":
            raise ParameterError(
                f"{llm.path.name} does not say how the rows of a text become one vector. Say it with --pooling."
            )
        form, vectors = values["form"], _vectors(llm, given, options | {"normalize": not values["no_normalize"]})
        if form == "jsonl":
            for i, vector in enumerate(vectors):
                echo(json_text({"index": i, "text": given[i], "embedding": vector}, indent=None))
        elif form is not None:
            rows = list(vectors)
            echo(json_text(rows if form == "array" else {"model": llm.path.name, "embeddings": rows}, indent=None))
        else:
            for vector in vectors:
                echo(" ".join(f"{number:.9g}" for number in vector))


def _vectors(llm: Any, texts: list[str], options: dict[str, Any]) -> Iterator[list[float]]:
    for start in range(0, len(texts), STEP):
        if start:
            note(f"{start:,} of {len(texts):,} texts")
        yield from llm.embed(texts[start : start + STEP], **options).tolist()


def _lines(file: str | None) -> list[str]:
    """The lines of a file, or of standard input, without those that are blank."""
    if file is None and standard_input.is_terminal():
        return []
    text = standard_input.read_all() if file in (None, "-") else read_text(str(file))
    lines = (line.rstrip("\r") for line in text.split("\n"))  # splitlines would cut at U+2028 and others, too
    return [line for line in lines if line.strip()]
