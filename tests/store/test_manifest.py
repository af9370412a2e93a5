"""Manifests and headers: equal records give equal bytes, and what is wrong in a file is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from condu_ray.errors import StoreError
from condu_ray.sources import from_dotted, resolve
from condu_ray.store import ObjectRef, TaskCard
from condu_ray.store.manifest import FORMAT, Manifest, dump, parse_header, parse_manifest


def test_a_manifest_is_readable_json_and_comes_back(make_manifest: Any) -> None:
    manifest = make_manifest(3, message="größer", figures={"matrix": [[91.0, float("nan")]]})
    body = dump(manifest)
    assert parse_manifest(body, "file") == manifest
    fields = json.loads(body)
    assert fields["figures"] == {"matrix": [[91.0, None]]}
    assert fields["tasks"][0]["figures"] == {"accuracy": 91.5, "zero_shot": None}
    assert body.decode().count("größer") == 1


def test_equal_records_give_equal_bytes(make_manifest: Any) -> None:
    one = make_manifest(1, settings={"a": 1, "b": 2})
    two = make_manifest(1, settings={"b": 2, "a": 1})
    assert dump(one) == dump(two)


def test_what_json_cannot_hold_is_refused(make_manifest: Any, make_card: Any) -> None:
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        dump(make_manifest(1, settings={"rate": float("nan")}))
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        dump(make_manifest(1, state={"thing": object()}))
    with pytest.raises(StoreError, match="a manifest cannot be written as JSON"):
        dump(make_manifest(1, settings={"name": "caf\udce9"}))
    with pytest.raises(StoreError, match="a manifest cannot be written as JSON"):
        dump(make_manifest(1, tasks=[make_card("pets").model_copy(update={"classes": ["caf\udce9"]})]))


def test_a_newer_format_says_so(make_manifest: Any, make_header: Any) -> None:
    newer = json.loads(dump(make_manifest(1))) | {"format": FORMAT + 1, "unheard_of": 1}
    with pytest.raises(StoreError, match=f"v.json has format {FORMAT + 1}.*install the newest condu-ray"):
        parse_manifest(json.dumps(newer).encode(), "v.json")
    header = json.loads(dump(make_header())) | {"format": FORMAT + 1}
    with pytest.raises(StoreError, match="store.json has format"):
        parse_header(json.dumps(header).encode(), "store.json")


@pytest.mark.parametrize("method", ["rapf", "calfuse", "dmc", "dmc-ot"])
@pytest.mark.parametrize("known", [True, False])
def test_a_store_whose_release_left_it_open_answers_as_it_did_there(make_header: Any, method: str, known: bool) -> None:
    """Gaussians answered in dmc-ot alone; today they do by default in others too."""
    fields = json.loads(dump(make_header(method=method)))
    fields["settings"] = {"method": method, **({"memory.discriminant": None} if known else {})}
    header = parse_header(json.dumps(fields).encode(), "store.json")
    assert from_dotted(header.settings).choices.discriminant == (method == "dmc-ot")
    resolve({}, fixed=header.settings)  # and is no other store to the next session


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "magic"}, "damaged at kind"),
        ({"unheard_of": 1}, "damaged at unheard_of"),
        ({"tasks": [{"name": "pets"}]}, r"damaged at tasks.0.uid: .* and \d+ more"),
        ({"objects": {"u": {"path": "../../secret", "bytes": 1, "sha256": "0" * 64}}}, "damaged at objects.u.path"),
        ({"objects": {"u": {"path": "objects/../u.safetensors", "bytes": 1, "sha256": "0" * 64}}}, "objects.u.path"),
        ({"created": "2026-01-02T03:04:05"}, "damaged at created"),
        ({"created": "yesterday"}, "damaged at created"),
        ({"parent": 1}, "parent 1 is not before version 1"),
    ],
)
def test_a_damaged_field_is_named(make_manifest: Any, change: dict[str, Any], says: str) -> None:
    fields = json.loads(dump(make_manifest(1))) | change
    with pytest.raises(StoreError, match=f"v.json.*{says}"):
        parse_manifest(json.dumps(fields).encode(), "v.json")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_no_json_object_is_said_so(body: bytes) -> None:
    with pytest.raises(StoreError, match=r"v.json .*put the file back from a copy"):
        parse_manifest(body, "v.json")


def test_tasks_are_told_apart(make_manifest: Any, make_card: Any) -> None:
    with pytest.raises(ValidationError, match="two tasks have one name"):
        make_manifest(1, tasks=[make_card("pets", uid=0), make_card("pets", uid=1)])
    with pytest.raises(ValidationError, match="two tasks have one uid"):
        make_manifest(1, tasks=[make_card("pets"), make_card("cars")])
    manifest: Manifest = make_manifest(1, tasks=[make_card("pets", uid=0), make_card("cars", uid=1)])
    assert manifest.task("cars") is manifest.tasks[1]
    assert manifest.task("planes") is None


def test_records_do_not_change(make_card: Any) -> None:
    card: TaskCard = make_card("pets")
    with pytest.raises(ValidationError, match="frozen"):
        card.name = "cars"  # type: ignore[misc]
    ref = ObjectRef(path="objects/k/u.safetensors", bytes=1, sha256="0" * 64)
    assert len({ref, ref.model_copy()}) == 1
