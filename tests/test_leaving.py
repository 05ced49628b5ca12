"""A process lives as long as its engine does."""

import subprocess
import sys
import time

REPLICA = """
import time
from serve_apps.engine import EngineStopped
from serve_apps.leaving import end_with_engine

class Mortal:
    ends_s = time.monotonic() + {lives_s}

    def check_health(self):
        if time.monotonic() > self.ends_s:
            raise EngineStopped("it was killed")

end_with_engine(Mortal())
print("up", flush=True)
time.sleep({waits_s})
"""


def test_a_replica_ends_with_its_engine_and_not_before() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", REPLICA.format(lives_s=1, waits_s=30)], stdout=subprocess.PIPE, text=True
    ) as replica:
        assert replica.stdout is not None
        assert replica.stdout.readline() == "up\n"
        up_s = time.monotonic()
        assert replica.wait(15) == 1
        assert 0.5 < time.monotonic() - up_s < 5


def test_a_replica_whose_engine_lives_ends_when_it_wants() -> None:
    done = subprocess.run([sys.executable, "-c", REPLICA.format(lives_s=60, waits_s=1)], check=False, timeout=60)
    assert done.returncode == 0
