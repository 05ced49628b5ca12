"""What the HTTP border refuses, with all that OpenAI's error shape needs."""

from cluster.errors import UserError


class Refusal(UserError, ValueError):
    """A request that is answered with an error; it never reaches the model."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message, param, code, status)  # all of them, or unpickling on another node fails
        self.message = message
        self.param = param
        """The field of the request that is at fault."""
        self.code = code
        """OpenAI's word for the kind of error, such as `model_not_found`."""
        self.status = status
        """HTTP status."""

    def __str__(self) -> str:
        """Return the message alone."""
        return self.message


def unsupported(param: str, instead: str) -> Refusal:
    """Return the refusal of a field that this engine does not know; `instead` is the way out."""
    message = f"{param} is not supported by this model's engine; {instead}."
    return Refusal(message, param=param, code="unsupported_parameter")
