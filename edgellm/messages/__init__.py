"""Messages both ways: a model's tokens to content, reasoning and tool calls, and the grammars that force calls.

How a model writes a message is said by a ``MessageForm``: markers and modes, and no code. It is the checkpoint's own
declaration, or derived from the chat template by rendering messages that differ in one thing, or one of a few that are
built in. A ``MessageReader`` reads by it, piece by piece; what it cannot read is text, never an error.
"""
