"""Sessions as files: Markdown for people, JSON for programs and for other machines.

The JSON keeps the whole tree: ``{"format": "edgellm-session", "version": 1, "title", "model", "system", "settings",
"leaf", "messages": [{"parent", "role", "text", "model", "finish_reason", "timings", "created", "tokens"}]}`` where
``parent`` and ``leaf`` are places in the list. Read are also what the line chat's ``/save`` writes, and a plain list of
``{"role", "content"}``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from edgellm.formats.errors import FormatError
from edgellm.formats.json_text import parse_json
from edgellm.sessions.token_records import as_lists, from_lists
from edgellm.sessions.tree import MessageNode, Session

FORMAT, VERSION = "edgellm-session", 1
ROLES = ("system", "user", "assistant", "tool")
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
        "settings": session.settings,
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


def from_json(text: str) -> Session:
    """A session from any of the forms above, with ids of its own. FormatError SESSION_FILE for anything else."""
    if len(text) > MAX_NBYTES:
        raise _wrong(f"it has {len(text)} characters, more than {MAX_NBYTES}")
    record = parse_json(text, "The session", "SESSION_FILE", advice=EXPECTED, infinities=True, mends=True)
    if isinstance(record, list):
        return _from_list(record, {})
    if isinstance(record, dict) and record.get("format") == "edgellm-chat":
        return _from_list(record.get("messages"), record)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _wrong("it says nothing of a session")
    if record.get("version") != VERSION:
        raise _wrong(f"its version is {record.get('version')!r}, this program knows {VERSION}")
    return _from_tree(record)


def _from_tree(record: Mapping[str, Any]) -> Session:
    session = Session(title=_text(record, "title"), model=_text(record, "model"), system=_text(record, "system"))
    settings = record.get("settings", {})
    session.settings = settings if isinstance(settings, dict) else {}
    session.created = _moment(record.get("created"))
    nodes: list[MessageNode] = []
    for number, message in enumerate(_messages(record.get("messages"))):
        parent = message.get("parent")
        if parent is not None and not (isinstance(parent, int) and 0 <= parent < number):
            raise _wrong(f"message {number} follows {parent!r}")
        if message.get("role") not in ROLES:
            raise _wrong(f"message {number} has the role {message.get('role')!r}")
        reason = message.get("finish_reason")
        node = MessageNode(
            role=message["role"],
            text=_text(message, "text"),
            model=_text(message, "model"),
            finish_reason=reason if isinstance(reason, str) else None,
            tokens=from_lists(message.get("tokens") or []),
            timings=_numbers(message.get("timings")),
            created=_moment(message.get("created")),
        )
        nodes.append(session.tree.attach(node, None if parent is None else nodes[parent]))
    leaf = record.get("leaf")
    if isinstance(leaf, int) and 0 <= leaf < len(nodes):
        session.tree.select(nodes[leaf])
    return session


def _from_list(messages: Any, record: Mapping[str, Any]) -> Session:
    session = Session(model=_text(record, "model"))
    for number, message in enumerate(_messages(messages)):
        role = message.get("role")
        if role == "system" and not session.system and not session.tree.roots:
            session.system = _text(message, "content")
        elif role in ROLES:
            session.tree.add(role, _text(message, "content"), session.tree.leaf, finish_reason="stop")
        else:
            raise _wrong(f"message {number} has the role {role!r}")
    return session


def _messages(messages: Any) -> list[Mapping[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _wrong("it has no list of messages")
    return messages


def _text(record: Mapping[str, Any], name: str) -> str:
    text = record.get(name, "")
    if not isinstance(text, str):
        raise _wrong(f"{name} is {type(text).__name__}, not text")
    return text


def _numbers(record: Any) -> dict[str, float]:
    pairs = record.items() if isinstance(record, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, int | float)}


def _moment(value: Any) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if fits else time.time()


def _wrong(what: str) -> FormatError:
    return FormatError(f"This is no session: {what}. {EXPECTED}", code="SESSION_FILE")
