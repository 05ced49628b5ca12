"""What all measurements of one run share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.adapter_files import MODEL, register, write_adapters
from benchmarks.load import Target
from cluster.catalog import find
from cluster.hardware import detect
from cluster.keys import KeyStore
from cluster.models.embedded import embedded_folder
from cluster.plan import ServingPlan, plan_serving

NUM_ADAPTERS = 8
RANK = 8


@dataclass(kw_only=True)
class Bench:
    """The model, its adapters and a key, in folders of this run alone."""

    home: Path
    num_rounds: int
    num_streams: int
    max_tokens: int
    key: str
    kajiya_url: str = ""
    """Empty until our application runs."""
    serve_url: str = ""
    """Of Serve's proxy, through which the peer on Ray Serve is reached."""

    @cached_property
    def model_folder(self) -> Path:
        """Return the weights that all servers load."""
        return embedded_folder()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return what counts the tokens of answers."""
        return AutoTokenizer.from_pretrained(self.model_folder)

    @cached_property
    def plan(self) -> ServingPlan:
        """Return how our replica serves the model."""
        return plan_serving(find(MODEL), detect())

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """Return the PEFT folders of the adapters, which are registered too."""
        names = tuple(f"a{i}" for i in range(NUM_ADAPTERS))
        targets = find(MODEL).target_modules
        folders = write_adapters(self.model_folder, self.home / "peft", names=names, r=RANK, target_modules=targets)
        register(folders)
        return folders

    def kajiya(self, *models: str) -> Target:
        """Return our endpoint; by default its bare base."""
        return Target(url=self.kajiya_url, models=models or (MODEL,), headers={"Authorization": f"Bearer {self.key}"})


@contextmanager
def bench(*, num_rounds: int, num_streams: int, max_tokens: int) -> Iterator[Bench]:
    """Yield a run whose registry and keys are empty but for its own."""
    with TemporaryDirectory(prefix="kajiya-bench-") as home:
        # The replicas inherit them.
        os.environ["KAJIYA_REGISTRY"] = f"{home}/adapters"
        os.environ["KAJIYA_KEYS"] = f"{home}/keys"
        os.environ["HF_HUB_OFFLINE"] = "1"
        _, key = KeyStore.default().create("bench")
        yield Bench(home=Path(home), num_rounds=num_rounds, num_streams=num_streams, max_tokens=max_tokens, key=key)
