"""Which fields of a request's body change its answer; what cannot be done is refused by name."""

from typing import Any

from pydantic import BaseModel

from serve_apps.refusals import Refusal, unsupported

HARMLESS = frozenset({"user", "request_id", "session_id", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that name somebody or something and change no answer."""
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
"""Values that ask for what is done anyway."""


def refuse_unsupported(request: BaseModel, supported: frozenset[str]) -> None:
    """Raise `Refusal` for the first field that was given, is not supported and would change the answer."""
    for name, value in sorted((request.model_extra or {}).items()):
        if value is None or name in HARMLESS or value in WITHOUT_EFFECT.get(name, ()):
            continue
        if name in WITHOUT_EFFECT:
            raise unsupported(name, f"leave it out or send {WITHOUT_EFFECT[name][0]!r}")
        raise Refusal(f"Unknown field {name!r}; leave it out.", param=name, code="unknown_parameter")
    for name, field in type(request).model_fields.items():
        if name not in request.model_fields_set or name in supported | HARMLESS:
            continue
        value = vars(request)[name]
        default = field.get_default(call_default_factory=True)
        if value is not None and value != default and value not in ([], {}, ""):
            raise unsupported(name, "leave it out")
