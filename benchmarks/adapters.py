"""The same load spread over eight adapters of rank 8: ours beside our base, and beside vLLM's LoRA and its base.

vLLM is its own server here, `vllm serve --enable-lora`: Ray Serve LLM loads adapters from cloud buckets only.
"""

from benchmarks.adapter_files import MODEL
from benchmarks.bench import RANK, Bench
from benchmarks.claims import Claim, Result
from benchmarks.load import Target, alternate, spread
from benchmarks.servers import vllm_serve

OURS, OUR_BASE, VLLM, VLLM_BASE = "kajiya, 8 adapters", "kajiya, base", "vLLM, 8 adapters", "vLLM, base"


def measure(bench: Bench) -> Result:
    """Return the four speeds, from alternating rounds."""
    names = tuple(bench.adapters)
    with vllm_serve(MODEL, bench.model_folder, bench.adapters, max_lora_rank=RANK) as url:
        rounds = alternate(
            {
                OURS: bench.kajiya(*(f"{MODEL}:{name}" for name in names)),
                OUR_BASE: bench.kajiya(),
                VLLM: Target(url=url, models=names),
                VLLM_BASE: Target(url=url, models=(MODEL,)),
            },
            num_rounds=bench.num_rounds,
            num_streams=bench.num_streams,
            max_tokens=bench.max_tokens,
        )
    numbers = {name: spread([r.tokens_per_s(bench.tokenizer) for r in measured]) for name, measured in rounds.items()}
    ours, base, vllm, _ = (float(values["median"]) for values in numbers.values())  # type: ignore[arg-type]
    return Result(
        numbers=numbers,
        unit="tokens/s",
        claims=(
            Claim(what="8 adapters over our base", measured=ours / base, bound=0.8, direction="at least"),
            Claim(what="8 adapters over vLLM's LoRA", measured=ours / vllm, bound=1.5, direction="at least"),
        ),
    )
