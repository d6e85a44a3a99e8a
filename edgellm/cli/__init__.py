"""The command line: one file for each command, read only when that command is asked for.

``edgellm --help`` must answer at once, so no file here imports numba or the library at its top: a command
imports what it needs inside its function.
"""

from edgellm.cli.app import main

__all__ = ["main"]
