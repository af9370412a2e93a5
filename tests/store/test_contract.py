"""What every kind of store promises; the `store` fixture says which kinds there are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from condu_ray.errors import DamagedObject, NotFound, OtherBytes, StoreError, VersionTaken
from condu_ray.store import Store, bucket, create_store, open_store, put_first

ARRAYS = {
    "u": np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6),
    "mask": np.array([True, False, True]),
    "count": np.array(7, np.int64),
}


def flip(body: bytes) -> bytes:
    changed = bytearray(body)
    changed[len(body) // 2] ^= 0xFF
    return bytes(changed)


class TestVersions:
    def test_a_new_store_has_none(self, store: Store) -> None:
        assert store.versions() == []
        with pytest.raises(NotFound, match="no version yet: learn a task"):
            store.manifest()

    def test_what_was_committed_is_read_back(self, store: Store, publish: Any, make_manifest: Any) -> None:
        ref = publish(store, 1)
        assert store.versions() == [1]
        assert store.manifest() == store.manifest(1) == make_manifest(1, {"u": ref})
        assert open_store(store.url).manifest() == store.manifest(1)

    def test_the_newest_is_the_highest_number(self, store: Store, publish: Any) -> None:
        for version in range(1, 12):
            publish(store, version)
        assert store.manifest().version == 11
        assert store.versions() == list(range(1, 12))

    def test_an_unknown_version_names_the_nearest(self, store: Store, publish: Any) -> None:
        publish(store, 1)
        publish(store, 2)
        with pytest.raises(NotFound, match="no version 999: the nearest is 2; there are 1, 2"):
            store.manifest(999)

    def test_a_number_is_given_once(self, store: Store, publish: Any, make_manifest: Any) -> None:
        publish(store, 1)
        before = store.manifest(1)
        with pytest.raises(VersionTaken, match="version 1 of .* exists already"):
            store.commit(make_manifest(1, message="second"))
        assert store.manifest(1) == before

    def test_no_number_is_left_out(self, store: Store, make_manifest: Any) -> None:
        with pytest.raises(StoreError, match="version 3 cannot follow version 0"):
            store.commit(make_manifest(3))
        assert store.versions() == []

    def test_a_removed_number_is_not_given_again(self, store: Store, publish: Any, make_manifest: Any) -> None:
        for version in (1, 2, 3):
            publish(store, version)
        store.gc(keep=1)
        with pytest.raises(VersionTaken):
            store.commit(make_manifest(2))

    def test_one_of_many_writers_gets_the_number(self, store: Store, make_manifest: Any) -> None:
        writers, rounds = 8, 5
        start = threading.Barrier(writers)

        def write(writer: int) -> list[int]:
            mine = open_store(store.url)
            won = []
            for version in range(1, rounds + 1):
                start.wait(timeout=30)
                with suppress(VersionTaken):
                    mine.commit(make_manifest(version, message=f"writer {writer}"))
                    won.append(version)
                start.wait(timeout=30)
            return won

        with ThreadPoolExecutor(writers) as pool:
            won = list(pool.map(write, range(writers)))
        assert sorted(version for versions in won for version in versions) == list(range(1, rounds + 1))
        for writer, versions in enumerate(won):
            for version in versions:
                assert store.manifest(version).message == f"writer {writer}"

    def test_a_version_names_only_objects_that_are_there(
        self, store: Store, publish: Any, make_manifest: Any, damage: Any
    ) -> None:
        ref = store.put("key", "u", ARRAYS)
        damage(ref, None)
        with pytest.raises(StoreError, match="u of version 1\\) is missing: run the same command again"):
            store.commit(make_manifest(1, {"u": ref}))
        assert store.versions() == []


class TestHeader:
    def test_opened_as_made(self, store: Store, make_header: Any) -> None:
        again = open_store(store.url).header
        assert again == store.header
        assert again.model_copy(update={"id": ""}) == make_header().model_copy(update={"id": ""})

    def test_making_it_twice_opens_the_first(self, store: Store, make_header: Any, publish: Any) -> None:
        publish(store, 1)
        again = create_store(store.url, make_header())
        assert again.header.id == store.header.id
        assert again.versions() == [1]

    def test_another_base_model_is_refused(self, store: Store, make_header: Any) -> None:
        with pytest.raises(StoreError, match=r"another model \(\{'name': 'tiny'.*, not \{'name': 'other'"):
            create_store(store.url, make_header(model={"name": "other"}))
        with pytest.raises(StoreError, match="another layout: choose another --store"):
            create_store(store.url, make_header(layout={}))

    def test_many_who_make_it_get_one(self, url: str, make_header: Any) -> None:
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda _: create_store(url, make_header()).header.id, range(8)))
        assert len(set(ids)) == 1

    def test_opening_makes_nothing(self, url: str) -> None:
        for _ in range(2):
            with pytest.raises(NotFound, match="no store at .*learn a task first"):
                open_store(url)

    def test_an_unknown_kind_is_named(self) -> None:
        with pytest.raises(StoreError, match="kind ftp://: give a folder"):
            open_store("ftp://somewhere/store")


class TestObjects:
    def test_arrays_come_back(self, store: Store) -> None:
        ref = store.put("key", "u", ARRAYS)
        back = store.get(ref)
        assert back.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert back[name].dtype == array.dtype
            assert back[name].shape == array.shape
            np.testing.assert_array_equal(back[name], array)

    def test_arrays_are_views_that_nobody_can_change(self, store: Store) -> None:
        back = store.get(store.put("key", "u", ARRAYS))
        assert not back["u"].flags.owndata
        for array in back.values():
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0

    def test_touching_keeps_an_object_from_gc_and_says_whether_it_is_there(self, store: Store, publish: Any) -> None:
        publish(store, 1)
        ref = store.put("key", "u", ARRAYS)
        assert store.touch(ref.path)
        assert not store.touch("objects/key/none.safetensors")
        assert store.gc(keep=1).in_use == [ref.path]

    def test_the_first_of_two_that_put_other_bytes_is_kept(self, store: Store) -> None:
        first = put_first(store, "key", "u", ARRAYS)
        assert put_first(store, "key", "u", {"u": np.ones(3)}) == first
        with pytest.raises(OtherBytes, match="exists with other bytes"):
            store.put("key", "u", {"u": np.ones(3)})

    def test_putting_again_is_nothing_new(self, store: Store) -> None:
        ref = store.put("key", "u", ARRAYS)
        turned = dict(reversed(ARRAYS.items()))
        assert store.put("key", "u", turned) == ref
        assert store.find("key", "u") == ref

    def test_an_object_never_changes(self, store: Store) -> None:
        ref = store.put("key", "u", ARRAYS)
        with pytest.raises(StoreError, match="exists with other bytes"):
            store.put("key", "u", ARRAYS | {"count": np.array(8, np.int64)})
        assert store.find("key", "u") == ref
        assert store.get(ref)["count"] == 7

    def test_the_same_arrays_give_the_same_bytes_under_any_key(self, store: Store) -> None:
        one, two = store.put("one", "u", ARRAYS), store.put("two", "u", ARRAYS)
        assert (one.sha256, one.bytes) == (two.sha256, two.bytes)

    def test_what_was_not_put_is_not_found(self, store: Store) -> None:
        assert store.find("key", "u") is None
        store.put("key", "u", ARRAYS)
        assert store.find("key", "v") is None

    def test_many_who_put_the_same_get_one_object(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            refs = list(pool.map(lambda _: store.put("key", "u", ARRAYS), range(8)))
        assert len(set(refs)) == 1
        assert store.fault(refs[0]) is None

    @pytest.mark.parametrize("name", ["../u", "a/b", "", ".hidden", "a b"])
    def test_a_name_stays_inside_the_store(self, store: Store, name: str) -> None:
        with pytest.raises(StoreError, match="cannot name an object"):
            store.put("key", name, ARRAYS)
        with pytest.raises(StoreError, match="cannot name an object"):
            store.work(name)

    def test_a_dtype_that_the_format_lacks_is_named(self, store: Store) -> None:
        with pytest.raises(StoreError, match="array 'z' has dtype complex128"):
            store.put("key", "u", {"z": np.zeros(2, np.complex128)})
        assert store.find("key", "u") is None


class TestDamage:
    @pytest.mark.parametrize(
        ("how", "says"),
        [
            (flip, "its sha256 is"),
            (lambda body: body[:-10], r"\d+ bytes instead of \d+"),
            (lambda body: b"", "0 bytes instead of"),
            (lambda body: body + b"x", r"\d+ bytes instead of \d+"),
            (None, "the file is missing"),
        ],
        ids=["flipped", "truncated", "empty", "longer", "removed"],
    )
    def test_a_damaged_object_is_named_and_the_version_before_serves(
        self, store: Store, publish: Any, damage: Any, how: Any, says: str
    ) -> None:
        for version in (1, 2):
            publish(store, version)
        ref = store.manifest(2).objects["u"]
        damage(ref, how)
        assert store.fault(ref)
        mend = "version 1 is whole and still serves .*`condu-ray rollback 1 --store"
        with pytest.raises(DamagedObject, match=f"objects/key-2/u.safetensors is damaged \\({says}.*{mend}"):
            store.get(ref)
        assert store.get(store.manifest(1).objects["u"])["u"][0] == 1

    def test_every_object_damaged_is_said_so(self, store: Store, publish: Any, damage: Any) -> None:
        refs = [publish(store, version) for version in (1, 2, 3)]
        for ref in refs:
            damage(ref, flip)
        for ref in refs:
            with pytest.raises(DamagedObject, match="no other version is whole: put the file back from a copy"):
                store.get(ref)

    def test_damage_after_the_first_load_is_seen(self, store: Store, publish: Any, damage: Any) -> None:
        ref = publish(store, 1)
        store.get(ref)
        damage(ref, flip)
        with pytest.raises(DamagedObject):
            store.get(ref)

    def test_every_byte_counts(self, store: Store, damage: Any) -> None:
        ref = store.put("key", "u", {"u": np.arange(3, dtype=np.float32)})
        for place in range(0, ref.bytes, 16 if store.url.startswith("s3://condu-") else 1):  # a server takes its time
            damage(ref, lambda body, place=place: body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
            with pytest.raises(DamagedObject):
                store.get(ref)
            damage(ref, lambda body, place=place: body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        assert store.get(ref)["u"][2] == 2


class TestGc:
    def test_keeps_what_kept_versions_name(self, store: Store, publish: Any, make_manifest: Any) -> None:
        refs = [publish(store, version) for version in (1, 2, 3)]
        store.commit(make_manifest(4, {"u": refs[0]}, kind="rollback"))
        report = store.gc(keep=2)
        assert report.versions == [1, 2]
        assert report.objects == [refs[1].path]
        assert report.bytes > refs[1].bytes
        assert store.versions() == [3, 4]
        assert store.get(store.manifest(4).objects["u"])["u"][0] == 1
        assert store.find("key-2", "u") is None

    def test_by_default_every_version_stays(self, store: Store, publish: Any) -> None:
        refs = [publish(store, version) for version in (1, 2)]
        assert store.gc(in_use_s=0).objects == []
        assert all(store.fault(ref) is None for ref in refs)

    def test_what_a_running_session_has_put_stays(self, store: Store, publish: Any) -> None:
        publish(store, 1)
        ref = store.put("next", "delta", ARRAYS)
        assert store.gc(keep=1).in_use == [ref.path]
        assert store.fault(ref) is None
        report = store.gc(keep=1, in_use_s=0)
        assert (report.objects, report.in_use) == ([ref.path], [])
        assert store.find("next", "delta") is None

    def test_what_a_running_session_has_found_again_stays(self, store: Store, publish: Any) -> None:
        first = publish(store, 1)
        publish(store, 2)
        store.find("key-1", "u")
        assert store.gc(keep=1).in_use == [first.path]
        assert store.fault(first) is None

    def test_the_dry_run_removes_nothing_and_says_the_same(self, store: Store, publish: Any) -> None:
        for version in (1, 2, 3):
            publish(store, version)
        told = store.gc(keep=1, dry_run=True)
        assert told.dry_run
        assert store.versions() == [1, 2, 3]
        done = store.gc(keep=1)
        assert (told.versions, told.objects, told.bytes) == (done.versions, done.objects, done.bytes)

    def test_the_newest_always_stays(self, store: Store, publish: Any) -> None:
        publish(store, 1)
        with pytest.raises(StoreError, match=r"at least 1 version \(found 0\)"):
            store.gc(keep=0)
        assert store.gc(keep=5).versions == []

    def test_abandoned_work_goes(self, store: Store) -> None:
        store.save_work("train-pets", "checkpoint", ARRAYS)
        assert store.gc().in_use == ["work/train-pets"]
        assert store.gc(in_use_s=0).leftovers == ["work/train-pets"]
        assert store.load_work("train-pets", "checkpoint") is None

    @pytest.mark.parametrize("url", ["s3", "s3-in-memory"], indirect=True)
    def test_a_part_upload_of_abandoned_work_goes(self, store: Store) -> None:
        """As a process leaves it that is killed while it writes a large checkpoint."""
        place, _, folder = store.url.removeprefix("s3://").partition("/")
        client = bucket.make_client()
        key = "/".join((folder, "work", "train-pets", "step-1"))
        client.create_multipart_upload(Bucket=place, Key=key, Metadata={})

        def uploads() -> int:
            return len(client.list_multipart_uploads(Bucket=place, Prefix=f"{folder}/").get("Uploads", []))

        left = ["uploads/work/train-pets/step-1"]
        assert (store.gc(in_use_s=0, dry_run=True).leftovers, uploads()) == (left, 1)
        assert (store.gc(in_use_s=0).leftovers, uploads()) == (left, 0)


class TestWork:
    def test_survives_until_it_is_discarded(self, store: Store) -> None:
        other = {"step": np.array([7])}
        store.save_work("train-pets", "checkpoint", other)
        store.save_work("train-pets", "checkpoint", ARRAYS)
        store.save_work("train-cars", "checkpoint", other)
        again = open_store(store.url)
        found = again.load_work("train-pets", "checkpoint")
        assert found is not None
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
        again.discard_work("train-pets")
        again.discard_work("train-pets")
        assert again.load_work("train-pets", "checkpoint") is None
        left = again.load_work("train-cars", "checkpoint")
        assert left is not None and left["step"] == [7]

    def test_none_is_none(self, store: Store) -> None:
        assert store.load_work("train-pets", "checkpoint") is None

    def test_the_place_for_other_programs_is_part_of_the_work(self, store: Store) -> None:
        assert store.work("train-pets") == "/".join((store.url, "work", "train-pets"))

    @pytest.mark.parametrize("url", ["s3"], indirect=True)
    def test_an_upload_that_is_refused_is_a_sentence(self, store: Store) -> None:
        """boto3's own upload raises an error of its own kind."""
        client, place = bucket.make_client(), store.url.removeprefix("s3://").partition("/")[0]
        for each in client.list_objects_v2(Bucket=place)["Contents"]:
            client.delete_object(Bucket=place, Key=each["Key"])
        client.delete_bucket(Bucket=place)
        with pytest.raises(StoreError, match="cannot write s3://.*: there is no such bucket: make it first"):
            store.save_work("train-pets", "checkpoint", ARRAYS)
