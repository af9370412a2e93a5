"""README's commands are taken out and run in order, on small pictures; links and code in the documents are followed."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from command_line import condu
from in_process_crew import InProcessCrew
from PIL import Image

from condu_ray.cli import app
from condu_ray.config import SessionConfig
from condu_ray.engine.cluster import Cluster
from condu_ray.store import Store
from condu_ray.tuning.settings import read_sweep

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted((ROOT / "clusters").glob("*.md"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"`(\w+\.yaml)`")

# Commands that are not run here, by their form, and why.
NOT_RUN = {
    r"pip install uv && uv run condu-ray demo": "sets up an environment; the demo has tests of its own",
    r"uv run pytest": "is this very run",
    r"uv run mlflow ui --backend-store-uri sqlite:///condu-store/mlflow\.db": "serves until it is stopped",
    r"uv run condu-ray serve": "serves until it is stopped; tests/serving/ does",
    r"curl -F image=@new/1\.png http://127\.0\.0\.1:8000/v1/predict": "asks that server",
    r"uv run condu-ray predict \./new --url http://127\.0\.0\.1:8000": "asks that server",
    r"uv run condu-ray sweep (?P<sweep>\w+\.yaml)": "trains; tests/tuning/ does",
    r"uv run condu-ray learn --config sweep/best\.yaml --store tuned": "needs that sweep",
    r"source \.venv/bin/activate": "is for the shell of who reads",
    r"export RAY_AUTH_MODE=token": "is for the cluster of the next lines",
    r"ray get-auth-token --generate >/dev/null": "writes into the home folder",
    r"ray start --head": "starts a cluster that stays",
    r"ray job submit -- python jobs/session\.py (?P<learn>.+)": "needs that cluster",
}
RUN, SKIPPED = 13, 13

PICTURES = {
    "birds/train/heron": 8,
    "birds/train/owl": 8,
    "birds/test/heron": 4,
    "birds/test/owl": 4,
    "signs/stop": 10,
    "signs/yield": 10,
    "food/bread": 10,
    "food/soup": 10,
    "new": 2,
}


def blocks(document: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(document.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[str]:
    lines = [line for block in blocks(ROOT / "README.md", "console") for line in block.splitlines()]
    assert [line for line in lines if not line.startswith("$ ")] == [], "each line of a console block is a command"
    return [line.removeprefix("$ ") for line in lines]


def files() -> list[tuple[str, str]]:
    """(name, content) of the files that the README shows."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return list(zip(FILE_NAME.findall(readme), blocks(ROOT / "README.md", "yaml"), strict=True))


def form(command: str) -> re.Match[str] | None:
    return next((match for pattern in NOT_RUN if (match := re.fullmatch(pattern, command))), None)


def write_pictures(folder: Path) -> None:
    """Noise around one colour a class, so that the classes can be told apart."""
    for seed, (place, count) in enumerate(PICTURES.items()):
        random = np.random.RandomState(seed)
        colour = np.random.RandomState(sum(Path(place).name.encode())).uniform(60, 195, 3)
        (folder / place).mkdir(parents=True)
        for number in range(1, count + 1):
            pixels = np.clip(colour + random.uniform(-40, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{number}.png")


def test_commands_that_are_not_run_have_the_right_form() -> None:
    """Each form is used, and what a job would learn is understood by `learn`."""
    found = [(command, match) for command in commands() if (match := form(command))]
    assert len(found) == SKIPPED
    assert {match.re.pattern for _, match in found} == set(NOT_RUN)
    learn = typer.main.get_command(app).commands["learn"]  # type: ignore[attr-defined]  # it is a group
    for _, match in found:
        if given := match.groupdict().get("learn"):
            assert learn.make_context("learn", shlex.split(given)).params["name"] == "birds"
    assert (ROOT / "jobs" / "session.py").is_file()


def test_the_sweep_is_understood(tmp_path: Path) -> None:
    (name,) = (found["sweep"] for command in commands() if (found := form(command)) and "sweep" in found.groupdict())
    for file, body in files():
        (tmp_path / file).write_text(body, encoding="utf-8")
    assert read_sweep(tmp_path / name).kind == "training"
    (example,) = blocks(ROOT / "docs" / "sweeps.md", "yaml")
    (tmp_path / name).write_text(example, encoding="utf-8")
    assert len(read_sweep(tmp_path / name).space) == 4


@pytest.mark.timeout(600)
def test_the_commands_run(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    """In this process; tests/cli/ starts some as processes of their own."""
    write_pictures(tmp_path)
    for name, body in files():
        (tmp_path / name).write_text(body, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDU_MODEL", f"local-dir:{tiny_model_dir}")
    monkeypatch.setenv("CONDU_TRAIN__STEPS", "5")
    monkeypatch.setenv("CONDU_TRACKING", "off")
    monkeypatch.setenv("CONDU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONDU_CPUS_PER_WORKER", "1")  # what other tests left behind may hold a part of a core
    monkeypatch.setenv("CONDU_WORKERS", "1")  # each is a process that takes seconds to start

    def run(command: str) -> str:
        words = shlex.split(command)
        assert words[:3] == ["uv", "run", "condu-ray"], f"{command}: neither run here nor listed in NOT_RUN"
        said = condu(*words[3:])
        assert said.code == 0, f"{command}\n{said.out}\n{said.err}"
        assert said.out.strip(), f"{command} said nothing"
        return said.out

    said = {command: run(command) for command in commands() if not form(command)}

    assert len(said) == RUN
    made = json.loads(run("uv run condu-ray versions --json"))
    assert [version["kind"] for version in made] == ["learn", "learn", "learn", "forget", "rollback"]
    assert [version["tasks"] for version in made][2:] == [["birds", "signs", "food"], ["birds", "signs"], ["birds"]]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "accuracy_matrix.png",
        "accuracy_over_versions.png",
    }
    (answer,) = next(json.loads(text) for command, text in said.items() if "--labels" in command)
    assert (answer["label_space"], answer["version"]) == ("candidates", 3)
    assert {each["label"] for each in answer["labels"]} == {"a lighthouse", "a bridge", "a castle"}

    (code,) = blocks(ROOT / "docs" / "python.md", "python")
    exec(compile(code, "docs/python.md", "exec"), {})


def test_commands_in_all_documents_are_understood() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    found = 0
    for document in DOCUMENTS:
        for kind, body in FENCE.findall(document.read_text(encoding="utf-8")):
            for line in body.replace("\\\n", " ").splitlines() if kind in ("sh", "console") else ():
                if match := re.match(r"(?:\$ )?(?:uv run )?condu-ray (\w+)(.*)", line.split(" && ")[-1]):
                    commands[match[1]].make_context(match[1], shlex.split(match[2], comments=True))
                    found += 1
    assert found >= 20


class Here(InProcessCrew):
    def __init__(self, store: Store, config: SessionConfig, cluster: Cluster) -> None:
        super().__init__(store, config)

    def close(self) -> None:
        pass


def test_the_demo_learns_draws_and_given_again_does_nothing_anew(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process; what a session does on Ray is what it does here (tests/engine/)."""
    monkeypatch.setattr("condu_ray.engine.command.RayCrew", Here)
    monkeypatch.setattr(
        "condu_ray.benchmark.demo.connected", lambda: contextlib.nullcontext(Cluster(((1, 0),), joined=False))
    )
    monkeypatch.setenv("CONDU_MODEL", f"local-dir:{tiny_model_dir}")
    monkeypatch.setenv("CONDU_TRAIN__STEPS", "2")
    monkeypatch.setenv("CONDU_TRACKING", "off")
    out = tmp_path / "demo"
    found = condu("demo", "--out", out, "--json").document
    assert list(found["methods"]) == ["zero-shot", "sequential", "condu-sign"]
    assert len(found["tasks"]) == 5
    assert all(Path(path).is_file() for path in found["pictures"])
    assert condu(*shlex.split(found["next"][0])[1:]).code == 0
    again = condu("demo", "--out", out)
    assert again.code == 0
    assert "condu-sign" in again.out
    assert condu("demo", "--out", out, "--json").document["methods"] == found["methods"]


def test_links_between_documents_lead_somewhere() -> None:
    links = [
        (document.relative_to(ROOT), link)
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(links) >= 15
    assert [(str(document), link) for document, link in links if not (ROOT / document.parent / link).exists()] == []
