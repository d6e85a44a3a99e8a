"""The commands of the chat: one row each, for ``/name``, the palette and the help alike."""

from __future__ import annotations

from edgellm.sessions.commands import Command, Commands

COMMANDS = Commands(
    (
        Command("new", "", "Begin a new chat; this one stays in the list.", lambda app, _: app.action_new(), "^N"),
        Command("chats", "[WORDS]", "Find, open, rename, delete, export chats.", lambda a, w: a.action_chats(w), "^O"),
        Command("model", "[NAME]", "Choose a model; the conversation stays.", lambda a, x: a.action_models(x), "^L"),
        Command("settings", "", "Sampling, context, system message, presets.", lambda a, _: a.action_settings(), "^G"),
        Command("tokens", "", "See how sure the model was, branch from a token.", lambda a, _: a.action_tokens(), "^T"),
        Command(
            "regen", "", "Another answer; the old one stays as a branch.", lambda a, _: a.action_regenerate(), "^R"
        ),
        Command("continue", "", "Go on with an answer that was cut off.", lambda app, _: app.action_go_on(), "+"),
        Command("edit", "", "Edit your last message and branch from it.", lambda app, _: app.action_edit(), "e"),
        Command("branch", "", "Go to the next branch.", lambda app, _: app.action_turn(1), "]"),
        Command("copy", "[N]", "Copy the answer, or its code block N.", lambda app, text: app.copy(text), "^Y"),
        Command("system", "[TEXT]", "Show or change the system message.", lambda app, text: app.set_system(text)),
        Command("set", "NAME VALUE", "Change a setting, such as /set temp 0.2.", lambda app, text: app.set_one(text)),
        Command("preset", "[NAME]", "Use settings that were saved by name.", lambda app, text: app.use_preset(text)),
        Command("rename", "TITLE", "Give this chat a title.", lambda app, text: app.rename(text)),
        Command("export", "[FILE]", "Write this chat to a .md or .json file.", lambda app, text: app.export(text)),
        Command("import", "FILE", "Bring in a chat from a .json file.", lambda app, text: app.import_file(text)),
        Command("theme", "[NAME]", "Other colours.", lambda app, text: app.use_theme(text)),
        Command("help", "", "All keys and commands.", lambda app, _: app.action_keys(), "F1"),
        Command("quit", "", "Leave; everything is saved.", lambda app, _: app.action_leave(), "^Q"),
    ),
    {"exit": "quit", "bye": "quit", "q": "quit", "?": "help", "regenerate": "regen", "sessions": "chats"},
)


def matching(word: str) -> list[tuple[str, str]]:
    """Commands that begin as ``word`` does, with their meaning."""
    rows = [(f"/{c.name}", f"{c.argument + '  ' if c.argument else ''}{c.help}") for c in COMMANDS.values()]
    return [row for row in rows if row[0].startswith(word)]
