"""From a served name to one exact adapter version, and what the answer says of its origin."""

import asyncio

from cluster.lookup import Lookup
from cluster.registry import AdapterVersion, Registry
from serve_apps.adapter_refusals import adapter_errors
from serve_apps.call import Call
from serve_apps.facts import ModelFacts


class Versions:
    """Resolves names at each request, so that a promotion takes effect with the next one."""

    def __init__(self, facts: dict[str, ModelFacts]) -> None:
        self._facts = facts
        self._lookup = Lookup(Registry.default())

    async def resolve(self, model: str, call: Call) -> str:
        """Return `base` or `base:name@version` for `model`; notes it in `call`, lineage headers included.

        Raises:
            Refusal: there is no such adapter, or it cannot be read.
        """
        base, _, ref = model.partition(":")
        call.model = base
        call.response_headers |= _base_lineage(self._facts[base])
        if not ref:
            return base
        with adapter_errors():
            version = await asyncio.to_thread(self._lookup.resolve, base, ref, user=user_of(call))
        call.adapter, call.version = version.name, version.version
        call.response_headers |= _adapter_lineage(version)
        return version.served_name


def user_of(call: Call) -> str:
    """Return who a canary takes the caller for: the client's own user, else the key, else the address.

    Behind a proxy, all who send neither have its address, and get the same version.
    """
    return f"user {call.user}" if call.user else f"key {call.key_id}" if call.key_id else f"address {call.client}"


def _base_lineage(facts: ModelFacts) -> dict[str, str]:
    lineage = {"x-kajiya-model": facts.name, "x-kajiya-precision": facts.precision, "x-kajiya-engine": facts.engine}
    return lineage | ({"x-kajiya-revision": facts.revision} if facts.revision else {})


def _adapter_lineage(version: AdapterVersion) -> dict[str, str]:
    return {
        "x-kajiya-adapter": f"{version.name}@{version.version}",
        "x-kajiya-data-sha256": version.manifest.data.sha256,
    }
