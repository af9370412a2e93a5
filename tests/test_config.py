"""Settings: where each value comes from, and that everything wrong is told at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from condu_ray.catalogue import MethodName
from condu_ray.config import (
    SECTIONS,
    SessionConfig,
    check_task_name,
    fields,
    fixed_by_store,
    rescaler_steps,
    rescales,
)
from condu_ray.errors import ConfigError
from condu_ray.sources import flatten, from_dotted, resolve


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("CONDU_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def fault(options: dict[str, Any] | None = None, file: Path | None = None, fixed: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(options or {}, file, fixed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_option_beats_the_environment_beats_the_file_beats_the_store_beats_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each name is set in one place fewer than the name before."""
    store = {"lora.rank": 1}
    file.write_text("seed: 2\ntest_share: 0.2\ntrain:\n  steps: 2\n  warmup: 0.02\n")
    monkeypatch.setenv("CONDU_SEED", "3")
    monkeypatch.setenv("CONDU_TRAIN__STEPS", "3")
    config, origin = resolve({"seed": "4"}, file, store)
    told = {"seed": 4, "train.steps": 3, "train.warmup": 0.02, "lora.rank": 1, "train.batch_size": 32}
    assert {name: flatten(config.model_dump())[name] for name in told} == told
    assert [origin[name] for name in told] == ["option", "environment", f"file {file}", "store", "default"]
    assert set(origin) == {name for name, _ in fields()}


def test_without_anything_every_value_is_the_default() -> None:
    config, origin = resolve({})
    assert config == SessionConfig()
    assert set(origin.values()) == {"default"}


def test_values_come_as_text_from_options_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDU_TRAIN__LR", "1e-5")
    monkeypatch.setenv("condu_vote__k", "2")
    monkeypatch.setenv("CONDU_TASKS", '{"cats": "./cats"}')
    monkeypatch.setenv("CONDU_LORA", '{"rank": 8}')
    config, origin = resolve({"vote.adaptive": "false", "train.steps": "7"})
    assert (config.train.lr, config.vote.k, config.vote.adaptive, config.train.steps) == (1e-5, 2, False, 7)
    assert (config.tasks, config.lora.rank) == ({"cats": "./cats"}, 8)
    assert origin["lora.rank"] == origin["tasks"] == "environment"


def test_unknown_names_offer_the_nearest_wherever_they_stand(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("train:\n  step: 5\nmetod: condu\n")
    monkeypatch.setenv("CONDU_TRAIN__BATCHSIZE", "5")
    monkeypatch.setenv("CONDU_TRAIN_WARMUP", "0.5")
    told = fault({"vote.kk": 3}, file)
    assert f"no setting 'train.step' (from file {file}; did you mean train.steps?)" in told
    assert f"no setting 'metod' (from file {file}; did you mean method?)" in told
    assert "no setting 'train.batchsize' (from environment; did you mean train.batch_size?)" in told
    assert "no setting 'train_warmup' (from environment; did you mean train.warmup?)" in told
    assert "no setting 'vote.kk' (from option; did you mean vote.k?)" in told


def test_variables_that_are_not_ours_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDU_CACHE", "/somewhere")
    monkeypatch.setenv("CONDU_RAY_PORT", "tcp://10.0.0.1:8265")  # Kubernetes, for a service called condu-ray
    monkeypatch.setenv("CONDU_RAY_SERVICE_HOST", "10.0.0.1")
    assert resolve({})[0] == SessionConfig()


def test_all_wrong_values_are_told_at_once_with_name_value_and_origin(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("train:\n  steps: 0\n  lr: .nan\n  weight_decay: .inf\n")
    monkeypatch.setenv("CONDU_VOTE__K", "many")
    told = fault({"method": "condoo", "test_share": 1.5, "nonsense": 1}, file)
    assert f"train.steps = 0 (from file {file}): Input should be greater than or equal to 1" in told
    assert f"train.lr = nan (from file {file})" in told
    assert f"train.weight_decay = inf (from file {file}): Input should be a finite number" in told
    assert "vote.k = 'many' (from environment): Input should be a valid integer" in told
    assert "method = 'condoo' (from option): Input should be 'condu', 'condu-sign', 'condu-lora'" in told
    assert "test_share = 1.5 (from option)" in told
    assert "no setting 'nonsense'" in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: [1, 2", "is not YAML (line 1"),
        ("seed: 1\nseed: 2\n", "is not YAML (line 2: 'seed' is given twice)"),
        ("tasks:\n  cats: a\n  cats: b\n", "is not YAML (line 3: 'cats' is given twice)"),
        ("train.lr: 0.1\ntrain: {lr: 0.2}\n", "train.lr is given twice, nested and with dots"),
        ("just words", "holds a str: write settings as 'name: value' lines"),
        ("- a\n- b\n", "holds a list"),
        ("seed: !!python/object/apply:os.getcwd []\n", "is not YAML (line 1"),
        ("seed: \x00\n", "is not YAML"),
        ("train: 5\n", "no setting 'train'"),
        ("train:\n  steps:\n    more: 5\n", "no setting 'train.steps.more'"),
        ("5: 1\n", "no setting '5'"),
        ("seed: 2024-13-01\n", "is not YAML"),
        ("seed: !!int abc\n", "is not YAML"),
        ("seed: 0x_\n", "is not YAML"),
        (f"seed: {'9' * 5000}\n", "is not YAML"),
        ("seed: !!timestamp x\n", "is not YAML"),
        ("seed: !!set [1]\n", "is not YAML"),
        (f"seed: {'[' * 3000}\n", "is not YAML"),
        ("train: &a\n  steps: *a\n", "is not YAML (line 1"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_sentence(file: Path, text: str, sentence: str) -> None:
    file.write_text(text)
    told = fault(file=file)
    assert str(file) in told
    assert sentence in told


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in fault(file=tmp_path / "none.yaml")
    assert "cannot be read (Is a directory)" in fault(file=tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"store: caf\xe9\n")
    assert "is not YAML" in fault(file=tmp_path / "latin.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\nlora:\n  # rank: 8\n"])
def test_an_empty_file_or_section_sets_nothing(file: Path, text: str) -> None:
    file.write_text(text)
    config, origin = resolve({}, file)
    assert config == SessionConfig()
    assert set(origin.values()) == {"default"}


def test_words_that_yaml_takes_for_false_are_words_here(file: Path) -> None:
    file.write_text("gpu: no\ntracking: off\nvote:\n  adaptive: off\n")
    config, _ = resolve({}, file)
    assert (config.gpu, config.tracking, config.vote.adaptive) == ("no", "off", False)
    assert "parallel = False" in fault({"parallel": False})


def test_a_broken_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDU_TASKS", "{cats")
    told = fault()
    assert told.startswith("environment: ")
    assert "tasks" in told
    assert "mend that CONDU_ variable" in told


@pytest.mark.parametrize("value", ["[1]", "5", '"x"'])
def test_a_section_that_holds_no_settings_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDU_TRAIN", value)
    assert "CONDU_TRAIN holds no settings: set CONDU_TRAIN__NAME=VALUE" in fault()
    monkeypatch.setenv("CONDU_TRAIN", '{"steps": 7}')
    assert resolve({})[0].train.steps == 7


@pytest.mark.parametrize("method", ["rapf", "calfuse", "dmc", "dmc-ot"])
def test_a_store_of_a_system_with_settings_of_its_own_refuses_another(method: str) -> None:
    fixed = fixed_by_store(from_dotted({"method": method}))
    assert f"method is condu (from option), but this store was made with {method}" in fault(
        {"method": "condu"}, fixed=fixed
    )


def test_a_store_refuses_other_values_of_what_it_fixed_all_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = fixed_by_store(from_dotted({"method": "condu-lora", "lora.rank": 8, "fusion.granularity": "tensor"}))
    config, origin = resolve({"lora.rank": "8", "seed": 5}, fixed=fixed)
    assert (config.method, config.lora.rank, config.fusion.granularity) == ("condu-lora", 8, "tensor")
    assert (origin["method"], origin["lora.rank"]) == ("store", "option")
    monkeypatch.setenv("CONDU_LORA__RANK", "16")
    file.write_text("fusion: {granularity: l1}\n")
    told = fault({"method": "condu"}, file, fixed)
    assert "method is condu (from option), but this store was made with condu-lora" in told
    assert "lora" not in told.partition("condu-lora")[2], "condu reads none of it"
    assert f"fusion.granularity is l1 (from file {file}), but this store was made with tensor" in told
    assert told.endswith("leave method, fusion.granularity out, or use another --store.")
    told = fault({}, file, fixed)
    assert "lora.rank is 16 (from environment), but this store was made with 8" in told
    assert told.endswith("leave lora.rank, fusion.granularity out, or use another --store.")


SIGN = {"fusion.triggers": "sign"}
MEMORY = {"memory.covariance", "memory.shrinkage", "memory.gamma"}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"method": "condu"}, 0),
        ({"method": "condu", **SIGN}, 18),
        ({"method": "condu-sign"}, 18),
        ({"method": "condu-sign", "fusion.triggers": "mask"}, 0),
        ({"method": "condu-sign", "fusion.tune_rescalers": 7}, 7),
        ({"method": "condu-sign", "fusion.tune_rescalers": 0}, 0),
        ({"method": "condu-lora", **SIGN}, 18),
        ({"method": "condu-lora", "lora.mode": "exact", **SIGN}, 0),
        ({"method": "finetune", **SIGN, "fusion.tune_rescalers": 7}, 0),
    ],
)
def test_rescalers_are_trained_where_signs_are_fused(given: dict[str, Any], steps: int) -> None:
    config = from_dotted(given)
    assert rescaler_steps(config, 219) == steps
    assert rescales(config) == (steps > 0)


def test_masks_refuse_trained_rescalers_among_all_other_faults() -> None:
    told = fault({"method": "condu", "fusion.tune_rescalers": 40, "nonsense": 1})
    assert "fusion.tune_rescalers = 40 needs sign triggers (--method condu-sign or --fusion.triggers sign)" in told
    assert "no setting 'nonsense'" in told
    assert "fusion.tune_rescalers = 5 needs" in fault({"fusion.tune_rescalers": 5}, fixed={"method": "condu"})


def test_a_store_that_is_older_than_a_setting_takes_its_default_and_a_newer_one_keeps_its_own() -> None:
    newer = fixed_by_store(from_dotted({"method": "condu-sign", "fusion.tune_rescalers": 7}))
    older = {name: value for name, value in newer.items() if name != "fusion.tune_rescalers"}
    assert rescaler_steps(resolve({}, fixed=newer)[0], 219) == 7
    assert rescaler_steps(resolve({}, fixed=older)[0], 219) == 18
    assert "fusion.tune_rescalers is 9 (from option), but this store was made with 7" in fault(
        {"fusion.tune_rescalers": 9}, fixed=newer
    )


@pytest.mark.parametrize(
    ("method", "shrinkage"), [("rapf", "none"), ("calfuse", "convex"), ("dmc", "convex"), ("dmc-ot", "convex")]
)
def test_a_store_fixes_what_its_gaussians_are_joined_and_answer_by(method: str, shrinkage: str) -> None:
    fixed = fixed_by_store(from_dotted({"method": method, "memory.gamma": 0.3}))
    assert {name: value for name, value in fixed.items() if name in MEMORY} == {
        "memory.covariance": "full",
        "memory.shrinkage": shrinkage,
        "memory.gamma": 0.3,
    }
    assert resolve({}, fixed=fixed)[0].memory.gamma == 0.3
    told = fault({"memory.covariance": "diagonal", "memory.shrinkage": "rapf", "memory.gamma": 0.2}, fixed=fixed)
    assert "memory.covariance is diagonal (from option), but this store was made with full" in told
    assert f"memory.shrinkage is rapf (from option), but this store was made with {shrinkage}" in told
    assert "memory.gamma is 0.2 (from option), but this store was made with 0.3" in told
    older = {name: value for name, value in fixed.items() if name not in MEMORY}
    assert resolve({"memory.covariance": "diagonal"}, fixed=older)[0].memory.covariance == "diagonal"
    assert not MEMORY & set(fixed_by_store(from_dotted({"method": "condu"})))


def test_a_store_fixes_what_its_experts_are_made_of_and_nothing_else() -> None:
    fixed = set(fixed_by_store(SessionConfig()))
    assert {"method", "model", "pretrained", "train.towers", "fusion.granularity"} <= fixed
    assert fixed <= {name for name, _ in fields()}
    assert resolve({"lora.rank": 8}, fixed=fixed_by_store(SessionConfig()))[0].method == "condu-sign"
    adapters = set(fixed_by_store(from_dotted({"method": "condu-lora"})))
    assert {"lora.seed", "lora.mode", "lora.rank", "fusion.granularity"} <= adapters
    assert not {"lora.rank", "fusion.granularity"} & set(fixed_by_store(from_dotted({"method": "rapf"})))
    assert not {"seed", "train.steps", "train.lr", "vote.k", "store", "tasks", "workers"} & fixed
    assert from_dotted(fixed_by_store(SessionConfig())) == SessionConfig()


@pytest.mark.parametrize("name", ["a", "Tiny-ImageNet_2.1", "9lives", "x" * 64])
def test_names_that_files_metrics_and_urls_can_hold(name: str) -> None:
    assert check_task_name(name) == name
    assert resolve({"tasks": [f"{name}=data"]})[0].tasks == {name: "data"}


@pytest.mark.parametrize("name", ["", ".hidden", "-option", "_", "a b", "a/b", "..", "blüte", "é", "x" * 65, "a\n"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 64 letters"):
        check_task_name(name)
    assert "must be 1 to 64 letters" in fault({"tasks": {name: "data"}})


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (["cats"], "'cats' is not NAME=PATH"),
        (["=path"], "'=path' is not NAME=PATH"),
        (["cats="], "'cats=' is not NAME=PATH"),
        (["cats=a", "cats=b"], "task cats is given twice"),
        ({"cats": 5}, "tasks = 5 (from option): Input should be a valid string"),
        ("cats=a", "tasks = 'cats=a' (from option)"),
    ],
)
def test_tasks_that_cannot_be_meant_are_refused(tasks: Any, sentence: str) -> None:
    assert sentence in fault({"tasks": tasks})


def test_tasks_keep_the_order_given_and_paths_may_hold_an_equals_sign() -> None:
    tasks = resolve({"tasks": ["b=x/y=z", "a=w"]})[0].tasks
    assert list(tasks.items()) == [("b", "x/y=z"), ("a", "w")]


def test_local_models_and_checkpoints_are_kept_by_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    config, _ = resolve({"model": "local-dir:model", "pretrained": "weights.pt"})
    assert config.model == f"local-dir:{tmp_path}/model"
    assert config.pretrained == str(tmp_path / "weights.pt")
    other, _ = resolve({"model": "ViT-B-16", "pretrained": "openai"})
    assert (other.model_spec.name, other.model_spec.pretrained) == ("ViT-B-16", "openai")


@pytest.mark.parametrize("method", ["sequential", "wise-ft"])
def test_one_model_has_one_set_of_running_statistics(method: str) -> None:
    with pytest.raises(ConfigError, match=f"batch_norm = updated keeps statistics of each task, and {method} has one"):
        resolve({"method": method, "train.batch_norm": "updated"})


def test_every_setting_is_described_and_dotted_names_are_complete() -> None:
    found = dict(fields())
    assert len(found) > 30
    assert {name.partition(".")[0] for name in found if "." in name} == set(SECTIONS)
    for name, info in found.items():
        assert info.description, name
        assert 10 < len(info.description) < 130, name
    assert set(flatten(SessionConfig().model_dump())) == set(found)


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SessionConfig().train.steps = 5  # type: ignore[misc]


OTHERS = {
    "method": st.sampled_from(get_args(MethodName)),
    "gpu": st.sampled_from(["auto", "no"]),
    "tracking": st.sampled_from([None, "off", "http://somewhere:5000"]),
    "tasks": st.dictionaries(st.from_regex(r"[a-z0-9][a-z._-]{0,5}", fullmatch=True), st.just("a/b"), max_size=3),
    "seed": st.integers(0, 2**31 - 1),
    "pretrained": st.sampled_from([None, "no", "1e5", "openai"]),
    "train.lr": st.none() | st.floats(1e-12, 0.999),
    "train.steps": st.none() | st.integers(1, 10**6),
    "train.towers": st.sampled_from(["both", "image"]),
    "lora.rank": st.integers(1, 1024),
    "fusion.granularity": st.sampled_from(["l1", "tensor_mean", "tensor", "row"]),
    "vote.adaptive": st.booleans(),
    "vote.base_weight": st.none() | st.floats(0, 0.99),
}


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional=OTHERS))
def test_settings_are_the_same_dotted_nested_and_from_their_own_file(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    config = from_dotted(changes)
    assert SessionConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert from_dotted(flatten(config.model_dump())) == config
    file = tmp_path_factory.mktemp("dump", numbered=True) / "settings.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    loaded, origin = resolve({}, file)
    assert loaded == config
    assert list(loaded.tasks) == list(config.tasks)
    assert set(origin.values()) == {f"file {file}"}
    assert resolve(flatten(config.model_dump()))[0] == config
