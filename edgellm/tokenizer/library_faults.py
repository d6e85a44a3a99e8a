"""A guard around calls into compiled libraries that read an untrusted tokenizer or text.

The tokenizers library raises a bare Exception for what it cannot read, and its panics (an internal error of Rust code)
arrive as a BaseException that no ``except Exception`` catches. Both leave this guard as one exception.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class LibraryFault(Exception):
    """What the library said, as one line."""


@contextmanager
def library_faults() -> Iterator[None]:
    """Turn exceptions and panics of the library into LibraryFault; all others pass, Ctrl-C too."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__module__ == "pyo3_runtime"  # its PanicException cannot be imported
        # a text with surrogates, from a file that is no UTF-8, is a UnicodeError or the TypeError that came of it
        if not panic and type(error) is not Exception and not isinstance(error, UnicodeError | TypeError):
            raise
        raise LibraryFault(" ".join(str(error).split()) or type(error).__name__) from None
