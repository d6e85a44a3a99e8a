"""Sessions as files: Markdown for people, JSON for programs and for other machines.

The JSON keeps the whole tree: ``{"format": "edgellm-session", "version": 1, "title", "model", "system", "settings",
"leaf", "messages": [{"parent", "role", "text", "model", "finish_reason", "timings", "created", "tokens"}]}`` where
``parent`` and ``leaf`` are places in the list. Read are also what the line chat's ``/save`` writes, and a plain list of
``{"role", "content"}``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.formats.errors import FormatError, ParameterError
from edgellm.formats.json_text import parse_json
from edgellm.machine.atomic import whole_file
from edgellm.sessions import records
from edgellm.sessions.settings import as_json, checked_all
from edgellm.sessions.token_records import as_lists, from_lists
from edgellm.sessions.tree import MessageNode, Session, title_of

FORMAT, VERSION = "edgellm-session", 1
MAX_NBYTES = 256 << 20
EXPECTED = 'Expected JSON that `edgellm sessions export` or /save wrote, or a list of {"role", "content"}.'


def to_markdown(session: Session) -> str:
    """The branch that is being read, as a document."""
    lines = [f"# {session.shown_title or 'Chat'}", ""]
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.created))
    lines += [f"{day}, {session.model}" if session.model else day, ""]
    if session.system:
        lines += ["## System", "", session.system, ""]
    for node in session.tree.path:
        thought, said = node.parts()
        lines += [f"## {node.role.capitalize()}", ""]
        if thought:
            quoted = "\n".join(f"> {line}".rstrip() for line in thought.splitlines())
            lines += ["> *Thinking*", ">", quoted, ""]
        lines += [said.rstrip(), ""]
    return "\n".join(lines)


def to_json(session: Session) -> str:
    """All of a session."""
    nodes = list(session.tree)
    place = {node.id: number for number, node in enumerate(nodes)}
    leaf = session.tree.leaf
    record = {
        "format": FORMAT,
        "version": VERSION,
        "title": session.title,
        "model": session.model,
        "system": session.system,
        "settings": json.loads(as_json(session.settings)),
        "created": session.created,
        "leaf": place[leaf.id] if leaf is not None else None,
        "messages": [
            {
                "parent": place[node.parent.id] if node.parent is not None else None,
                "role": node.role,
                "text": node.text,
                "model": node.model,
                "finish_reason": node.finish_reason,
                "timings": node.timings,
                "created": node.created,
                "tokens": as_lists(node.tokens),
            }
            for node in nodes
        ],
    }
    return json.dumps(record, ensure_ascii=False, indent=1)


def write_session(path: Path, session: Session, as_json: bool | None = None) -> None:
    """Write a session as JSON or Markdown, by the file's name where that is not said; whole or not at all. OSError."""
    as_json = path.suffix.lower() == ".json" if as_json is None else as_json
    data = records.sound(to_json(session) if as_json else to_markdown(session)).encode()
    if path.exists() and not path.is_file():  # a pipe, which takes what comes
        path.write_bytes(data)
        return
    with whole_file(path) as file:
        file.write(data)


def from_json(text: str) -> Session:
    """A session from any of the forms above, with ids of its own. FormatError SESSION_FILE for anything else."""
    if len(text) > MAX_NBYTES:
        raise _wrong(f"it has {len(text)} characters, more than {MAX_NBYTES}")
    record = parse_json(text, "The session", "SESSION_FILE", advice=EXPECTED, infinities=True, mends=True)
    try:
        if isinstance(record, list):
            return _from_list(record, {})
        if isinstance(record, dict) and record.get("format") == "edgellm-chat":
            return _from_list(record.get("messages"), record)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise _wrong("it says nothing of a session")
        if record.get("version") != VERSION:
            raise _wrong(f"its version is {records.shortly(record.get('version'))}, this program knows {VERSION}")
        return _from_tree(record)
    except ParameterError as error:
        raise _wrong(str(error)) from None


def _from_tree(record: Mapping[str, Any]) -> Session:
    session = _empty(record)
    session.settings, refused = checked_all(record.get("settings", {}))
    if refused:
        raise _wrong(f"its settings cannot be used: {' '.join(refused[:5])}")
    session.created = _moment(record)
    nodes: list[MessageNode] = []
    for number, message in enumerate(_messages(record.get("messages"))):
        parent = message.get("parent")
        if parent is not None and not (type(parent) is int and 0 <= parent < number):
            raise _wrong(f"message {number} follows {records.shortly(parent)}, expected null or a message before it")
        try:
            node = _message(message)
        except ParameterError as error:
            raise _wrong(f"message {number}: {error}") from None
        node.parent = None if parent is None else nodes[parent]
        nodes.append(node)
    leaf = record.get("leaf")
    if leaf is not None and not (type(leaf) is int and 0 <= leaf < len(nodes)):
        raise _wrong(f"its leaf is {records.shortly(leaf)}, expected null or one of its {len(nodes)} messages")
    session.tree.fill(nodes, None if leaf is None else nodes[leaf])
    return session


def _message(message: Mapping[str, Any]) -> MessageNode:
    return MessageNode(
        role=records.role(message.get("role")),
        text=_text(message, "text"),
        model=_text(message, "model", records.MAX_NAME_LENGTH),
        finish_reason=records.finish_reason(message.get("finish_reason")),
        tokens=from_lists(message.get("tokens") or []),
        timings=records.timings(message.get("timings") or {}),
        created=_moment(message),
    )


def _from_list(messages: Any, record: Mapping[str, Any]) -> Session:
    session = _empty(record)
    nodes: list[MessageNode] = []
    for number, message in enumerate(_messages(messages)):
        try:
            role, text = records.role(message.get("role")), _text(message, "content")
        except ParameterError as error:
            raise _wrong(f"message {number}: {error}") from None
        if role == "system" and not session.system and not nodes:
            session.system = text
        else:
            parent = nodes[-1] if nodes else None
            nodes.append(MessageNode(role, text, parent, finish_reason="stop"))
    session.tree.fill(nodes)
    return session


def _empty(record: Mapping[str, Any]) -> Session:
    title, system = title_of(_text(record, "title")), _text(record, "system")
    return Session(title=title, model=_text(record, "model", records.MAX_NAME_LENGTH), system=system)


def _messages(messages: Any) -> list[Mapping[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _wrong("it has no list of messages")
    return messages


def _text(record: Mapping[str, Any], name: str, limit: int | None = None) -> str:
    return records.text(name, record.get(name, ""), limit)


def _moment(record: Mapping[str, Any]) -> float:
    created = record.get("created")
    return time.time() if created is None else records.moment(created)


def _wrong(what: str) -> FormatError:
    return FormatError(f"This is no session: {what}. {EXPECTED}", code="SESSION_FILE")
