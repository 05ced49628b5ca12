"""What all tests share: a state folder of their own, no network, and the embedded model, converted once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any library reads them: no test may ask a hub, and progress bars only blur a report.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# pytest-xdist hands its terminal's width to its workers, and rich keeps the first one it sees.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)


@pytest.fixture(scope="session", autouse=True)
def kajiya_home_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("kajiya-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_HOME", str(home))
        patch.delenv("KAJIYA_REGISTRY", raising=False)
        patch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        yield home


@pytest.fixture(scope="session")
def smollm2(kajiya_home_of_the_session: Path) -> Path:
    """The folder of the embedded model as safetensors."""
    from cluster.models.embedded import embedded_folder

    return embedded_folder()
