"""Which requests may read each other's cache: those whose prompts begin alike and that go through the same adapter.

transformers finds whole blocks of a prompt in its cache by a hash of their tokens. The same tokens under two adapters
have different keys and values, so here the first tokens of a request are numbered anew for each adapter before they
are hashed. Blocks that nobody uses any more stay until their room is needed, the oldest leave first.
"""

from collections.abc import Callable
from itertools import islice

from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

MAX_TOKEN = 2**31
"""The hash reads 32-bit integers with a sign."""
NUM_SALTED = 4


class Prefixes:
    """Takes the place of `processor`'s own search for known prefixes; `salt_of` numbers the adapters, 0 is none."""

    def __init__(
        self, processor: ContinuousBatchProcessor, salt_of: Callable[[RequestState], int], *, vocab_size: int
    ) -> None:
        self._cache = processor.cache
        self._scheduler = processor.scheduler
        self._salt_of = salt_of
        self._vocab_size = vocab_size
        self._search = self._cache.search_prefix_match
        self._cache.search_prefix_match = self._match
        self._cache.mark_complete_blocks = self._mark

    @property
    def num_idle_blocks(self) -> int:
        """Return the blocks that only wait to be found."""
        return sum(len(allocator.ledger.cached_blocks) for allocator in self._cache.cache_allocators.values())

    def make_room(self, num_blocks: int) -> None:
        """Forget idle blocks until `num_blocks` are free, or none is idle; to be called between two passes."""
        for allocator in self._cache.cache_allocators.values():
            pool, ledger = self._cache.pool, allocator.ledger
            free = pool.num_free_sectors * allocator.blocks_per_sector + pool.count_free_blocks(allocator.index)
            oldest = list(islice(ledger.cached_blocks, max(0, num_blocks - free)))
            for block_id in oldest:
                del ledger.cached_blocks[block_id]
                del ledger.hash_to_block[ledger.block_to_hash.pop(block_id)]
            pool.free_blocks(allocator.index, oldest)

    def _match(self, request_id: str, prompt_ids: list[int]) -> int:
        state = self._scheduler.waiting_requests.get(request_id)
        if state is None:
            return 0
        found: int = self._search(request_id, salted(prompt_ids, self._salt_of(state), self._vocab_size))
        return found

    def _mark(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        # What `PagedAttentionCache.mark_complete_blocks` does, with salted tokens.
        if not complete_blocks or state.status == RequestStatus.FINISHED:
            return
        token_ids = salted(state.initial_tokens + state.generated_tokens, self._salt_of(state), self._vocab_size)
        for name, num_new in complete_blocks.items():
            self._cache.cache_allocators[name].mark_complete_blocks(state.request_id, token_ids, num_new)


def salted(token_ids: list[int], salt: int, vocab_size: int) -> list[int]:
    """Return `token_ids` with the digits of `salt` in the first ones: two salts never give the same list.

    A digit d moves a token to d x vocabulary + token, and there are as many digits as 31 bits hold.
    """
    base = MAX_TOKEN // vocab_size
    digits = []
    for _ in token_ids[:NUM_SALTED]:
        salt, digit = divmod(salt, base)
        digits.append(digit)
    return [token + digit * vocab_size for token, digit in zip(token_ids, digits, strict=False)] + token_ids[
        NUM_SALTED:
    ]
