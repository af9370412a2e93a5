"""A replica by itself: it takes settings while it runs, follows its store, and lets a shadow version answer too."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_process_crew import learn_here, opened, settings
from ray import serve

from condu_ray.config import ServeConfig
from condu_ray.data import Picture, load_picture
from condu_ray.errors import ConfigError, NotFound
from condu_ray.serving import replica as replicas
from condu_ray.serving.answering import Asked, Timed, answer_batch
from condu_ray.serving.messages import Question
from condu_ray.serving.replica import Replica
from condu_ray.store import open_store
from condu_ray.store.history import rollback


@pytest.fixture
def replica(
    ray_cluster: None, tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path
) -> Iterator[Replica]:
    """Over a store of two versions: colours; colours and stripes."""
    learn_here(settings(tmp_path / "store", tiny_model_dir), opened(picture_tasks, "colours", "stripes"))
    made = Replica(ServeConfig(store=str(tmp_path / "store"), poll_seconds=0.05))
    yield made
    for pool in (made._model, made._loader, made._decoders):
        pool.shutdown()


def serving(replica: Replica) -> int:
    return replica._shelf.current.version


def test_it_follows_the_store_or_stays_with_the_version_that_it_is_told(replica: Replica) -> None:
    async def run() -> None:
        await replica.reconfigure({})
        assert serving(replica) == 2
        await replica.reconfigure({"version": 1})
        assert serving(replica) == 1
        newest = rollback(open_store(replica._config.store), 1).version
        await replica.reconfigure({"version": None})
        assert serving(replica) == newest
        later = rollback(open_store(replica._config.store), 2).version
        end = time.monotonic() + 60
        while serving(replica) != later and time.monotonic() < end:
            await asyncio.sleep(0.05)
        assert serving(replica) == later
        assert replica._following is not None
        replica._following.cancel()

    asyncio.run(run())


def test_a_version_that_is_not_there_changes_nothing_and_a_store_without_any_is_an_error(
    replica: Replica, tmp_path: Path
) -> None:
    async def run() -> None:
        await replica.reconfigure({})
        await replica.reconfigure({"version": 9})
        assert serving(replica) == 2
        assert replica._shelf.fault is not None
        replica._following.cancel()  # type: ignore[union-attr]

    asyncio.run(run())
    for manifest in (tmp_path / "store" / "versions").iterdir():
        manifest.unlink()
    with pytest.raises(NotFound):
        asyncio.run(Replica(replica._config).reconfigure({}))


def test_pictures_that_come_while_the_model_is_busy_go_through_it_together(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve alone would make a batch of each: they come further apart than a batch waits."""
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=1000))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    sizes: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow(batch: list[Asked]) -> Any:
        sizes.append(len(batch))
        begun.set()
        assert go_on.wait(60)
        return answer_batch(batch)

    monkeypatch.setattr(replicas, "answer_batch", slow)

    async def run() -> list[Timed]:
        await replica.reconfigure({})
        asked = [
            Asked(replica._shelf.current, Question(), pixels, time.monotonic() + 60)
            for pixels in torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        ]
        waiting = [asyncio.create_task(replica._timed(asked[0]))]
        await asyncio.to_thread(begun.wait, 60)
        for one in asked[1:]:
            waiting.append(asyncio.create_task(replica._timed(one)))
            await asyncio.sleep(2 * replica._config.batch_wait_ms / 1000)
        go_on.set()
        answered = await asyncio.gather(*waiting)
        replica._following.cancel()  # type: ignore[union-attr]
        return answered

    assert all(one.answer.version == 2 for one in asyncio.run(run()))
    assert sizes == [1, 8]


def test_a_shadow_version_answers_beside_and_what_differs_is_logged(
    replica: Replica, picture_tasks: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[str] = []
    replica._figures.shadowed = counted.append  # type: ignore[method-assign]
    stripes = sorted((picture_tasks["stripes"] / "test").glob("*/1[2-4].png"))  # version 1 has no word for these
    pictures = [load_picture(Picture(str(path))) for path in stripes]

    async def run(shadow: dict[str, Any], question: Question) -> None:
        await replica.reconfigure(shadow)
        current, end = replica._shelf.current, time.monotonic() + 60
        batch = [Asked(current, question, current.clip.eval_transform(one), end) for one in pictures]
        timed = [one for one in answer_batch(batch) if isinstance(one, Timed)]
        replica._score_in_the_shade(batch, timed)
        if replica._shading is not None:
            await replica._shading
            replica._shading = None
        replica._following.cancel()  # type: ignore[union-attr]
        replica._following = None

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(run({}, Question(task="colours")))
        asyncio.run(run({"shadow_version": 1, "shadow_share": 0.0}, Question(task="colours")))
        asyncio.run(run({"shadow_version": 1, "shadow_share": 1.0}, Question(task="colours", version=2)))
        assert counted == [], "none is asked for, no share is, or the client named a version itself"
        asyncio.run(run({"shadow_version": 2, "shadow_share": 1.0}, Question(task="stripes")))
        assert counted == ["agrees"] * 9
        asyncio.run(run({"shadow_version": 1, "shadow_share": 1.0}, Question(task="stripes")))
        assert counted[9:] == ["cannot"] * 9
        asyncio.run(run({"shadow_version": 1, "shadow_share": 1.0}, Question()))
    differ = [record for record in caplog.records if record.message == "the shadow version differs"]
    assert len(counted) == 27
    assert len(differ) == counted[18:].count("differs") > 0
    for record in differ:
        assert record.served["version"] == 2  # type: ignore[attr-defined]
        assert record.shadow["version"] == 1  # type: ignore[attr-defined]


def test_settings_that_cannot_be_meant_change_nothing_once_a_version_serves(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)

    async def run() -> None:
        for wrong in ({"verison": 1}, {"version": "one"}):
            with pytest.raises(ConfigError, match="user_config"):
                await replica.reconfigure(wrong)
        await replica.reconfigure({"version": "1"})
        for wrong, said in (({"verison": 2}, "verison"), ({"shadow_version": 2, "shadow_share": "half"}, "half")):
            await replica.reconfigure(wrong)
            standing = await replica.standing()
            assert (standing.version, standing.shadow) == (1, None)
            assert said in str(standing.fault)
        await replica.reconfigure({})
        assert (await replica.standing()).fault is None
        replica._following.cancel()  # type: ignore[union-attr]

    asyncio.run(run())


def test_where_user_config_is_null_the_newest_serves(replica: Replica) -> None:
    """Serve then calls no `reconfigure`."""

    async def run() -> None:
        await replica.check_health()
        assert serving(replica) == 2
        following = replica._following
        await replica.check_health()
        assert replica._following is following is not None
        following.cancel()

    asyncio.run(run())


def test_another_store_in_the_same_place_is_not_served_by_the_model_of_the_first(
    replica: Replica, tmp_path: Path
) -> None:
    header = tmp_path / "store" / "store.json"

    async def run() -> None:
        await replica.reconfigure({})
        rollback(open_store(replica._config.store), 1)
        other = json.loads(header.read_text())
        header.write_text(json.dumps({**other, "model_sha256": "0" * 64}))
        await replica.reconfigure({})
        assert serving(replica) == 2
        assert "is another store than when the server started" in str(replica._shelf.fault)
        replica._following.cancel()  # type: ignore[union-attr]

    asyncio.run(run())
