"""A model's own `config.json`, read from a folder, the hub's cache or the hub, as the facts of a card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.architectures import ARCHITECTURES, canonical_name
from cluster.errors import UserError

FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
}
"""Facts that every file must state, and the keys that state them (the second is GPT-2's)."""
HUB_TIMEOUT_S = 15.0
MAPPED_KEYS = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
"""Keys of the `stablelm_epoch` remote code, and what transformers' own StableLm calls them."""


class UnreadableConfig(UserError, ValueError):
    """A `config.json` that is missing, broken, incomplete or of an architecture that is not known."""


class HubUnreachable(UserError, ConnectionError):
    """The hub did not give the file: it does not answer, does not have it, or asks for a licence to be accepted."""


def read_folder(folder: Path) -> dict[str, Any]:
    """Return the card facts of a local model folder.

    Raises:
        UnreadableConfig: no `config.json`, or not one that describes a model we can plan.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UnreadableConfig(f"{folder} has no config.json: a model folder holds one beside its weights.")
    facts = card_facts(_load(path), origin=str(path))
    return {**facts, "has_tokenizer_chat_template": _has_chat_template(folder)}


def read_hub(model_id: str, revision: str | None = None) -> dict[str, Any]:
    """Return the card facts of a hub repository; only its `config.json` is fetched, from the cache where it is there.

    `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are honoured by the hub's own client.

    Raises:
        HubUnreachable: the hub does not answer, has no such model, or the model is gated.
        UnreadableConfig: the file does not describe a model we can plan.
    """
    path = _fetch(model_id, revision)
    return card_facts(_load(path), origin=f"config.json of {model_id}")


def _fetch(model_id: str, revision: str | None) -> Path:
    # Imported here: the hub's client is slow to import, and planning a catalog model needs none of it.
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its own alias of httpx or httpx2

    cached = try_to_load_from_cache(model_id, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Asked first, because it gives up after one time limit: a download alone retries for half a minute.
        HfApi().model_info(model_id, revision=revision, timeout=HUB_TIMEOUT_S)
        return Path(hf_hub_download(model_id, "config.json", revision=revision))
    except GatedRepoError as error:
        raise HubUnreachable(f"{model_id} is gated: accept its terms on its hub page, then set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise HubUnreachable(f"The hub shows no model {model_id!r}: check the name, or set HF_TOKEN.") from error
    except (httpx.HTTPError, HfHubHTTPError, EntryNotFoundError, OSError) as error:
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise HubUnreachable(
            f"config.json of {model_id} is not cached and the hub does not give it ({first_line}): "
            "check the network, or give a local folder."
        ) from error


def _load(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnreadableConfig(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UnreadableConfig(f"{path} holds a {type(config).__name__}; a config.json is one object.")
    return config


def card_facts(config: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Return the fields of a `ModelCard` that a `config.json` states.

    Raises:
        UnreadableConfig: an architecture that is not known, or keys that are missing or not positive whole numbers;
            all of them are named.
    """
    architecture = _architecture(config, origin)
    facts = {name: _first(config, keys) for name, keys in FIELDS.items()}
    if architecture == "GPT2LMHeadModel" and facts["intermediate_size"] is None and facts["hidden_size"]:
        facts["intermediate_size"] = 4 * facts["hidden_size"]  # transformers' default for n_inner
    _check(facts, config, architecture, origin)
    heads = facts["num_attention_heads"]
    return {
        "architecture": architecture,
        **facts,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or facts["hidden_size"] // heads,
        # transformers writes only what differs from its default, which is tied for GPT-2 and untied for the rest
        "tie_word_embeddings": config.get("tie_word_embeddings", architecture == "GPT2LMHeadModel"),
        **_biases(config, architecture),
        "num_local_experts": config.get("num_local_experts", 0),
        "num_experts_per_tok": config.get("num_experts_per_tok", 0),
        "config_mapping": tuple((old, new) for old, new in MAPPED_KEYS.items() if old in config),
        **_quantization(config.get("quantization_config") or {}),
        "stop_token_ids": _stop_token_ids(config.get("eos_token_id")),
    }


def _architecture(config: Mapping[str, Any], origin: str) -> str:
    published = (config.get("architectures") or ["(none)"])[0]
    name = canonical_name(published)
    if name is None:
        raise UnreadableConfig(
            f"{origin}: the architecture {published} cannot be planned; known are {', '.join(ARCHITECTURES)}."
        )
    return name


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _check(facts: Mapping[str, Any], config: Mapping[str, Any], architecture: str, origin: str) -> None:
    spelling = 1 if architecture == "GPT2LMHeadModel" else 0
    missing = [FIELDS[name][min(spelling, len(FIELDS[name]) - 1)] for name, value in facts.items() if value is None]
    wrong = [f"{name}={v!r}" for name, v in facts.items() if v is not None and (not isinstance(v, int) or v < 1)]
    needs_experts = ARCHITECTURES[architecture].mlp == "experts"
    missing += [k for k in ("num_local_experts", "num_experts_per_tok") if needs_experts and k not in config]
    problems = [f"misses {', '.join(missing)}"] if missing else []
    problems += [f"needs positive whole numbers, got {', '.join(wrong)}"] if wrong else []
    if problems:
        raise UnreadableConfig(f"{origin} {' and '.join(problems)}.")


def _quantization(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a checkpoint is quantized; where compressed-tensors has several groups, by that with the most bits."""
    if not published:
        return {}
    facts = published
    if published.get("config_groups"):
        groups = [group.get("weights") or {} for group in published["config_groups"].values()]
        facts = max(groups, key=lambda weights: weights.get("num_bits") or 0)
    bits = facts.get("num_bits") or facts.get("bits") or facts.get("w_bit")
    group_size = facts.get("group_size") or facts.get("q_group_size")
    is_asymmetric = facts.get("zero_point") or facts.get("symmetric") is False or facts.get("sym") is False
    return {
        "checkpoint_quantization": published.get("quant_method"),
        "checkpoint_bits": bits or (8 if published.get("load_in_8bit") else None),
        "checkpoint_group_size": group_size if group_size and group_size > 0 else None,
        "checkpoint_is_symmetric": not is_asymmetric,
        "checkpoint_is_float": facts.get("type") == "float",
    }


def _biases(config: Mapping[str, Any], architecture: str) -> dict[str, bool]:
    """Return which linears carry a bias: fixed by the class for GPT-2 and Qwen2, a key of the file elsewhere."""
    if architecture == "GPT2LMHeadModel":
        return {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
    if architecture == "Qwen2ForCausalLM":
        return {"attention_bias": True}
    if architecture == "StableLmForCausalLM":
        return {"attention_bias": bool(config.get("use_qkv_bias", False))}
    attention = bool(config.get("attention_bias", False))
    return {
        "attention_bias": attention,
        "attention_output_bias": attention,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "lm_head_bias": bool(config.get("lm_head_bias", False)),
    }


def _stop_token_ids(eos_token_id: int | list[int] | None) -> tuple[int, ...]:
    if eos_token_id is None:
        return ()
    return tuple(eos_token_id) if isinstance(eos_token_id, list) else (eos_token_id,)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(_load(path).get("chat_template"))
