"""What only a store in a folder can meet: permissions, a full disk, strange folders, other file systems."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from condu_ray.errors import NotFound, StoreError, VersionTaken
from condu_ray.store import LocalStore, Store, create_store, files, local, open_store
from condu_ray.store.history import rollback

ARRAYS = {"u": np.arange(10, dtype=np.float32)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refuse(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refused)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def root(store: Store) -> Path:
    return Path(store.url)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_behind(
    store: Store, root: Path, publish: Any, make_manifest: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    publish(store, 1)
    before = contents(root)
    refuse(monkeypatch, files.os, "fsync", number)
    with pytest.raises(StoreError, match="no space left to write .*u.safetensors: free some space"):
        store.put("key", "u", ARRAYS)
    with pytest.raises(StoreError, match="no space left to write .*00000002.json"):
        store.commit(make_manifest(2))
    assert contents(root) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_no_permission_is_said_so(
    store: Store, root: Path, make_header: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    before = contents(root)
    refuse(monkeypatch, Path, "mkdir", number)
    with pytest.raises(StoreError, match="no permission to write .*u.safetensors .*choose another --store"):
        store.put("key", "u", ARRAYS)
    with pytest.raises(StoreError, match="no permission to make a store in .*new"):
        create_store(tmp_path / "new", make_header())
    with pytest.raises(StoreError, match="no permission to write in .*work/key"):
        store.work("key")
    assert contents(root) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the system's administrator may write everywhere")
def test_a_folder_that_cannot_be_written(
    store: Store, root: Path, publish: Any, make_manifest: Any, make_header: Any
) -> None:
    publish(store, 1)
    before = contents(root)
    folders = [path for path in [root, *root.rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert open_store(root).get(store.manifest(1).objects["u"])["u"][0] == 1
        for write in (
            lambda: store.put("key", "u", ARRAYS),
            lambda: store.commit(make_manifest(2)),
            lambda: create_store(root / "inside", make_header()),
        ):
            with pytest.raises(StoreError, match="no permission"):
                write()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert contents(root) == before


def test_opening_what_is_no_store(tmp_path: Path, make_header: Any) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(StoreError, match="file is a file, not the folder of a store"):
        open_store(file)
    with pytest.raises(StoreError, match="a file is in the way"):
        create_store(file, make_header())
    with pytest.raises(NotFound, match=r"is a folder without a store \(no store.json\)"):
        open_store(tmp_path)
    with pytest.raises(NotFound, match="no store at"):
        open_store(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_url_opens_the_folder(store: Store) -> None:
    assert open_store(f"file://{store.url}").header == store.header


def test_damaged_json_is_named(store: Store, root: Path, publish: Any) -> None:
    publish(store, 1)
    publish(store, 2)
    (root / "versions" / "00000002.json").write_text("{")
    with pytest.raises(StoreError, match="00000002.json is not readable JSON"):
        store.manifest()
    assert store.manifest(1).version == 1
    with pytest.raises(StoreError, match=r"00000002.json"):
        store.gc()
    (root / "versions" / "00000002.json").write_bytes((root / "versions" / "00000001.json").read_bytes())
    with pytest.raises(StoreError, match="says that it is version 1"):
        store.manifest(2)
    (root / "store.json").write_text("[]")
    with pytest.raises(StoreError, match="store.json holds no JSON object"):
        open_store(root)


def test_the_newest_manifest_is_damaged_if_it_is_empty(store: Store, root: Path, publish: Any) -> None:
    """Its number is taken, and no gc empties it."""
    publish(store, 1)
    publish(store, 2)
    (root / "versions" / "00000002.json").write_bytes(b"")
    assert store.versions() == [1, 2]
    with pytest.raises(StoreError, match=r"00000002.json is not readable JSON"):
        store.manifest()
    assert rollback(store, 1).version == 3
    assert store.versions() == [1, 3]


def test_foreign_files_are_no_versions(store: Store, root: Path, publish: Any) -> None:
    publish(store, 1)
    for name in ("notes.txt", "7.json", "00000002.json.tmp", ".00000002.json"):
        (root / "versions" / name).write_text("{")
    assert store.versions() == [1]


def test_a_copy_without_empty_folders_opens(store: Store, root: Path, publish: Any) -> None:
    for folder in ("versions", "objects"):
        (root / folder).rmdir()
    again = open_store(root)
    assert again.versions() == []
    publish(again, 1)
    assert again.get(again.manifest(1).objects["u"])["u"][0] == 1


def test_a_killed_creation_is_finished_by_the_next(tmp_path: Path, make_header: Any, publish: Any) -> None:
    root = tmp_path / "store"
    (root / "versions").mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp" / "half").write_text("{")
    with pytest.raises(NotFound):
        open_store(root)
    publish(create_store(root, make_header()), 1)
    assert open_store(root).versions() == [1]


def test_leftovers_of_a_killed_writer_are_not_seen_and_go(store: Store, root: Path, publish: Any) -> None:
    publish(store, 1)
    (root / "tmp" / "half").write_bytes(b"half an object")
    assert store.versions() == [1]
    assert store.gc().in_use == ["tmp/half"]
    os.utime(root / "tmp" / "half", (0, 0))
    report = store.gc()
    assert report.leftovers == ["tmp/half"]
    assert report.bytes == len("half an object")
    assert not (root / "tmp" / "half").exists()


class TestOtherFileSystems:
    def test_without_hard_links(
        self, store: Store, root: Path, publish: Any, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuse(monkeypatch, files.os, "link", errno.EPERM)
        publish(store, 1)
        with pytest.raises(FileExistsError), files.temporary(root / "tmp", [b"new"]) as source:
            files.publish(source, root / "versions" / "00000001.json", True)
        with pytest.raises(VersionTaken):
            store.commit(make_manifest(1, message="second"))
        assert store.get(store.manifest(1).objects["u"])["u"][0] == 1
        assert list((root / "tmp").iterdir()) == []

    def test_an_object_of_another_user_is_there_though_it_cannot_be_touched(
        self, store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref = store.put("key", "u", {"u": np.ones(3)})
        refuse(monkeypatch, os, "utime", errno.EACCES)
        assert store.touch(ref.path)
        refuse(monkeypatch, os, "utime", errno.EIO)
        with pytest.raises(StoreError, match="cannot touch"):
            store.touch(ref.path)

    def test_a_lock_is_of_a_file_since_network_file_systems_keep_those_of_folders_to_one_machine(
        self, store: Store, root: Path
    ) -> None:
        """Whoever holds it, by whichever process, keeps writers waiting."""
        with open(root / "lock", "r+b") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with ThreadPoolExecutor(1) as pool:
                put = pool.submit(store.put, "key", "u", {"u": np.ones(3)})
                with pytest.raises(TimeoutError):
                    put.result(timeout=0.5)
                fcntl.flock(held, fcntl.LOCK_UN)
                assert store.fault(put.result(timeout=60)) is None

    def test_without_links_and_locks_nothing_is_promised(
        self, store: Store, root: Path, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuse(monkeypatch, files.os, "link", errno.EPERM)
        refuse(monkeypatch, files.fcntl, "flock", errno.ENOLCK)
        with pytest.raises(StoreError, match="neither hard links nor locks"):
            store.commit(make_manifest(1))
        assert store.versions() == []

    def test_a_link_that_was_made_but_reported_failed(
        self, store: Store, publish: Any, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.link

        def lost_answer(source: Any, target: Any) -> None:
            real(source, target)
            raise OSError(errno.EIO, "input/output error")

        monkeypatch.setattr(files.os, "link", lost_answer)
        publish(store, 1)
        assert store.versions() == [1]

    def test_a_number_taken_between_look_and_link(
        self, store: Store, publish: Any, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(store, 1)
        before = store.manifest(1)
        monkeypatch.setattr(LocalStore, "versions", lambda self: [])  # as if another machine's locks were not ours
        with pytest.raises(VersionTaken):
            store.commit(make_manifest(1, message="second"))
        monkeypatch.undo()
        assert store.manifest(1) == before


def test_an_object_is_hashed_once_a_process(store: Store, publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = publish(store, 1)
    hashed: list[Path] = []
    real = local.hash_file
    monkeypatch.setattr(local, "hash_file", lambda path: hashed.append(path) or real(path))
    for _ in range(3):
        open_store(store.url).get(ref)
    assert len(hashed) == 1


def test_reading_manifests_loads_no_arrays(store: Store, publish: Any) -> None:
    publish(store, 1)
    program = (
        "import sys; from condu_ray.store import open_store; "
        "print(open_store(sys.argv[1]).manifest().version, *sorted({'numpy', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, store.url], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
