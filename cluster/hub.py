"""Where the files of a base model come from, and whether they can be had, asked before anything is started."""

from pathlib import Path

from cluster.errors import UserError
from cluster.model_card import ModelCard

EMBEDDED_PREFIX = "embedded:"
HUB_TIMEOUT_S = 15.0


class ModelUnavailable(UserError, OSError):
    """The files of a base model are neither here nor to be had from the hub."""


def is_embedded(card: ModelCard) -> bool:
    """Return whether the model comes out of an installed package."""
    return card.model_id.startswith(EMBEDDED_PREFIX)


def is_local(card: ModelCard) -> bool:
    """Return whether the model is a folder on this machine."""
    return Path(card.model_id).expanduser().is_dir()


def ensure_available(card: ModelCard) -> None:
    """Raise `ModelUnavailable` unless the model is embedded, a folder, in the hub's cache, or offered by the hub.

    Downloads nothing. One request with a time limit: the hub's own client retries for half a minute.
    """
    if is_embedded(card) or is_local(card) or _is_cached(card):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # whichever of its versions the hub uses

    try:
        HfApi().auth_check(card.model_id)
        HfApi().model_info(card.model_id, revision=card.revision, timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelUnavailable(
            f"{card.model_id} is gated ({card.licence}): accept its terms on its hub page, then set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"The hub has no model {card.model_id!r} that this token may see; check the name, or set HF_TOKEN."
        ) from error
    except (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise ModelUnavailable(
            f"{card.model_id} is not in the local cache and the hub does not answer ({_one_line(error)}). "
            f"Fetch it where there is a network with `hf download {card.model_id}` and set HF_HOME to that cache, "
            f"give a local folder, or use the embedded smollm2-135m-instruct."
        ) from error


def _is_cached(card: ModelCard) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(card.model_id, "config.json", revision=card.revision), str)


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
