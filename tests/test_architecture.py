"""Who may import whom, and what planning may not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cluster", "serve_apps", "train_jobs", "tune_spaces", "kajiya")
MAY_IMPORT = {
    "cluster": {"cluster"},
    "serve_apps": {"serve_apps", "cluster"},
    "train_jobs": {"train_jobs", "cluster"},
    "tune_spaces": {"tune_spaces", "train_jobs", "cluster"},
    "kajiya": set(ROOMS),
}


def sources(room: str) -> list[Path]:
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imported_rooms(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):  # walks into functions too
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            names.add((node.module or "").partition(".")[0])
    return names & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    files = sources(room)
    assert files
    for source in files:
        assert imported_rooms(source) <= MAY_IMPORT[room], source


def test_only_the_torch_room_of_cluster_imports_torch_at_module_level() -> None:
    heavy = {"torch", "transformers", "ray", "peft", "accelerate", "vllm", "bitsandbytes"}
    files = [f for f in sources("cluster") if "models" not in f.relative_to(ROOT).parts]
    assert len(files) > 10
    for source in files:
        for node in ast.parse(source.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {n.partition(".")[0] for n in names}, source


def test_the_command_starts_without_torch_or_ray() -> None:
    code = "import sys, kajiya; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_trial_on_a_shared_base_starts_without_torch_or_transformers() -> None:
    # what its process unpickles: the trial itself, and what all have in common, samples included
    modules = "tune_spaces.packed_trial, train_jobs.token_store"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_package_is_shipped() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    packages = [p.parent.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("__init__.py")]
    assert len(packages) >= 5
    for package in packages:
        assert f'"{".".join(package.parts)}"' in listed
