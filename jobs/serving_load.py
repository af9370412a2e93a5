"""A closed loop of clients against a server, each answer checked against what its version says offline."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from condu_ray.methods.stored import TASK_OBJECTS
from condu_ray.store import Manifest, ObjectRef
from condu_ray.voting.open import load_classifier
from condu_ray.voting.pictures import classify_paths

TOLERANCE = 2e-5
"""Of a probability: a batch of other pictures rounds sums differently in the last bits, as it does offline."""


@dataclass(frozen=True)
class Seen:
    """One response. asked: index of the picture. answer: None unless status is 200. clean: a 503 as documented."""

    asked: int
    status: int
    seconds: float
    answer: dict[str, Any] | None
    clean: bool


@dataclass
class Load:
    """What clients saw so far."""

    seen: list[Seen] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def versions(self) -> Counter[int]:
        return Counter(one.answer["version"] for one in self.seen if one.answer)

    def figures(self) -> dict[str, Any]:
        """Requests, statuses, and times in milliseconds."""
        times = sorted(1000 * one.seconds for one in self.seen)
        statuses = Counter(one.status for one in self.seen)
        return {
            "load_requests": len(self.seen),
            "statuses": dict(statuses),
            "errors_5xx": sum(one.status >= 500 and not one.clean for one in self.seen) + len(self.errors),
            "clean_503": sum(one.clean for one in self.seen),
            "p50_ms": times[len(times) // 2] if times else None,
            "p99_ms": times[int(len(times) * 0.99)] if times else None,
        }

    def wrong(self, expected: Mapping[int, Sequence[dict[str, Any]]]) -> list[str]:
        """Answers that are not those that the version they name gives offline (`offline`)."""
        return [
            f"picture {one.asked}: {difference}"
            for one in self.seen
            if one.answer and (difference := differs(one.answer, expected[one.answer["version"]][one.asked]))
        ]


@contextmanager
def load(url: str, pictures: Sequence[Path], clients: int = 16) -> Iterator[Load]:
    """As many clients as said ask for one picture after another, each waiting for its answer, while the block runs."""
    bodies, found, stop = [path.read_bytes() for path in pictures], Load(), threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            turn = number
            while not stop.is_set():
                turn += 1
                place = turn % len(bodies)
                begun = time.monotonic()
                try:
                    response = client.post(
                        "/v1/predict", files={"image": (str(place), bodies[place])}, data={"top_k": 50}
                    )
                except httpx.HTTPError as error:
                    found.errors.append(repr(error))
                    continue
                busy = response.status_code == 503
                clean = busy and "retry-after" in response.headers and response.json()["status"] == 503
                answer = None
                if response.status_code == 200:  # by the version that the whole response names
                    answer = {**response.json()["answers"][0], "version": response.json()["version"]}
                found.seen.append(Seen(place, response.status_code, time.monotonic() - begun, answer, clean))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def offline(store: str | Path, version: int, pictures: Sequence[Path]) -> list[dict[str, Any]]:
    """What `condu-ray predict` says of them."""
    return classify_paths(load_classifier(store, version), pictures, top=50)


def differs(answer: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """How two answers differ, or nothing: labels and voters must be the same, numbers within TOLERANCE.

    Labels of the same probability, within the tolerance, may change places.
    """
    for key in ("label_space", "version"):
        if answer[key] != expected[key]:
            return f"{key} {answer[key]} instead of {expected[key]}"
    found = {(one["task"], one["label"]): one["probability"] for one in answer["labels"]}
    known = {(one["task"], one["label"]): one["probability"] for one in expected["labels"]}
    best = (answer["task"], answer["label"])
    if abs(known.get(best, 0.0) - expected["probability"]) > TOLERANCE:
        return f"label {best} instead of {expected['task'], expected['label']}"
    far = {
        label: (found.get(label), share)
        for label, share in known.items()
        if abs(found.get(label, 0.0) - share) > TOLERANCE
    }
    if far:
        return f"probabilities {far}"
    voters = [[vote["task"] for vote in one["votes"]] for one in (answer, expected)]
    return "" if voters[0] == voters[1] else f"voters {voters[0]} instead of {voters[1]}"


def wait_until_served(url: str, version: int, seconds: float = 60.0) -> dict[str, Any]:
    """Waits until every replica serves a version; returns what /readyz says then."""
    end = time.monotonic() + seconds
    said: dict[str, Any] = {}
    while time.monotonic() < end:
        said = httpx.get(f"{url}/readyz", timeout=30).json()
        replicas = said.get("replicas", [])
        if replicas and all(each["version"] == version for each in replicas):
            return said
        time.sleep(0.1)
    raise TimeoutError(f"version {version} does not serve everywhere after {seconds} s: {said}")


def damaged(manifest: Manifest) -> dict[str, ObjectRef]:
    """The objects of a version, what its method keeps with a sha256 that is not theirs: it cannot be loaded."""
    return {
        name: ref if name.startswith(TASK_OBJECTS) else ref.model_copy(update={"sha256": "0" * 64})
        for name, ref in manifest.objects.items()
    }
