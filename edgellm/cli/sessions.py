"""``edgellm sessions``: the chats that were saved: list, find, show, rename, delete, carry away and bring in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from edgellm.cli.generation_options import read_text
from edgellm.machine.paths import typed_path
from edgellm.machine.terminal import echo, hand_over, json_safe, json_text, table

if TYPE_CHECKING:
    from edgellm.sessions import Session, SessionStore


@contextmanager
def opened() -> Iterator[SessionStore]:
    """The user's store."""
    from edgellm.sessions import open_store

    store, note = open_store()
    if note:
        echo(f"Warning: {note}", err=True)
    try:
        yield store
    finally:
        store.close()


def loaded(store: SessionStore, name: str) -> Session:
    """A session by its name; what could not be taken of it is told."""
    session = store.load(store.find(name))
    for note in session.notes:
        echo(f"Warning: {note}", err=True)
    return session


@click.group("sessions", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Show the chats that `edgellm chat` has saved.

    \b
    Examples:
      edgellm sessions
      edgellm sessions search rivers
      edgellm sessions export 1f3a --format json > chat.json
      edgellm chat --session 1f3a
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_sessions)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Write a JSON array instead of a table.")
def list_sessions(as_json: bool = False) -> None:
    """List all chats, the one changed last first."""
    with opened() as store:
        summaries = store.summaries()
    if as_json:
        names = ("title", "model", "updated", "n_messages")
        rows = [{"name": f"{s.id:016x}", **{name: getattr(s, name) for name in names}} for s in summaries]
        echo(json_text(rows))
        return
    if not summaries:
        echo("No chats yet. `edgellm chat` begins one.", err=True)
        return
    cells = [
        [s.short_name, time.strftime("%Y-%m-%d %H:%M", time.localtime(s.updated)), str(s.n_messages), s.model, s.title]
        for s in summaries
    ]
    echo(table(("NAME", "CHANGED", "MESSAGES", "MODEL", "TITLE"), cells, right=(2,)))


@command.command("search")
@click.argument("words", nargs=-1, required=True)
def search(words: tuple[str, ...]) -> None:
    """Find messages with all the words, or words that begin so."""
    with opened() as store:
        hits = store.search(" ".join(words))
    cells = [[hit.session.short_name, hit.session.title, hit.excerpt] for hit in hits]
    if cells:
        echo(table(("NAME", "TITLE", "FOUND"), cells))
    else:
        echo("Nothing found.", err=True)


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print a chat as Markdown."""
    from edgellm.sessions import to_markdown

    with opened() as store:
        text = to_markdown(loaded(store, name))
    hand_over(f"{text}\n")


@command.command("rename")
@click.argument("name")
@click.argument("title")
def rename(name: str, title: str) -> None:
    """Give a chat a title; an empty one takes it back to its first words."""
    with opened() as store:
        store.rename(store.find(name), title)


@command.command("delete")
@click.argument("names", nargs=-1, required=True)
def delete(names: tuple[str, ...]) -> None:
    """Delete chats for good."""
    with opened() as store:
        for session_id in [store.find(name) for name in names]:
            store.delete(session_id)


@command.command("export")
@click.argument("name")
@click.option("--format", "form", type=click.Choice(["md", "json"]), help="[default: by FILE, else md]")
@click.option("-o", "--output", metavar="FILE", help="Instead of standard output.")
def export(name: str, form: str | None, output: str | None) -> None:
    """Write a chat as Markdown (the branch that is read) or JSON (all of it)."""
    from edgellm.sessions import to_json, to_markdown, write_session

    with opened() as store:
        session = loaded(store, name)
    if output:
        write_session(typed_path(output), session, None if form is None else form == "json")
    else:
        hand_over(f"{json_safe(to_json(session)) if form == 'json' else to_markdown(session)}\n")


@command.command("import")
@click.argument("file")
def import_session(file: str) -> None:
    """Bring in a chat: JSON of `export`, of the line chat's /save, or a list of messages; - is standard input."""
    from edgellm.sessions import from_json

    session = from_json(read_text(file))
    with opened() as store:
        store.save_all(session)
    echo(f"{session.id:016x}"[:8])
