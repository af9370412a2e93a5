"""What is tried next: inside the space, nothing twice, and after a kill what was tried before comes first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process_crew import silent
from streams import ended

from condu_ray.tuning import command
from condu_ray.tuning.proposals import MEMORY, Proposals, importances
from condu_ray.tuning.records import Record
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.summary import advice, best_of

GRID = {"train.lr": {"choice": [1e-4, 1e-3, 1e-2]}, "train.towers": {"choice": ["both", "image"]}}
RANGES = {"train.lr": {"log": [1e-4, 1e-2]}, "train.steps": {"integer": [3, 9]}}
Written = Callable[..., tuple[Path, Sweep]]


def drawn(proposals: Proposals) -> list[dict[str, Any]]:
    found = []
    while (one := proposals.ask()) is not None:
        found.append(one[1])
        proposals.tell(one[0], (float(len(found)),))
    return found


def recorded(found: list[dict[str, Any]]) -> list[Record]:
    return [ended(number, each, 1.0) for number, each in enumerate(found)]


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_a_finite_space_is_tried_whole_and_nothing_twice(written: Written, search: str) -> None:
    _, sweep = written(["colours"], GRID, search=search)
    found = drawn(Proposals(sweep))
    assert len({tuple(each.items()) for each in found}) == len(found) == 6


def test_a_grid_is_tried_whole_unless_told_otherwise(written: Written) -> None:
    grid = {"train.steps": {"integer": [3, 12]}, "train.towers": {"choice": ["both", "image"]}}
    _, whole = written(["colours"], grid, search="grid")
    _, part = written(["colours"], grid, search="grid", trials=16)
    assert [len(drawn(Proposals(sweep))) for sweep in (whole, part)] == [20, 16]


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_the_same_seed_proposes_the_same(written: Written, search: str) -> None:
    _, sweep = written(["colours"], RANGES, search=search, trials=12)
    first = drawn(Proposals(sweep))
    assert first == drawn(Proposals(sweep))
    assert all(1e-4 <= each["train.lr"] <= 1e-2 and each["train.steps"] in range(3, 10) for each in first)


def test_after_a_kill_what_was_tried_comes_first_and_then_something_new(written: Written) -> None:
    _, sweep = written(["colours"], RANGES, trials=8)
    before = drawn(Proposals(sweep.model_copy(update={"trials": 3})))
    again = drawn(Proposals(sweep, replayed=recorded(before)))
    assert again[:3] == before
    assert len(again) == 8 and all(each not in before for each in again[3:])


def test_no_number_is_given_twice_where_a_trial_was_killed_before_it_began(written: Written) -> None:
    _, sweep = written(["colours"], RANGES, trials=6)
    first, second, _, fourth = recorded(drawn(Proposals(sweep.model_copy(update={"trials": 4}))))
    proposals = Proposals(sweep, replayed=[first, second, fourth])
    asked = [proposals.ask() for _ in range(6)]
    assert [one[1] for one in asked[:3] if one] == [first.settings, second.settings, fourth.settings]
    assert [one[0] for one in asked[3:] if one] == [4, 5, 6]


def test_what_is_known_is_not_proposed(written: Written) -> None:
    _, sweep = written(["colours"], GRID, search="grid")
    first = drawn(Proposals(sweep))
    known = recorded(first[:4])
    proposals = Proposals(sweep, known=known)
    assert [proposals.ask(), proposals.ask(), proposals.ask()] == [(4, first[4]), (5, first[5]), None]


def test_a_long_grid_goes_on_after_what_is_known(written: Written) -> None:
    """However many points are known already, and however long the ranges are of which few are asked for."""
    _, sweep = written(["colours"], {"train.steps": {"integer": [1, 10**12]}}, search="grid", trials=400)
    first = drawn(Proposals(sweep.model_copy(update={"trials": 300})))
    known = recorded(first)
    assert [each["train.steps"] for each in drawn(Proposals(sweep, known=known))] == list(range(301, 401))
    assert len(drawn(Proposals(sweep, replayed=known))) == 400


def test_optuna_finds_more_than_chance(written: Written) -> None:
    """The nearer lr is to 1e-3 the better: thirty proposals end nearer than where they began."""
    _, sweep = written(["colours"], {"train.lr": {"uniform": [1e-4, 0.5]}}, trials=40)
    proposals, far = Proposals(sweep), []
    while (one := proposals.ask()) is not None:
        far.append(abs(one[1]["train.lr"] - 0.2))
        proposals.tell(one[0], (-far[-1],))
    assert sum(far[-10:]) < sum(far[:10]) / 2


def test_thousands_of_trials_are_looked_back_on_in_part(written: Written) -> None:
    space = {"vote.coverage": {"uniform": [0.1, 0.9]}}
    _, sweep = written(["colours", "stripes"], space, trials=3 * MEMORY, search="random")
    proposals, pending = Proposals(sweep), []
    for number in range(3 * MEMORY):
        pending.append(proposals.ask())
        if len(pending) > 20:  # told late, some after the sampler has forgotten that it asked
            number, settings = pending.pop(0)  # type: ignore[misc]
            proposals.tell(number, (settings["vote.coverage"],))
    assert proposals.ask() is None
    kept = proposals._study.get_trials(deepcopy=False)
    assert len(kept) < 2 * MEMORY + 21


def test_the_setting_that_decides_is_named_and_the_other_is_not(written: Written) -> None:
    _, sweep = written(["colours"], RANGES, trials=40, search="random")
    records = [
        ended(number, each, 100 - abs(each["train.steps"] - 9) * 10)
        for number, each in enumerate(drawn(Proposals(sweep)))
    ]
    shares = importances(sweep, records)
    assert sum(shares.values()) == pytest.approx(1)
    (best,) = best_of(sweep, records)
    found = advice(sweep, records, best)
    assert found["matters"] == ["train.steps"]
    assert any("a larger train.steps: 9 is at the end of its range (3 to 9)" in each for each in found["try"])


def test_a_trial_that_was_stopped_counts_as_less_than_one_that_went_further(written: Written) -> None:
    """Rates and labels that look best when half trained are neither what matters nor what is drawn nor still better."""
    _, sweep = written(["colours"], RANGES, trials=48, search="random")
    records = []
    for number, each in enumerate(drawn(Proposals(sweep))):
        early = number % 2 == 1 or number > 39
        value = 99.0 + number - abs(math.log10(each["train.lr"]) + 3) if early else 10.0 * each["train.steps"]
        records.append(ended(number, each, value, state="stopped" if early else "finished", budget=1 if early else 3))
    assert importances(sweep, records)["train.steps"] > 0.9
    (best,) = best_of(sweep, records)
    assert not any("more trials" in each for each in advice(sweep, records, best)["try"])


def test_of_trials_that_were_stopped_nothing_is_drawn(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, sweep = written(["colours"], RANGES)
    one, two = drawn(Proposals(sweep))[:2]
    records = [ended(0, one, 99.0, state="stopped", budget=1), ended(1, two, 60.0)]
    rows: list[Any] = []
    monkeypatch.setattr(command, "draw_parallel", lambda found, *others: rows.extend(found))
    command._files(sweep, file, tmp_path, records, records[1:], {}, silent)
    assert rows == [(two, 60.0)]
    many = [replace(each, number=place) for place, each in enumerate(records * 100)]
    assert command._worth_drawing(many) == many[1::2]


def test_trials_that_were_stopped_or_failed_are_not_the_best(written: Written) -> None:
    _, sweep = written(["colours"], GRID)
    one, two, three = ({"train.lr": lr, "train.towers": "both"} for lr in (1e-4, 1e-3, 1e-2))
    failed = Record(2, three, (), "failed", "the loss is nan")
    records = [ended(0, one, 99.0, state="stopped"), ended(1, two, 60.0), failed]
    assert [record.number for record in best_of(sweep, records)] == [1]
    assert any("1 trials that failed" in each for each in advice(sweep, records, records[1])["try"])
    assert best_of(sweep, [failed]) == []
