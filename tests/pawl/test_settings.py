"""The settings tree: what the contract promises of the file and of the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pawl.errors import ConfigurationError
from pawl.settings import Settings, find_config, load_settings

LEAST = """
database: {url: sqlite:///var/pawl.db}           # or postgresql://user@host/db
serving:
  host: 127.0.0.1
  port: 8080
  models:
    assistant:                                   # the name clients ask for
      engines: [http://127.0.0.1:8000]           # replicas of one vLLM deployment
      champion: base-model                       # the model name the engines serve today
auth: {required: false}                          # true wherever others can reach it
"""
FIXED_SPLIT = """
serving:
  models:
    assistant:
      engines: [http://127.0.0.1:8000]
      champion: base-model
      experiment:
        key: tone
        variants:
          - {name: control, model: base-model, weight: 0.9}
          - {name: treatment, model: base-model--r0001-1a2b3c4d, weight: 0.1}
"""
PASSWORD = "correct horse battery staple"


def load(tmp_path: Path, text: str, **environ: str) -> Settings:
    path = tmp_path / "pawl.yaml"
    path.write_text(text)
    return load_settings(path, environ)


def problem(tmp_path: Path, text: str = LEAST, **environ: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text, **environ)
    return str(caught.value)


def test_the_least_that_works(tmp_path: Path) -> None:
    settings = load(tmp_path, LEAST)
    assert settings.serving.port == 8080
    assert settings.serving.models["assistant"].engines == ["http://127.0.0.1:8000"]
    assert settings.serving.models["assistant"].champion == "base-model"
    assert settings.auth.required is False


def test_a_fixed_split(tmp_path: Path) -> None:
    experiment = load(tmp_path, FIXED_SPLIT).serving.models["assistant"].experiment
    assert experiment is not None
    assert [(variant.name, variant.weight) for variant in experiment.variants] == [("control", 0.9), ("treatment", 0.1)]


def test_nothing_at_all_is_a_configuration() -> None:
    assert load_settings(None, {}) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("PAWL_SERVING__PORT", "9090", "serving.port", 9090),
        ("PAWL_SERVING__TIMEOUTS__CONNECT_S", "0.5", "serving.timeouts.connect_s", 0.5),
        ("PAWL_SERVING__LOG_REQUIRED", "false", "serving.log_required", False),
        ("PAWL_ROLLOUT__STEPS", "[0.05, 0.5]", "rollout.steps", [0.05, 0.5]),
        ("PAWL_SERVING__MODELS__ASSISTANT__CHAMPION", "other", "serving.models.assistant.champion", "other"),
        ("PAWL_DATABASE__URL", "sqlite:///x:y.db", "database.url", "sqlite:///x:y.db"),
        ("PAWL_RETRAIN__MIX", "{new: 0.7}", "retrain.mix.new", 0.7),
        ("PAWL_LOG", "{level: debug}", "log.level", "debug"),
        ("PAWL_STATE_DIR", "/srv/pawl", "state_dir", Path("/srv/pawl")),
    ],
)
def test_the_environment_wins_over_the_file(tmp_path: Path, name: str, text: str, path: str, value: Any) -> None:
    found: Any = load(tmp_path, LEAST, **{name: text})
    for key in path.split("."):
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value


def test_the_environment_leaves_the_rest_of_the_file_alone(tmp_path: Path) -> None:
    settings = load(tmp_path, LEAST, PAWL_SERVING__PORT="9090", HOME="/root", PATHOLOGICAL="x")
    assert settings.serving.models["assistant"].champion == "base-model"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("srving: {}", "srving"),
        ("serving: {prot: 1}", "serving.prot"),
        ("serving: {models: {a: {engines: ['http://x'], champion: c, chmpion: d}}}", "serving.models.a.chmpion"),
        ("retrain: {gate: {alfa: 0.1}}", "retrain.gate.alfa"),
    ],
)
def test_an_unknown_key_stops_the_start_with_its_path(tmp_path: Path, text: str, path: str) -> None:
    message = problem(tmp_path, text)
    assert f": {path}: unknown key" in message
    assert "pawl.yaml" in message


def test_an_unknown_variable_stops_the_start_with_its_path(tmp_path: Path) -> None:
    assert "serving.prot: unknown key" in problem(tmp_path, PAWL_SERVING__PROT="1")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("serving: {port: http}", "serving.port"),
        ("serving: {port: 70000}", "serving.port"),
        ("serving: [1, 2]", "serving"),
        ("rollout: {steps: 0.1}", "rollout.steps"),
        ("serving: {models: {a: {engines: [], champion: c}}}", "serving.models.a.engines"),
        ("serving: {models: {a: {engines: ['127.0.0.1:8000'], champion: c}}}", "serving.models.a.engines"),
        ("database: {url: 'mysql://x/y'}", "database.url"),
        ("auth: {required: sometimes}", "auth.required"),
        ("log: {level: loud}", "log.level"),
    ],
)
def test_a_wrong_value_stops_the_start_with_its_path(tmp_path: Path, text: str, path: str) -> None:
    assert f": {path}: " in problem(tmp_path, text)


@pytest.mark.parametrize("variants", ["[]", "[{name: a, model: m, weight: 0}]", "[{name: a, model: m, weight: -1}]"])
def test_a_split_that_sends_nobody_anywhere_is_refused(tmp_path: Path, variants: str) -> None:
    text = f"{{engines: ['http://x'], champion: c, experiment: {{key: k, variants: {variants}}}}}"
    assert ": serving.models.a.experiment" in problem(tmp_path, f"serving: {{models: {{a: {text}}}}}")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "just text"])
def test_what_is_no_mapping_names_the_file(tmp_path: Path, text: str) -> None:
    assert "pawl.yaml" in problem(tmp_path, text)


def test_bytes_that_are_no_text_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pawl.yaml"
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ConfigurationError, match=r"pawl\.yaml"):
        load_settings(path, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: No such file"):
        load_settings(tmp_path / "nowhere.yaml", {})


def test_secrets_are_kept_as_written_and_never_shown(tmp_path: Path) -> None:
    settings = load(tmp_path, LEAST, PAWL_DATABASE__PASSWORD=PASSWORD, PAWL_AUTH__SECRET="0123456789012345")
    assert settings.database.password is not None
    assert settings.database.password.get_secret_value() == PASSWORD
    assert settings.auth.secret is not None
    assert settings.auth.secret.get_secret_value() == "0123456789012345"
    shown = f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    assert PASSWORD not in shown
    assert "0123456789012345" not in shown


def test_a_complaint_does_not_repeat_the_password(tmp_path: Path) -> None:
    text = f"database: {{password: ['{PASSWORD}'], url: 'mysql://u:{PASSWORD}@h/d', extra: '{PASSWORD}'}}"
    assert PASSWORD not in problem(tmp_path, text)


def test_which_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(None, {}) is None
    (tmp_path / "pawl.yaml").write_text(LEAST)
    assert find_config(None, {}) == Path("pawl.yaml")
    assert find_config(None, {"PAWL_CONFIG": "named.yaml"}) == Path("named.yaml")
    assert find_config(Path("given.yaml"), {"PAWL_CONFIG": "named.yaml"}) == Path("given.yaml")
    assert load_settings(None, {"PAWL_CONFIG": "named.yaml"}) == Settings()
