"""From a served name to one exact adapter version, and what the answer says of its origin."""

import asyncio

from cluster.errors import UserError
from cluster.registry import AdapterVersion, Registry, UnknownAdapter
from serve_apps.call import Call
from serve_apps.facts import ModelFacts
from serve_apps.refusals import Refusal


class Versions:
    """Resolves names at each request, so that a promotion takes effect with the next one."""

    def __init__(self, facts: dict[str, ModelFacts]) -> None:
        self._facts = facts
        self._registry = Registry.default()

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
        version = await self._find(base, ref)
        call.adapter, call.version = version.name, version.version
        call.response_headers |= _adapter_lineage(version)
        return version.served_name

    async def _find(self, base: str, ref: str) -> AdapterVersion:
        try:
            return await asyncio.to_thread(self._registry.resolve, base, ref)
        except UnknownAdapter as error:
            raise Refusal(str(error), param="model", code="model_not_found", status=404) from error
        except UserError as error:
            raise Refusal(str(error), param="model", code="adapter_unusable") from error


def _base_lineage(facts: ModelFacts) -> dict[str, str]:
    lineage = {"x-kajiya-model": facts.name, "x-kajiya-precision": facts.precision, "x-kajiya-engine": facts.engine}
    return lineage | ({"x-kajiya-revision": facts.revision} if facts.revision else {})


def _adapter_lineage(version: AdapterVersion) -> dict[str, str]:
    return {
        "x-kajiya-adapter": f"{version.name}@{version.version}",
        "x-kajiya-data-sha256": version.manifest.data.sha256,
    }
