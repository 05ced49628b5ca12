"""Who comes in: keys, scopes, limits and bounds of every request, before anything reads it."""

import hmac
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.keys import KeyRecord, hash_secret, split_token
from serve_apps.admission import Admission
from serve_apps.bodies import read_body
from serve_apps.call import Call
from serve_apps.keyring import Keyring, KeysUnknown
from serve_apps.loopback import is_from_this_machine
from serve_apps.quotas import MAX_ONGOING, MAX_ONGOING_PER_KEY, Bucket, Quota, busy
from serve_apps.refusals import Refusal

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Answered to everybody: a page without data, and probes of whether the application lives and its models answer."""
UNCOUNTED_PATHS = frozenset({"/state"})
"""Every open playground asks this each few seconds, which is not to use up the requests of its key."""
BEARER = re.compile(r"bearer +(\S+)", re.ASCII | re.IGNORECASE)
"""RFC 9110: the scheme in any case, one or more spaces."""
NEEDS_KEY = "A valid API key is needed; send it in one header, `Authorization: Bearer KEY`."
"""The same whether a key is missing, unknown or revoked."""
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_NOBODY = hash_secret("")
"""What the secret of an unknown key is compared with, so that it takes as long as that of a known one."""


class Gate:
    """Lets requests in. Sits inside `CallMiddleware`; `refuse` writes the answer to those it does not let in.

    What it counts, it counts for this process: with several ingress replicas, a key has its limits at each.
    """

    def __init__(
        self,
        app: ASGIApp,
        refuse: Callable[[Refusal], Response],
        keyring: Keyring | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._app = app
        self._refuse = refuse
        self._keyring = keyring or Keyring()
        self._clock = clock
        self._now = now
        self._quotas: dict[str, Quota] = {}
        self._num_ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or is_open(scope.get("method", ""), scope["path"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close"})  # there are none, so none is left unguarded by mistake

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["state"]["call"]
        try:
            key = await self._identify(scope, call)
            call.admission = self._admit(key, call)
        except Refusal as refusal:
            await self._send_refusal(refusal, call)(scope, receive, send)
            return
        if key is not None:
            # The secret goes no further: not to the replicas, and into nobody's log.
            scope["headers"] = [header for header in scope["headers"] if header[0] != b"authorization"]
        if scope["method"] in READING_METHODS:
            await self._app(scope, receive, send)
        else:
            await self._run(call, call.admission, scope, receive, send)

    async def _run(self, call: Call, admission: Admission, scope: Scope, receive: Receive, send: Send) -> None:
        self._num_ongoing += 1
        admission.quota.num_ongoing += 1
        try:
            admission.num_body_bytes, receive = await read_body(scope, receive)
            await self._app(scope, receive, send)
        except Refusal as refusal:
            await self._send_refusal(refusal, call)(scope, receive, send)
        finally:
            self._num_ongoing -= 1
            admission.quota.num_ongoing -= 1
            admission.settle(num_tokens=call.num_prompt_tokens + call.num_completion_tokens, status=call.status)

    async def _identify(self, scope: Scope, call: Call) -> KeyRecord | None:
        try:
            records = await self._keyring.records()
        except KeysUnknown as error:
            raise Refusal(str(error), code="keys_unavailable", status=503, retry_after_s=5) from error
        if not records:
            if is_from_this_machine(scope):
                return None
            raise _unauthorized(
                "This server has no keys yet, so it answers programs of its own machine only; "
                "create one there with `kajiya keys create NAME`."
            )
        given = split_token(_token(scope))
        record = records.get(given[0]) if given else None
        if not _has_secret(record, given[1] if given else "") or record is None:
            raise _unauthorized(NEEDS_KEY)
        call.key_id = record.id
        if record.revoked_at is not None:
            raise _unauthorized(NEEDS_KEY)
        if record.is_expired(self._now()):
            raise _unauthorized(f"This API key expired at {record.expires_at:%F %T} UTC; ask for a new one.")
        return record

    def _admit(self, key: KeyRecord | None, call: Call) -> Admission:
        key_id = key.id if key else ""
        quota = self._quotas.get(key_id) or self._quotas.setdefault(key_id, self._quota(key))
        if call.method not in READING_METHODS:
            if self._num_ongoing >= MAX_ONGOING:
                raise busy(f"The server is answering {MAX_ONGOING} requests, as many as it can; try again.")
            if key and quota.num_ongoing >= MAX_ONGOING_PER_KEY:
                raise busy(f"This key has {MAX_ONGOING_PER_KEY} requests under way, as many as one may; try again.")
        try:
            if call.path not in UNCOUNTED_PATHS:
                quota.admit()
        finally:
            call.response_headers |= quota.headers()
        return Admission(key=key, quota=quota)

    def _quota(self, key: KeyRecord | None) -> Quota:
        limits = (key.requests_per_minute, key.tokens_per_minute) if key else (None, None)
        requests, tokens = (Bucket(limit, self._clock) if limit else None for limit in limits)
        return Quota(requests=requests, tokens=tokens)

    def _send_refusal(self, refusal: Refusal, call: Call) -> Response:
        call.error_code = refusal.code
        return self._refuse(refusal)


def is_open(method: str, path: str) -> bool:
    """Return whether everybody is answered; everything that is not named here needs a key."""
    return path in OPEN_PATHS and method in READING_METHODS


def admission_of(call: Call) -> Admission:
    """Return what the gate let the request in with; raises `Refusal` (401) where no gate did."""
    if call.admission is None:
        raise _unauthorized(NEEDS_KEY)
    return call.admission


def require_admin(call: Call) -> None:
    """Raise `Refusal` (403) unless the request may change what is served."""
    if not admission_of(call).is_admin:
        message = "This API key may not change what is served; that takes one made with `kajiya keys create --admin`."
        raise Refusal(message, code="insufficient_permissions", status=403)


def _token(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    # Of several, another program on the way may have checked another one.
    match = BEARER.fullmatch(given[0].decode("latin-1").strip()) if len(given) == 1 else None
    return match[1] if match else ""


def _has_secret(record: KeyRecord | None, secret: str) -> bool:
    if record is None:
        hmac.compare_digest(hash_secret(secret), _NOBODY)
        return False
    return record.has_secret(secret)


def _unauthorized(message: str) -> Refusal:
    return Refusal(message, code="invalid_api_key", status=401)
