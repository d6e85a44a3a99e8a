"""How much of each loaded adapter a request has. Light: the engine knows of adapters no more than this."""

from __future__ import annotations

from typing import NamedTuple

from edgellm.formats.errors import NumericError, ParameterError


class AdapterScales(NamedTuple):
    """The scale of every loaded adapter, () where a request has none.

    variant   names them and their scales for the prefix cache: what they have computed no other request finds
    """

    values: tuple[float, ...] = ()
    variant: str = ""

    def blamed(self, error: NumericError) -> NumericError:
        """The error of a step with these scales: a model whose numbers outgrow its cache is likely sound without."""
        if not self.values:
            return error
        scales = ", ".join(f"{value:g}" for value in self.values)
        return AdapterScaleError(
            f"lora: with adapters of the scales {scales} the model computed NaN or infinity, expected numbers. Give "
            "smaller scales; if it does so without adapters, too, try `edgellm verify` on its file."
        )


class AdapterScaleError(NumericError, ParameterError):
    """A step with adapters made no numbers: most likely a request, or ``set_adapters``, has too much of them."""

    code = "ADAPTER_SCALE"


NO_ADAPTERS = AdapterScales()
