"""The one exception tree of edgellm, on the ground floor so that every floor can raise from it.

A message has three parts: what was found, what was expected, what to do. The command line prints it without a
traceback; a server turns ``code`` into its error code. ``assert`` stays for our own mistakes.
"""


class EdgeLLMError(Exception):
    """Anything a user can meet and act on. ``code`` is stable and upper case, such as ``GGUF_COUNT``."""

    code = "ERROR"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class FormatError(EdgeLLMError):
    """A file is not what it says it is: damaged, cut short, or made to do harm."""

    code = "FORMAT"


class UnsupportedError(EdgeLLMError):
    """A sound file asks for something that edgellm does not have (architecture, tensor type, tokenizer)."""

    code = "UNSUPPORTED"


class ModelNotFoundError(EdgeLLMError):
    """No file and no catalogue entry has this name."""

    code = "MODEL_NOT_FOUND"


class DownloadError(EdgeLLMError):
    """A model could not be brought here whole."""

    code = "PULL_FAILED"


class TemplateError(EdgeLLMError):
    """A chat template is unsafe, too costly, broken, or refuses these messages."""

    code = "TEMPLATE_ERROR"


class ParameterError(EdgeLLMError):
    """A value given by the caller is out of range; the message names the parameter."""

    code = "PARAMETER"


class ContextFullError(EdgeLLMError):
    """The prompt does not fit the context; the message has both counts, as ``n_tokens`` and ``n_ctx`` where known."""

    code = "CONTEXT_FULL"

    def __init__(self, message: str, *, n_tokens: int = 0, n_ctx: int = 0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.n_tokens, self.n_ctx = n_tokens, n_ctx


class MemoryWouldExceedError(EdgeLLMError):
    """Loading would need more memory than the machine has free."""

    code = "MEMORY_WOULD_EXCEED"


class NumericError(EdgeLLMError):
    """A step computed NaN or infinity where a number was needed."""

    code = "NUMERIC_NAN"


class ClosedError(EdgeLLMError):
    """A model was used after ``close()``."""

    code = "CLOSED"


class DeviceLostError(EdgeLLMError):
    """A GPU went away while it was in use: its driver started again, or it was taken out."""

    code = "DEVICE_LOST"


class RemoteError(EdgeLLMError):
    """A server that answers in place of a model here is not there, lets nobody in, breaks off or talks nonsense."""

    code = "REMOTE"
