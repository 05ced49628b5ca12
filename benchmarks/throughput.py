"""Output tokens per second through HTTP: ours beside Ray Serve LLM with vLLM and `transformers serve`."""

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.adapter_files import MODEL
from benchmarks.bench import Bench
from benchmarks.claims import Claim, Result
from benchmarks.load import Target, alternate, spread
from benchmarks.servers import PEER_PREFIX, run_ray_serve_llm, transformers_serve

OURS, RAY_SERVE_LLM, TRANSFORMERS = "kajiya", "Ray Serve LLM + vLLM", "transformers serve"


def measure(bench: Bench) -> Result:
    """Return the speeds of the three, all up, one asked at a time."""
    with _peers(bench) as peers:
        rounds = alternate(
            {OURS: bench.kajiya(), **peers},
            num_rounds=bench.num_rounds,
            num_streams=bench.num_streams,
            max_tokens=bench.max_tokens,
        )
    numbers = {name: spread([r.tokens_per_s(bench.tokenizer) for r in measured]) for name, measured in rounds.items()}
    medians = {name: float(values["median"]) for name, values in numbers.items()}  # type: ignore[arg-type]
    best = max(medians[name] for name in peers)
    texts = [measured[0].texts for measured in rounds.values()]
    same = [sum(a == b for a, b in zip(texts[0], other, strict=True)) for other in texts[1:]]
    return Result(
        numbers=numbers,
        unit="tokens/s",
        claims=(
            Claim(what="tokens/s over the better peer", measured=medians[OURS] / best, bound=1.0, direction="at least"),
        ),
        notes=tuple(
            f"{number} of {bench.num_streams} greedy answers are those of {name}, to the letter"
            for name, number in zip(peers, same, strict=True)
        ),
    )


@contextmanager
def _peers(bench: Bench) -> Iterator[dict[str, Target]]:
    from ray import serve

    run_ray_serve_llm(MODEL, bench.model_folder)
    try:
        with transformers_serve(
            bench.model_folder,
            num_cached_tokens=bench.plan.kv_cache_tokens,
            max_batch_tokens=bench.plan.max_batch_tokens,
        ) as url:
            yield {
                RAY_SERVE_LLM: Target(url=bench.serve_url + PEER_PREFIX, models=(MODEL,)),
                TRANSFORMERS: Target(url=url, models=(str(bench.model_folder),)),
            }
    finally:
        serve.delete("peer")
