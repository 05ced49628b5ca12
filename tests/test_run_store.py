"""Runs on a disk and on an object store: whole checkpoints or none, found again by name."""

import errno
import os
from pathlib import Path

import pytest

from train_jobs.run_store import RunStore, StorageUnusable, UnknownRun, find_run, new_run


@pytest.fixture(params=["disk", "object store"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    storage = str(tmp_path / "runs") if request.param == "disk" else f"mock:///{tmp_path.name}"
    made = new_run("shop", storage)
    made.write_record(b"{}")
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    made.mkdir()
    (made / "state.pt").write_bytes(b"weights")
    return made


def test_checkpoints_are_found_by_step_and_pruned(run: RunStore, folder: Path, tmp_path: Path) -> None:
    for step in (3, 20, 100):
        run.save(step, folder, b"record")
    assert run.steps() == [3, 20, 100]
    run.prune([100, 3])
    assert run.steps() == [3, 100]
    found = run.checkpoint(100, tmp_path / "cache")
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        "state.pt": b"weights",
        "record.json": b"record",
    }


def test_a_full_disk_leaves_nothing_that_looks_like_a_checkpoint(
    run: RunStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(3, folder, b"record")

    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for method in ("cluster.store.fs.copy_files", "cluster.store.FolderStore.write"):
        with monkeypatch.context() as patch:
            patch.setattr(method, fill)
            with pytest.raises(OSError, match="No space left"):
                run.save(6, folder, b"record")
        assert run.steps() == [3]
    run.save(6, folder, b"record")
    assert run.steps() == [3, 6]


def test_a_result_is_read_only_when_it_is_whole(run: RunStore, folder: Path, tmp_path: Path) -> None:
    assert run.read_result() is None
    run.save_result(folder, b"outcome")
    assert run.read_result() == b"outcome"
    assert (run.result(tmp_path / "cache") / "state.pt").read_bytes() == b"weights"


def test_a_run_is_found_by_its_name_and_the_latest_by_its_adapters(tmp_path: Path) -> None:
    names = ["shop-20260102-000000-aaaaaa", "shop-20260101-000000-bbbbbb", "shop-2-20260103-000000-cccccc"]
    for name in names:
        RunStore(root=str(tmp_path), run=name).write_record(b"{}")
    assert find_run("shop", str(tmp_path)).run == names[0]
    assert find_run("shop-2", str(tmp_path)).run == names[2]
    assert find_run(names[1], str(tmp_path)).run == names[1]
    with pytest.raises(UnknownRun, match=rf"no run 'cat' in {tmp_path}.* there are {names[2]}, "):
        find_run("cat", str(tmp_path))


def test_what_is_deleted_is_gone_and_may_be_deleted_again(run: RunStore, folder: Path) -> None:
    run.save(3, folder, b"record")
    run.delete()
    assert not run.is_visible()
    assert run.steps() == []
    run.delete()


def test_storage_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageUnusable, match=r"Cannot keep runs in nowhere://x .*use a folder"):
        new_run("shop", "nowhere://x")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageUnusable, match=f"Cannot keep runs in {tmp_path}/file"):
        new_run("shop", str(tmp_path / "file"))
