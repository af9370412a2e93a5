"""Commands that read manifests: what they print, and that they need neither torch nor Ray for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import condu, process

from condu_ray import reports
from condu_ray.methods.registry import METHODS
from condu_ray.store import open_store


def test_versions(store: Path) -> None:
    rows = condu("versions", "--store", store, "--json").document
    assert [list(row) for row in rows] == [["version", "kind", "parent", "tasks", "message", "created", "bytes"]] * 2
    assert [(row["version"], row["parent"], row["tasks"]) for row in rows] == [
        (1, None, ["colours"]),
        (2, 1, ["colours", "stripes"]),
    ]
    assert all(row["bytes"] > 0 for row in rows)
    assert "learned stripes" in condu("versions", "--store", store).out


def test_tasks(store: Path) -> None:
    rows = condu("tasks", "--store", store, "--json").document
    assert [list(row) for row in rows] == [
        ["name", "classes", "learned_in", "method", "source", "pictures", "figures"]
    ] * 2
    assert rows[0]["classes"] == ["blue", "green", "red"]
    assert rows[1]["pictures"] == {"train": 36, "test": 18}
    assert [row["name"] for row in condu("tasks", "--store", store, "--version", "1", "--json").document] == ["colours"]
    assert "stripes" in condu("tasks", "--store", store).out


def test_show(store: Path) -> None:
    shown = condu("show", "1", "--store", store, "--json").document
    assert shown == json.loads((store / "versions" / "00000001.json").read_text())
    assert condu("show", "--store", store, "--json").document["version"] == 2
    text = condu("show", "--store", store).out
    assert "version 2 (learned stripes)" in text
    assert (bool(shown["settings"]), "train.steps" in text) == (True, False)
    assert "with --json its settings too" in condu("show", "--help").out
    assert "sha256" in text


def test_show_draws_pictures(store: Path, tmp_path: Path) -> None:
    assert condu("show", "--store", store, "--pictures", tmp_path / "drawn").code == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "accuracy_matrix.png",
        "accuracy_over_versions.png",
    }


def test_diff(store: Path) -> None:
    found = condu("diff", "1", "2", "--store", store, "--json").document
    assert list(found) == ["from", "to", "learned", "gone", "figures", "settings", "new_bytes"]
    assert (found["learned"], found["gone"]) == (["stripes"], [])
    assert found["new_bytes"] > 0
    assert "learned: stripes" in condu("diff", "1", "2", "--store", store).out


def test_methods() -> None:
    rows = condu("methods", "--json").document
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(list(row) == ["name", "summary", "source"] for row in rows)
    assert "condu-lora" in condu("methods").out


def test_doctor(store: Path) -> None:
    found = condu("doctor", "--store", store, "--json").document
    assert list(found) == ["condu_ray", "python", "platform", "cpus", "packages", "environment", "store"]
    assert (found["store"]["versions"], found["store"]["tasks"], found["store"]["damaged"]) == (2, 2, {})
    assert found["packages"]["torch"]
    assert "every object is whole" in condu("doctor", "--store", store).out


def test_doctor_tells_no_secrets(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    said = condu("doctor", "--store", store, "--json")
    assert "hunter2" not in said.out
    assert said.document["environment"]["MLFLOW_TRACKING_PASSWORD"] == "(set)"


def test_doctor_tells_no_password_of_an_address(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDU_TRACKING", "https://bob:hunter2@mlflow.example/x")
    found = condu("doctor", "--store", store, "--json").document["environment"]
    assert found["CONDU_TRACKING"] == "https://(set)@mlflow.example/x"


def test_doctor_works_without_a_store(tmp_path: Path) -> None:
    said = condu("doctor", "--store", tmp_path / "none", "--json")
    assert said.code == 0
    assert "no store at" in said.document["store"]["fault"]


def test_tables_print_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes [brackets] for styles and :words: for pictures."""
    names = ["cat [small].jpg", "[unknown]", "[/b] x", "a/:x:/b"]
    reports.show_table("[red] title", ("name",), [(name,) for name in names])
    for name in names:
        reports.say(name)
    out = capsys.readouterr().out
    assert all(out.count(name) == 2 for name in names), out
    assert "[red] title" in out


def test_gc_says_what_would_go_and_then_removes_it(copy: Path) -> None:
    would = condu("gc", "--keep", "1", "--dry-run", "--store", copy, "--json").document
    assert (would["versions"], would["dry_run"]) == ([1], True)
    assert open_store(copy).versions() == [1, 2]
    did = condu("gc", "--keep", "1", "--store", copy, "--json").document
    assert (did["versions"], did["objects"]) == ([1], would["objects"])
    assert open_store(copy).versions() == [2]
    assert "freed 0.0 MB" in condu("gc", "--store", copy).out


def test_rollback_makes_a_new_version(copy: Path) -> None:
    assert condu("rollback", "1", "--store", copy, "--json").document == {"version": 3, "from": 1}
    assert [row["name"] for row in condu("tasks", "--store", copy, "--json").document] == ["colours"]
    assert "version 4 is what version 2 was" in condu("rollback", "2", "--store", copy).out


def test_forget_makes_a_version_without_the_task(copy: Path) -> None:
    assert condu("forget", "colours", "--store", copy, "--json").document == {"version": 3, "forgotten": "colours"}
    assert [row["name"] for row in condu("tasks", "--store", copy, "--json").document] == ["stripes"]
    assert "version 4 is without stripes" in condu("forget", "stripes", "--store", copy).out
    assert condu("tasks", "--store", copy, "--json").document == []


@pytest.mark.parametrize(("given", "said"), [(None, True), ("http://mlflow:5000", True), ("off", False)])
def test_what_no_session_made_is_told_to_be_recorded_where_runs_are_kept(
    copy: Path, given: str | None, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = (["rollback", "2"], ["forget", "colours"])
    mend = f"; condu-ray track --replay --store {copy} records it\n"
    monkeypatch.delenv("CONDU_TRACKING", raising=False)
    assert not condu("rollback", "2", "--store", copy).out.endswith(mend)
    if given:
        monkeypatch.setenv("CONDU_TRACKING", given)
    else:
        (copy / "mlflow.db").touch()
    assert [condu(*command, "--store", copy).out.endswith(mend) for command in commands] == [said] * 2


EACH_IN_TURN = """
import json, sys
from condu_ray.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as left:
        heavy = {"torch", "ray", "open_clip", "mlflow", "numpy"} & set(sys.modules)
        print(json.dumps([arguments[0], left.code, sorted(heavy)]), file=sys.stderr)
"""


def test_commands_that_read_manifests_import_nothing_heavy(copy: Path, tmp_path: Path) -> None:
    """An import of torch or Ray costs seconds; what only reads manifests must answer at once."""
    here = ["--store", str(copy), "--json"]
    commands = [["--version"], ["--help"], ["learn", "--help"], ["methods", "--json"]]
    commands += [["versions", *here], ["tasks", *here], ["show", *here], ["diff", "1", "2", *here]]
    commands += [["gc", "--dry-run", *here], ["doctor", *here], ["rollback", "1", *here]]
    said = process(json.dumps(commands), code=EACH_IN_TURN)
    ran = [json.loads(line) for line in said.err.splitlines()]
    assert ran == [[command[0], 0, []] for command in commands]


def test_help_ends_in_commands_to_paste() -> None:
    assert "Try: condu-ray demo" in condu("--help").out
    assert "--train.steps" in condu("learn", "--help").out
