"""``edgellm verify``: everything that is wrong with a model file."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgellm.machine.terminal import echo, json_text

if TYPE_CHECKING:
    from edgellm.formats.findings import Finding


@click.command("verify")
@click.argument("model", metavar="FILE")
@click.option("--header-only", is_flag=True, help="Do not read the weights in search of NaN and infinity.")
@click.option("--json", "as_json", is_flag=True, help="Write the findings as a JSON array.")
@click.pass_context
def command(ctx: click.Context, model: str, header_only: bool, as_json: bool) -> None:
    """Find everything that is wrong with a model file or adapter.

    Checks its structure, its vocabulary and every weight, tries its chat template on a few conversations, and prints
    all findings. Exit status 0 for a sound file, 1 when anything is wrong. FILE may be the name of a model that is
    here.

    \b
    Examples:
      edgellm verify model.gguf
      edgellm verify smollm2 --header-only
    """
    from edgellm.adapters.card import adapter_findings
    from edgellm.formats.validate import findings
    from edgellm.store.catalogue import installed
    from edgellm.tokenizer.verification import tokenizer_findings

    path = installed(model)
    found = findings(path, check_tensors=not header_only)
    sound = not any(finding.severity == "error" for finding in found)
    of_adapter = adapter_findings(path) if sound else None
    if of_adapter is not None:
        found += of_adapter
    elif sound:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what a load would warn of is among the findings
            found += tokenizer_findings(path)
            found += try_templates(path)
    if as_json:
        echo(json_text([dataclasses.asdict(finding) for finding in found]))
    else:
        for finding in found:
            echo(f"{finding.severity}: {finding.code}: {finding}")
        if not found:
            echo(f"{path}: sound" + ("" if not header_only else " (weights not read)"))
    ctx.exit(1 if any(finding.severity == "error" for finding in found) else 0)


def try_templates(path: Path) -> list[Finding]:
    """What is wrong with the chat templates of a file that is sound otherwise."""
    from edgellm.chat_template.trial import template_findings
    from edgellm.formats.gguf import GGUFFile

    with GGUFFile.open(path) as gguf:
        found = template_findings(gguf.metadata)
        return [dataclasses.replace(finding, file=path.name) for finding in found]
