"""Webdataset folders: plain and compressed tars, the cache, damage, and labels that do not match."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import time

import numpy as np
import pytest

from condu_ray.data import load_picture, open_task
from condu_ray.data.cache import fill
from condu_ray.errors import DataError

CLASSES = ["zero", "one", "two"]


def cached(cache):
    return sorted(path.name for path in (cache / "tars").iterdir()) if (cache / "tars").is_dir() else []


def test_plain_tar_is_read_where_it_lies(make, tmp_path, cache):
    task = open_task("t", make.tar_folder(tmp_path / "d", CLASSES))
    assert task.classes == tuple(CLASSES) and not task.split_made
    assert np.bincount(task.train.labels).tolist() == [4, 4, 4]
    assert np.bincount(task.test.labels).tolist() == [2, 2, 2]
    assert {picture.path for picture in task.train.pictures} == {str(tmp_path / "d/train/0.tar")}
    assert cached(cache) == []
    assert load_picture(task.train.pictures[0]).size == (8, 6)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tar_gives_the_same_task(make, tmp_path, cache, pack):
    plain = open_task("t", make.tar_folder(tmp_path / "plain", CLASSES))
    folder = make.tar_folder(tmp_path / "packed", CLASSES)
    for part in ("train", "test"):
        make.write(folder / part / "0.tar", pack((folder / part / "0.tar").read_bytes()))
    packed = open_task("t", folder)
    assert packed.fingerprint == plain.fingerprint
    assert packed.train.labels.tolist() == plain.train.labels.tolist()
    pixels = [np.asarray(load_picture(task.test.pictures[3])) for task in (plain, packed)]
    assert np.array_equal(*pixels)
    assert len(cached(cache)) == 2


def test_damaged_and_partial_copies_in_the_cache_do_no_harm(make, tmp_path, cache):
    folder = make.tar_folder(tmp_path / "d", CLASSES, packed=True)
    first = open_task("t", folder)
    names = cached(cache)
    copies = [cache / "tars" / name for name in names]
    copies[0].write_bytes(copies[0].read_bytes()[:5000])
    body = bytearray(copies[1].read_bytes())
    body[700] ^= 1
    copies[1].write_bytes(body)
    (cache / "tars" / "partial-abc").write_bytes(b"half")
    again = open_task("t", folder)
    assert again == first
    assert cached(cache) == [*names, "partial-abc"]


def test_what_killed_processes_left_in_the_cache_is_removed_after_a_week(make, tmp_path, cache):
    for name, days in (("tars/partial-old", 8), ("tars/partial-new", 6), ("tars/partial-folder/x", 0)):
        make.write(cache / name, b"half")
        os.utime(cache / name, (time.time() - days * 86400,) * 2)
    os.utime(cache / "tars" / "partial-folder", (time.time() - 8 * 86400,) * 2)
    open_task("t", make.tar_folder(tmp_path / "d", CLASSES, packed=True))
    assert [name for name in cached(cache) if name.startswith("partial")] == ["partial-new"]


def test_others_may_read_the_cache_as_the_umask_says(make, tmp_path, cache):
    """A cache on a shared disk is read by workers of other users."""
    before = os.umask(0o027)
    try:
        open_task("t", make.tar_folder(tmp_path / "d", CLASSES, packed=True))
        fill(cache / "folder", lambda partial: None)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (cache / "tars").iterdir()} == {0o640}
    assert (cache / "folder").stat().st_mode & 0o777 == 0o750


def test_second_opening_does_not_unpack_again(make, tmp_path, cache):
    folder = make.tar_folder(tmp_path / "d", CLASSES, packed=True)
    open_task("t", folder)
    before = [path.stat().st_mtime_ns for path in (cache / "tars").iterdir()]
    open_task("t", folder)
    assert [path.stat().st_mtime_ns for path in (cache / "tars").iterdir()] == before


def test_a_cache_that_cannot_be_made(make, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDU_CACHE", str(make.write(tmp_path / "file", b"")))
    with pytest.raises(DataError, match="cache folder .* cannot be written .*: set CONDU_CACHE"):
        open_task("t", make.tar_folder(tmp_path / "d", CLASSES, packed=True))


def test_train_alone_is_split(make, tmp_path):
    task = open_task("t", make.tar_folder(tmp_path / "d", CLASSES, test=False))
    assert task.split_made and (len(task.train), len(task.test)) == (9, 3)


@pytest.mark.parametrize(("parts", "train", "test"), [(("train", "val"), 6, 6), (("Train", "VAL", "test"), 12, 6)])
def test_a_validation_split_is_taken_as_that_of_a_folder(make, tmp_path, parts, train, test):
    make.write(tmp_path / "classnames.txt", "\n".join(CLASSES).encode())
    for first, part in enumerate(parts):
        make.write(tmp_path / part / "0.tar", make.tar_bytes(make.pairs([0, 1, 2] * 2, first=10 * first)))
    task = open_task("t", tmp_path)
    assert not task.split_made and (len(task.train), len(task.test)) == (train, test)
    assert len(open_task("t", tmp_path, validation=0.5).train) == train // 2


def test_members_with_unsafe_names_are_never_written_to_disk(make, tmp_path):
    root = tmp_path / "deep" / "er" / "d"
    make.tar_folder(root, CLASSES)
    files = make.pairs([0, 0, 1, 1, 2, 2])
    evil = {f"../../../evil/{name}": body for name, body in files.items()}
    evil |= {f"{tmp_path}/absolute/{name}": body for name, body in make.pairs([0, 1, 2], first=50).items()}
    make.write(root / "train" / "0.tar", gzip.compress(make.tar_bytes(evil)))
    assert len(open_task("t", root).train) == 9
    assert not list(tmp_path.rglob("evil")) and not (tmp_path / "absolute").exists()


def test_links_and_folders_in_a_tar_are_not_followed(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    secret = make.write(tmp_path / "secret.png", make.picture_bytes(999))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, body in make.pairs([0, 0, 1, 1, 2, 2]).items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    make.write(root / "train" / "0.tar", file.getvalue())
    assert len(open_task("t", root).train) == 6


def test_several_shards_and_picture_kinds(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    make.write(root / "train" / "1.tar", make.tar_bytes(make.pairs([0, 1, 2], first=60, ending="jpeg")))
    make.write(root / "train" / "2.tar", make.tar_bytes(make.pairs([0, 1, 2], first=70, ending="webp")))
    make.write(root / "train" / "3.tar", make.tar_bytes(make.pairs([0, 1, 2], first=80, ending="bmp")))
    make.write(root / "train" / "4.tar", make.tar_bytes(make.pairs([0, 1, 2], first=90, ending="tiff")))
    make.write(root / "train" / "nshards.txt", b"5")
    assert len(open_task("t", root).train) == 24
    (root / "train" / "2.tar").unlink()
    with pytest.raises(DataError, match="nshards.txt says '5', but there are 4 tars"):
        open_task("t", root)


def test_members_that_macos_adds_are_left_out(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    files = {f"set/{name}": body for name, body in make.pairs([0, 1, 2] * 2).items()}
    files |= {"set/._s0.png": b"\0\5\x16\7", "._s0.cls": b"\0\5\x16\7", "__MACOSX/._s1.png": b"\0\5\x16\7"}
    make.write(root / "train" / "0.tar", make.tar_bytes(files))
    task = open_task("t", root)
    assert len(task.train) == 6 and not task.skipped


def test_members_without_a_partner_are_skipped(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    files = make.pairs([0, 1, 2] * 20)
    del files["s3.cls"], files["s7.png"]
    files["s9.jpg"] = make.picture_bytes(9, kind="JPEG")
    files["s9.json"] = b"{}"
    make.write(root / "train" / "0.tar", make.tar_bytes(files))
    task = open_task("t", root)
    assert len(task.train) == 58
    assert {(one.path, one.reason) for one in task.skipped} == {
        ("train/0.tar: s3.png", "no .cls file beside it"),
        ("train/0.tar: s7.cls", "no picture beside it"),
        ("train/0.tar: s9.jpg", "a second picture of the same name"),
    }


@pytest.mark.parametrize("cut", [0, 700, 512 * 3, 512 * 3 + 100, 512 * 4])
def test_a_tar_that_was_cut_off(make, tmp_path, cut):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    path = root / "train" / "0.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train/0\.tar is .*damaged.*: fetch it again"):
        open_task("t", root)


def test_a_header_damaged_in_the_middle_loses_nothing_silently(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    path = root / "train" / "0.tar"
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[8].offset
    body = bytearray(path.read_bytes())
    body[offset + 150] ^= 0x55
    path.write_bytes(body)
    with pytest.raises(DataError, match=f"damaged or cut off at byte {offset}"):
        open_task("t", root)


def test_a_cut_off_compressed_tar(make, tmp_path, cache):
    root = make.tar_folder(tmp_path / "d", CLASSES, packed=True)
    path = root / "train" / "0.tar"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"train/0\.tar is damaged and cannot be unpacked"):
        open_task("t", root)
    assert cached(cache) == []


def test_a_file_that_is_no_tar(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    make.write(root / "train" / "0.tar", b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"train/0\.tar is not a tar, or is damaged"):
        open_task("t", root)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (b"3", r"s0.cls holds the label 3, outside the 3 classes \(0 to 2\)"),
        (b"-1", "holds the label -1"),
        (b"onn", r"holds 'onn', not a number from 0 to 2: did you mean one\?"),
        (b"", "holds '', not a number"),
    ],
)
def test_labels_outside_the_class_list(make, tmp_path, label, said):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    make.write(root / "train" / "0.tar", make.tar_bytes(make.pairs([0, 1, 2]) | {"s0.cls": label}))
    with pytest.raises(DataError, match=said):
        open_task("t", root)


def test_class_list_of_tars(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    make.write(root / "classnames.txt", "\n".join([*CLASSES, "four"]).encode())
    with pytest.raises(DataError, match="class 'four' has no pictures"):
        open_task("t", root)
    (root / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"has no classnames\.txt: line N"):
        open_task("t", root)


def test_test_without_train(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    (root / "train" / "0.tar").unlink()
    with pytest.raises(DataError, match=r"test/\*\.tar but no train/\*\.tar: name the folder train/"):
        open_task("t", root)
    make.image_folder(root / "train", CLASSES)
    with pytest.raises(DataError, match=r"test/\*\.tar but no train/\*\.tar: unpack them into class folders"):
        open_task("t", root)


def test_a_tar_left_beside_what_was_unpacked_from_it(make, tmp_path):
    for first, part in enumerate(["train", "val"]):
        make.image_folder(tmp_path / part, CLASSES, first=50 * first)
        make.write(tmp_path / part / "zero.tar", make.tar_bytes({"0.png": make.picture_bytes(0)}))
    assert open_task("t", tmp_path).classes == tuple(sorted(CLASSES))


def test_tars_outside_of_a_split(make, tmp_path):
    make.write(tmp_path / "classnames.txt", b"a\nb")
    make.write(tmp_path / "000.tar", make.tar_bytes(make.pairs([0, 1])))
    with pytest.raises(DataError, match=r"holds tars \(000\.tar\) but no train/: put them into train/"):
        open_task("t", tmp_path)
