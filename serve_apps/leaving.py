"""A replica whose engine has died ends by itself.

It refuses at once whatever it is sent, and so looks like the replica with the most room: Serve's router would send it
nearly everything until three of Serve's checks have failed. A process that is gone is noticed with the next request.
"""

import os
import threading
import time

from serve_apps.engine import EngineStopped
from serve_apps.log import logger
from serve_apps.token_engine import TokenEngine

CHECK_S = 0.2
LAST_WORDS_S = 0.3
"""For those whose answers were in the batch to be told to try again."""


def end_with_engine(engine: TokenEngine) -> None:
    """End the calling process, which is a replica's, soon after `engine` has died."""
    threading.Thread(target=_wait_and_end, args=(engine,), daemon=True).start()


def _wait_and_end(engine: TokenEngine) -> None:
    while True:
        time.sleep(CHECK_S)
        try:
            engine.check_health()
        except EngineStopped as error:
            logger.error("%s; this replica ends", error)
            time.sleep(LAST_WORDS_S)
            os._exit(1)
