"""What only a store on S3 can meet: answers that are lost, servers that ignore conditions, parts, the local cache."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ProfileNotFound,
    ReadTimeoutError,
    UnauthorizedSSOTokenError,
)
from in_memory_s3 import InMemoryS3, error_of

from condu_ray.errors import NotFound, StoreError, VersionTaken
from condu_ray.store import Store, bucket, create_store, open_store, s3, s3_gc
from condu_ray.store.bucket import make_client, refusal

ARRAYS = {"u": np.arange(10, dtype=np.float32)}
BIG = {"u": np.arange(100_000, dtype=np.float32)}

pytestmark = pytest.mark.usefixtures("s3_in_memory")


@pytest.fixture
def url() -> str:
    return "s3://memory/store"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_pause", lambda round_: None)


def faulty(
    monkeypatch: pytest.MonkeyPatch, server: InMemoryS3, call: str, faults: list[Exception | None], *, after: bool
) -> list[str]:
    """The next calls of `call` end with these errors (None: as usual), before or after they took effect; their keys."""
    real, keys = getattr(server, call), list[str]()

    def broken(**given: Any) -> Any:
        keys.append(given["Key"])
        fault = faults.pop(0) if faults else None
        if fault is None:
            return real(**given)
        if after:
            real(**given)
        raise fault

    monkeypatch.setattr(server, call, broken)
    return keys


TIMEOUT = ReadTimeoutError(endpoint_url="http://nowhere")


class TestUnknownOutcome:
    def test_a_commit_whose_answer_was_lost_is_not_done_twice(
        self, store: Store, s3_in_memory: InMemoryS3, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = faulty(monkeypatch, s3_in_memory, "put_object", [TIMEOUT], after=True)
        store.commit(make_manifest(1))
        assert [key for key in keys if "versions" in key] == ["store/versions/00000001.json"]
        assert store.versions() == [1]

    def test_a_retry_that_its_own_first_try_prevents_is_a_success(
        self, store: Store, s3_in_memory: InMemoryS3, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As botocore's own retries do: the first answer was lost, the second is 412."""
        faulty(monkeypatch, s3_in_memory, "put_object", [error_of(412, "PreconditionFailed")], after=True)
        store.commit(make_manifest(1))
        assert store.manifest().version == 1

    @pytest.mark.parametrize("fault", [TIMEOUT, error_of(503, "SlowDown"), error_of(409, "ConditionalRequestConflict")])
    def test_a_commit_that_did_not_arrive_is_sent_again(
        self,
        store: Store,
        s3_in_memory: InMemoryS3,
        make_manifest: Any,
        monkeypatch: pytest.MonkeyPatch,
        fault: Exception,
    ) -> None:
        faulty(monkeypatch, s3_in_memory, "put_object", [fault, fault], after=False)
        store.commit(make_manifest(1))
        assert store.versions() == [1]

    def test_another_writer_who_was_first_is_told_from_this_one(
        self, store: Store, s3_in_memory: InMemoryS3, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even with the very same bytes."""
        real = s3_in_memory.put_object

        def overtaken(**given: Any) -> Any:
            monkeypatch.setattr(s3_in_memory, "put_object", real)
            open_store(store.url).commit(make_manifest(1))
            raise TIMEOUT

        monkeypatch.setattr(s3_in_memory, "put_object", overtaken)
        with pytest.raises(VersionTaken):
            store.commit(make_manifest(1))
        assert store.versions() == [1]

    def test_a_server_that_stays_away_is_one_sentence_and_nothing_is_removed(
        self, store: Store, s3_in_memory: InMemoryS3, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref, before = store.put("key", "u", ARRAYS), dict(s3_in_memory.objects)
        away = EndpointConnectionError(endpoint_url="http://nowhere")
        faulty(monkeypatch, s3_in_memory, "put_object", [away] * 50, after=False)
        with pytest.raises(StoreError, match=r"cannot be reached .*run the same command again; nothing published"):
            store.commit(make_manifest(1, {"u": ref}))
        assert dict(s3_in_memory.objects) == before

    @pytest.mark.parametrize("fault", [TIMEOUT, error_of(403, "AccessDenied")])
    def test_a_version_that_is_published_is_no_error_though_its_marks_stay(
        self,
        store: Store,
        s3_in_memory: InMemoryS3,
        make_manifest: Any,
        monkeypatch: pytest.MonkeyPatch,
        fault: Exception,
    ) -> None:
        ref = store.put("key", "u", ARRAYS)
        faulty(monkeypatch, s3_in_memory, "delete_object", [fault], after=False)
        store.commit(make_manifest(1, {"u": ref}))
        assert store.versions() == [1]
        assert store.gc(in_use_s=0.0).objects == []
        assert not any("/marks/" in key for key in s3_in_memory.objects)

    def test_a_body_that_ends_early_is_read_again(
        self, store: Store, s3_in_memory: InMemoryS3, publish: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref = publish(store, 1)
        real, cut = s3_in_memory.get_object, ["versions", "objects"]

        def halved(**given: Any) -> Any:
            answer = real(**given)
            if cut and cut[0] in given["Key"]:
                cut.pop(0)
                answer["Body"]._raw_stream.truncate(answer["ContentLength"] // 2)
            return answer

        monkeypatch.setattr(s3_in_memory, "get_object", halved)
        assert store.manifest(1).version == 1
        store._cache.drop(ref.sha256)  # type: ignore[attr-defined]
        assert store.get(ref)["u"][0] == 1
        assert cut == []


class TestWhatABucketMustDo:
    def test_one_that_ignores_conditions_is_refused_by_name(
        self, url: str, s3_in_memory: InMemoryS3, make_header: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_in_memory, "_must_be_free", lambda key, condition: None)
        with pytest.raises(StoreError, match="bucket memory ignores If-None-Match"):
            create_store(url, make_header())
        assert s3_in_memory.objects == {}

    def test_one_that_lets_two_at_once_through_is_refused(
        self, url: str, s3_in_memory: InMemoryS3, make_header: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It looks first and writes then: a third write is refused, but not the second of two at once."""
        both = threading.Barrier(2)

        def late(key: str, condition: str) -> None:
            free = key not in s3_in_memory.objects
            if free and "probe" in key:
                s3_in_memory._lock.release()
                both.wait(10)
                s3_in_memory._lock.acquire()
            if not free:
                raise error_of(412, "PreconditionFailed")

        monkeypatch.setattr(s3_in_memory, "_must_be_free", late)
        with pytest.raises(StoreError, match="ignores If-None-Match"):
            create_store(url, make_header())

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (error_of(403, "AccessDenied"), "no permission to read .*docs/store.md lists the permissions"),
            (error_of(403, "InvalidAccessKeyId"), "no permission"),
            (error_of(404, "NoSuchBucket"), "there is no such bucket: make it first"),
            (error_of(403, "RequestTimeTooSkewed"), "this machine's clock is wrong"),
            (error_of(500, "InternalError"), "out of order or busy"),
            (NoCredentialsError(), "there are no credentials for S3: give them as boto3 takes them"),
            (error_of(400, "ExpiredToken"), "the credentials for S3 have expired .*sign in again"),
            (UnauthorizedSSOTokenError(), "have expired or cannot be had .*sign in again"),
            (CredentialRetrievalError(provider="process", error_msg="x"), "have expired or cannot be had"),
            (ProfileNotFound(profile="x"), "boto3 cannot be set up .*check AWS_PROFILE"),
            (ParamValidationError(report="x"), "no bucket can have that name: give s3://BUCKET/FOLDER"),
            (error_of(400, "InvalidBucketName"), "no bucket can have that name"),
            (error_of(301, "PermanentRedirect"), "the bucket is in another region .*AWS_DEFAULT_REGION"),
        ],
    )
    def test_errors_are_sentences_with_a_mend(self, error: Exception, says: str) -> None:
        with pytest.raises(StoreError, match=says):
            raise refusal(error, "read", "s3://memory/store/store.json")


class TestAddresses:
    @pytest.mark.parametrize("given", ["s3://memory/store/", "s3://memory//store"])
    def test_one_place_has_one_name(self, store: Store, given: str) -> None:
        assert open_store(given).url == store.url

    def test_a_bucket_may_be_a_store(self, make_header: Any) -> None:
        assert create_store("s3://memory", make_header()).url == "s3://memory"
        with pytest.raises(NotFound):
            open_store("s3://memory/store")

    def test_credentials_in_an_address_are_refused_and_not_repeated(self) -> None:
        with pytest.raises(StoreError, match="holds credentials") as caught:
            open_store("s3://key:secret@memory/store")
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    @pytest.mark.parametrize("given", ["localhost:9000", "http://[::1", "http://key:secret@a b"])
    def test_an_endpoint_that_is_no_url_is_named(self, name: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bucket, "make_client", make_client)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv(name, given)
        with pytest.raises(StoreError, match=rf"^{name} is not a URL \(.*\): give http://HOST:PORT\.$") as caught:
            open_store("s3://memory/store")
        assert "secret" not in str(caught.value)

    def test_no_bucket_is_named(self) -> None:
        with pytest.raises(StoreError, match="names no bucket"):
            open_store("s3://")


class TestParts:
    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bucket, "PART", 1 << 16)

    def test_a_large_object_goes_up_in_parts(self, store: Store, s3_in_memory: InMemoryS3) -> None:
        ref = store.put("key", "u", BIG)
        store._cache.drop(ref.sha256)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(store.get(ref)["u"], BIG["u"])
        assert store.find("key", "u") == ref
        assert (s3_in_memory.uploads, [key for key in s3_in_memory.objects if "uploads" in key]) == ({}, [])

    def test_a_killed_upload_goes_on_where_it_was(
        self, store: Store, s3_in_memory: InMemoryS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bucket, "_THREADS", 1)
        real, sent = s3_in_memory.upload_part, list[int]()

        def counted(**given: Any) -> Any:
            sent.append(given["PartNumber"])
            if sent == [1, 2, 3]:
                raise KeyboardInterrupt
            return real(**given)

        monkeypatch.setattr(s3_in_memory, "upload_part", counted)
        with pytest.raises(KeyboardInterrupt):
            store.put("key", "u", BIG)
        started = len(sent)
        assert store.find("key", "u") is None
        ref = open_store(store.url).put("key", "u", BIG)
        assert 1 not in sent[started:] and 2 not in sent[started:]
        assert store.fault(ref) is None

    def test_other_bytes_do_not_go_on_with_an_upload_of_these(
        self, store: Store, s3_in_memory: InMemoryS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faulty(monkeypatch, s3_in_memory, "complete_multipart_upload", [KeyboardInterrupt()], after=False)  # type: ignore[list-item]
        with pytest.raises(KeyboardInterrupt):
            store.put("key", "u", BIG)
        other = {"u": BIG["u"] + 1}
        ref = store.put("key", "u", other)
        assert store.fault(ref) is None
        np.testing.assert_array_equal(store.get(ref)["u"], other["u"])

    def test_an_upload_that_gc_has_given_up_begins_anew(
        self, store: Store, s3_in_memory: InMemoryS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faulty(monkeypatch, s3_in_memory, "complete_multipart_upload", [KeyboardInterrupt()], after=False)  # type: ignore[list-item]
        with pytest.raises(KeyboardInterrupt):
            store.put("key", "u", BIG)
        assert store.gc().leftovers == []
        assert store.gc(in_use_s=0).leftovers == ["uploads/objects/key/u.safetensors"]
        assert s3_in_memory.uploads == {}
        assert store.fault(store.put("key", "u", BIG)) is None

    def test_the_answer_to_the_last_call_was_lost(
        self, store: Store, s3_in_memory: InMemoryS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faulty(monkeypatch, s3_in_memory, "complete_multipart_upload", [TIMEOUT], after=True)
        assert store.fault(store.put("key", "u", BIG)) is None


class TestGcBesideACommit:
    """The two orders that a lock would rule out."""

    def versions(self, store: Store, publish: Any) -> None:
        for version in (1, 2):
            publish(store, version)

    def test_what_a_commit_has_marked_is_spared(
        self, store: Store, publish: Any, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.versions(store, publish)
        back = make_manifest(3, store.manifest(1).objects, kind="rollback")
        real = s3_gc._remove

        def between(*given: Any) -> Any:
            monkeypatch.setattr(s3_gc, "_remove", real)
            open_store(store.url).commit(back)
            return real(*given)

        monkeypatch.setattr(s3_gc, "_remove", between)
        report = store.gc(keep=1)
        assert (report.objects, report.versions) == ([], [1])
        assert store.get(store.manifest(3).objects["u"])["u"][0] == 1

    def test_what_a_gc_is_about_to_remove_cannot_be_committed(
        self, store: Store, s3_in_memory: InMemoryS3, publish: Any, make_manifest: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.versions(store, publish)
        back, told = make_manifest(3, store.manifest(1).objects, kind="rollback"), list[str]()
        real = s3_in_memory.delete_object

        def between(**given: Any) -> Any:
            if "objects/key-1" in given["Key"] and not told:
                told.append("")
                with pytest.raises(StoreError, match="is being removed by a gc that runs now: run the same command"):
                    open_store(store.url).commit(back)
            return real(**given)

        monkeypatch.setattr(s3_in_memory, "delete_object", between)
        assert store.gc(keep=1).objects == ["objects/key-1/u.safetensors"]
        assert (told, store.versions()) == ([""], [2])

    def test_a_late_writer_does_not_get_a_removed_number(self, store: Store, publish: Any, make_manifest: Any) -> None:
        """It looked when version 1 was the newest, and writes when gc has removed 2."""
        publish(store, 1)
        late = open_store(store.url)
        seen = late._taken()  # type: ignore[attr-defined]
        publish(store, 2)
        publish(store, 3)
        store.gc(keep=1)
        late._taken = lambda: seen  # type: ignore[attr-defined]
        with pytest.raises(VersionTaken):
            late.commit(make_manifest(2))
        assert store.versions() == [3]


class TestCache:
    def test_what_was_read_once_is_not_fetched_again(
        self, store: Store, s3_in_memory: InMemoryS3, publish: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref = publish(store, 1)
        monkeypatch.setattr(s3_in_memory, "get_object", None)
        assert store.get(ref)["u"][0] == 1

    def test_an_object_is_hashed_once_a_process(
        self, store: Store, publish: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref, hashed, real = publish(store, 1), list[Path](), s3.hash_file
        monkeypatch.setattr(s3, "hash_file", lambda path: hashed.append(path) or real(path))
        for _ in range(3):
            store.get(ref)
        assert len(hashed) == 1

    def test_a_file_that_this_machine_damaged_is_fetched_again(
        self, store: Store, publish: Any, tmp_path: Path
    ) -> None:
        ref = publish(store, 1)
        file = tmp_path / "cache" / "store" / "objects" / ref.sha256
        file.write_bytes(bytes(ref.bytes))
        assert store.get(ref)["u"][0] == 1
        assert file.read_bytes() != bytes(ref.bytes)

    def test_the_least_used_goes_first(
        self, url: str, make_header: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CONDU_CACHE_GIB", str(1000 / 2**30))
        store = create_store(url, make_header())
        folder = tmp_path / "cache" / "store" / "objects"
        refs = []
        for number in range(3):  # 448 bytes each: two fit
            refs.append(store.put(f"key-{number}", "u", {"u": np.full(80, number, np.float32)}))
            os.utime(folder / refs[-1].sha256, (number, number))
            if number == 1:
                store.get(refs[0])
        held = {path.name for path in folder.iterdir()}
        assert held == {refs[0].sha256, refs[2].sha256}
        assert [store.get(ref)["u"][0] for ref in refs] == [0, 1, 2]

    def test_a_cache_of_another_user_is_read(
        self, store: Store, s3_in_memory: InMemoryS3, publish: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only who owns a file may say when it was used."""
        ref = publish(store, 1)

        def refused(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "utime", refused)
        monkeypatch.setattr(s3_in_memory, "get_object", None)
        assert store.get(ref)["u"][0] == 1.0

    @pytest.mark.parametrize("text", ["much", "0", "-1", "nan"])
    def test_a_limit_that_is_none_is_named(self, store: Store, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CONDU_CACHE_GIB", text)
        with pytest.raises(StoreError, match=f"CONDU_CACHE_GIB is '{text}'"):
            open_store(store.url)


def test_a_store_that_another_program_copied_here_opens(
    store: Store, s3_in_memory: InMemoryS3, publish: Any, make_manifest: Any
) -> None:
    """Without our metadata, as `aws s3 sync` of a folder leaves it."""
    ref = publish(store, 1)
    for kept in s3_in_memory.objects.values():
        kept.meta.clear()
    again = open_store(store.url)
    assert again.find("key-1", "u") == ref
    assert again.put("key-1", "u", {"u": np.full(100, 1, np.float32)}) == ref
    again.commit(make_manifest(2, {"u": ref}))


def test_a_copy_in_a_folder_lacks_the_versions_that_gc_had_removed(
    store: Store, s3_in_memory: InMemoryS3, publish: Any, make_manifest: Any, tmp_path: Path
) -> None:
    """On S3 gc leaves empty manifests, which `aws s3 sync` copies."""
    refs = [publish(store, version) for version in (1, 2, 3)]
    store.gc(2)
    for key, kept in s3_in_memory.objects.items():
        file = tmp_path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(kept.body)
    copy = open_store(tmp_path / "store")
    assert copy.versions() == [2, 3]
    with pytest.raises(NotFound, match="has no version 1: the nearest is 2"):
        copy.manifest(1)
    copy.commit(make_manifest(4, {"u": refs[2]}))
    assert copy.gc(2).versions == [2]
    assert copy.versions() == [3, 4]


def test_the_server_s_clock_counts_for_gc(store: Store, publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, 1)
    ref = store.put("next", "delta", ARRAYS)
    fast = SimpleNamespace(time=lambda: time.time() + 3 * 24 * 3600)
    monkeypatch.setattr(bucket, "time", fast)
    assert store.gc().in_use == [ref.path]


def test_secrets_are_in_no_repr(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    assert repr(store) == "S3Store('s3://memory/store')"
    error = ClientError({"Error": {"Code": "AccessDenied", "Message": "very-secret"}}, "PutObject")
    assert "very-secret" not in str(refusal(error, "write", store.url))
