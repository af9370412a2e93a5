"""Commands that read manifests: what they print, and that they need neither torch nor Ray for it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Said, condu, process

from condu_ray import reports
from condu_ray.catalogue import METHODS
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


def shell(command: str, store: Path, **environment: str) -> Said:
    """A line of sh in which CONDU is the command and STORE the store; Python keeps what it prints until it is much."""
    quoted = shlex.quote(sys.executable) + ' -c "from condu_ray.cli import main; main()"'
    line = command.replace("CONDU", quoted).replace("STORE", f"--store {shlex.quote(str(store))}")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, env={**kept, **environment})
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("form", ["", " --json"])
def test_output_that_finds_no_space_is_one_sentence(store: Path, form: str) -> None:
    said = shell(f"CONDU versions STORE{form} > /dev/full", store)
    assert (said.code, said.err) == (2, "error: no space left to write the output: free some space.\n")


@pytest.mark.parametrize("form", ["", " --json"])
def test_a_reader_that_has_enough_is_no_fault(store: Path, form: str) -> None:
    assert shell(f"{{ CONDU versions STORE{form}; echo $? >&2; }} | true", store).err == "1\n"


def test_what_is_said_to_a_closed_stream_goes_nowhere(store: Path) -> None:
    said = shell("CONDU show 9 STORE 2>&-", store)
    assert (said.code, said.out, said.err) == (2, "", "")
    assert shell("CONDU versions STORE >&-", store) == Said(0, "", "")


def test_json_is_json_whatever_the_locale() -> None:
    code = "from condu_ray.reports import emit; emit({'name': 'gr\\u00fcn \\U0001f426'})"
    for coding in ("ascii", "latin-1", "utf-8", "UTF8"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": coding},
            check=True,
        )
        assert json.loads(done.stdout) == {"name": "gr\u00fcn \U0001f426"}
        assert (b"\\u00fc" in done.stdout) == (coding in ("ascii", "latin-1"))
