"""Our part of the logs of ingress and replicas: one JSON object a line, with the request's id.

Serve writes the files, an access line per request in either process, and carries the id from one to the other
(`X-Request-ID`, the client's own or a new one).
"""

import logging

LOGGING_CONFIG = {"encoding": "JSON"}
"""Serve's `LoggingConfig` of every deployment."""

logger = logging.getLogger("ray.serve.kajiya")
"""Below Serve's own, so that its lines go where Serve's go and carry what Serve's carry; `extra` becomes fields."""
