"""The full-screen chat: a Textual application over the library's face and the sessions, and nothing below them.

``run_chat`` is the door. The application draws what two threads do: one streams the answer (``answering``), one writes
the session down (``edgellm.sessions.SessionWriter``); the screen looks at both a few times a second.
"""
