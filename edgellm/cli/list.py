"""``edgellm list``: the models that are here, and those that can be pulled by name."""

from __future__ import annotations

import click

from edgellm.machine.terminal import echo, human_bytes, json_text, table


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Write a JSON array instead of a table.")
def command(as_json: bool) -> None:
    """Show the models that are here, and those to pull.

    \b
    Examples:
      edgellm list
      edgellm list --json
    """
    from edgellm.store import DEFAULT_MODEL
    from edgellm.store.catalogue import catalogue, installed_models

    here = {model.name: model for model in installed_models()}
    known = catalogue()
    names = [*here, *(name for name in known if name not in here)]
    rows = []
    for name in names:
        model, entry = here.get(name), known.get(name)
        rows.append(
            {
                "name": name,
                "installed": model is not None,
                "size": model.nbytes if model else entry.nbytes if entry else None,
                "path": str(model.path) if model else None,
                "default": name == DEFAULT_MODEL,
                "description": entry.description if entry else "",
                "licence": entry.licence if entry else "",
            }
        )
    if as_json:
        echo(json_text(rows))
        return
    cells = [
        [
            str(row["name"]) + (" (default)" if row["default"] else ""),
            "yes" if row["installed"] else "no",
            human_bytes(float(str(row["size"]))) if row["size"] else "-",
            str(row["licence"] or "-"),
            str(row["description"] or row["path"] or ""),
        ]
        for row in rows
    ]
    echo(table(("NAME", "HERE", "SIZE", "LICENCE", "DESCRIPTION"), cells, right=(2,)))
