"""Which of a pack's slots are taken: trials come beside a pass, and what is measured between two needs a slot too."""

from threading import Lock


class Slots:
    """The first free one goes first; all methods are for any thread."""

    def __init__(self, num_slots: int) -> None:
        self._lock = Lock()
        self._free = set(range(num_slots))

    @property
    def num_free(self) -> int:
        """Return how many are left."""
        return len(self._free)

    def take(self) -> int | None:
        """Return a slot that is nobody else's until it is given back; None when there is none left."""
        with self._lock:
            if not self._free:
                return None
            self._free.remove(slot := min(self._free))
            return slot

    def give_back(self, slot: int) -> None:
        """Let another have the slot, which is empty."""
        with self._lock:
            self._free.add(slot)
