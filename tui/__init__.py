"""The place of the full-screen chat, which is not written yet; ``edgellm chat`` is a line chat (``edgellm.cli``)."""
