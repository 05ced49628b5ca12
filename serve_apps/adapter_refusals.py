"""The registry's errors as a client of the endpoint sees them."""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.canary import NothingToTry
from cluster.errors import UserError
from cluster.pins import TooManyPins
from cluster.registry import AdapterInUse, AdapterNotFetched, RegistryUnwritable, UnknownAdapter
from serve_apps.refusals import Refusal

RETRY_AFTER_S = 10
"""After a disk or a store failed: time to free some space, or for the store to come back."""


@contextmanager
def adapter_errors() -> Iterator[None]:
    """Turn an error that is meant for the user into the `Refusal` that answers the request."""
    try:
        yield
    except Refusal:
        raise
    except UserError as error:
        raise _refusal(error) from error


def _refusal(error: UserError) -> Refusal:
    message = str(error)
    match error:
        case UnknownAdapter():
            return Refusal(message, param="model", code="model_not_found", status=404)
        case AdapterInUse() | TooManyPins() | NothingToTry():
            return Refusal(message, param="model", code="adapter_conflict", status=409)
        case AdapterNotFetched() | RegistryUnwritable():
            return Refusal(message, param="model", code="adapter_unreachable", status=503, retry_after_s=RETRY_AFTER_S)
        case _:
            return Refusal(message, param="model", code="adapter_unusable")
