"""What the HTTP border refuses, with all that OpenAI's error shape needs."""

from typing import Any

from cluster.errors import UserError


class Refusal(UserError, ValueError):
    """A request that is answered with an error; it never reaches the model."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The field of the request that is at fault."""
        self.code = code
        """OpenAI's word for the kind of error, such as `model_not_found`."""
        self.status = status
        """HTTP status."""
        self.retry_after_s = retry_after_s
        """When to ask again, for the Retry-After header; None where asking again does not help."""


def unsupported(param: str, instead: str) -> Refusal:
    """Return the refusal of a field that this engine does not know; `instead` is the way out."""
    message = f"{param} is not supported by this model's engine; {instead}."
    return Refusal(message, param=param, code="unsupported_parameter")


def in_range(param: str, value: float, low: float, high: float) -> Any:
    """Return `value`, or raise the refusal of a field that is not between `low` and `high`."""
    if not low <= value <= high:  # also false for NaN
        raise Refusal(f"{param} is {value}; it has to be between {low:g} and {high:g}.", param=param)
    return value
