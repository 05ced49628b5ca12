"""The keys as the ingress knows them: read from their store every few seconds, never for a request."""

import asyncio
import time
from collections.abc import Callable

from cluster.errors import UserError
from cluster.keys import BrokenKey, KeyRecord, KeyStore
from serve_apps.log import logger

REFRESH_S = 1.0
"""Age at which the keys are read again, while requests go on with those that are known."""
STALE_S = 4.0
"""Age at which a request waits for them: a key that is revoked while nobody asks is refused at the next request."""


class KeysUnknown(UserError, OSError):
    """Nobody can be let in, since nobody knows the keys."""


class Keyring:
    """All keys of one store by id. A store that does not answer leaves what was known of it."""

    def __init__(self, store: KeyStore | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store or KeyStore.default()
        self._clock = clock
        self._stamps: dict[str, tuple[int, int]] = {}
        self._records: dict[str, KeyRecord | None] = {}
        self._read_s = -STALE_S
        self._is_known = False
        self._reading: asyncio.Task[None] | None = None

    async def records(self) -> dict[str, KeyRecord | None]:
        """Return the keys by id, at most `STALE_S` old; None is one that cannot be read, which refuses its requests.

        Raises:
            KeysUnknown: the store has never answered.
        """
        age_s = self._clock() - self._read_s
        if age_s >= REFRESH_S and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None and (age_s >= STALE_S or not self._is_known):
            await asyncio.wait({self._reading}, timeout=STALE_S)
        if not self._is_known:
            raise KeysUnknown("The API keys cannot be read at the moment; the server's log says why.")
        return self._records

    async def _read(self) -> None:
        begin_s = self._clock()
        try:
            self._stamps, self._records = await asyncio.to_thread(self._changed)
        except OSError as error:
            logger.warning("%s Until then, the keys that are known go on.", error)
            return
        self._is_known = True
        self._read_s = begin_s

    def _changed(self) -> tuple[dict[str, tuple[int, int]], dict[str, KeyRecord | None]]:
        stamps = self._store.stamps()
        records = {
            key_id: self._records[key_id] if self._stamps.get(key_id) == stamp else self._open(key_id)
            for key_id, stamp in stamps.items()
        }
        return stamps, records

    def _open(self, key_id: str) -> KeyRecord | None:
        try:
            return self._store.read(key_id)
        except (BrokenKey, FileNotFoundError) as error:
            logger.warning("A key is refused: %s", error)
            return None
