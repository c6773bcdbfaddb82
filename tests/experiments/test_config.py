import json

import jax
import pytest
from etils import epath
from ml_collections import ConfigDict

from experiments.config import ConfigError, check, check_alike, claim_workdir, flatten, section
from experiments.experiment import build


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "run"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.mixer.d_state", 5, "config.model.mixer.d_state must be even"),
        ("model.mixer.init", "legz", "config.model.mixer.init must be one of"),
        ("model.mixer.bandlimit", 0.0, "config.model.mixer.bandlimit must be positive"),
        ("model.mixer.foo", 1, "config.model: model 'isotropic_s4nd': "),
        ("model.mixer.foo", 1, "unexpected keyword argument 'foo'"),
        ("model.d_model", 0, "config.model.d_model must be at least 1, got 0"),
        ("model.dropout", 1.0, "config.model.dropout must be in [0, 1), got 1.0"),
        ("model.name", "isotropic_s4dn", "config.model: unknown model 'isotropic_s4dn'; did you mean 'isotropic_s4nd'"),
        (
            "data.name",
            "digitz",
            "hmdb51, image_folder, imagenet2012, tiny_imagenet20, got 'digitz'. Did you mean 'digits'?",
        ),
        ("data.resolution", 0, "config.data.resolution must be at least 1, got 0"),
        ("augment.rand_augment", "rand-m99", "config.augment.rand_augment's m is the level, an integer from 0 to 10"),
        ("augment.crop_padding", -1, "config.augment.crop_padding must not be negative, got -1"),
        ("dtype", "float16", "config.dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ("batch_size", 60, "config.batch_size must be a multiple of 8 (8 devices x accumulate=1)"),
        ("batch_size", 1264, "and at most 1257, the images of digits, got 1264"),
        ("batch_size", 0, "config.batch_size must be at least 1, got 0"),
        ("accumulate", 3, "config.batch_size must be a multiple of 24 (8 devices x accumulate=3)"),
        ("mesh.data", 3, "config.mesh: mesh axes {'data': 3, 'fsdp': 1} do not fit 8 devices"),
        ("mesh.fsdp", -1, "config.mesh: mesh axes {'data': -1, 'fsdp': -1} do not fit 8 devices"),
        ("epochs", 0.0, "config.epochs must be positive, got 0.0"),
        ("epochs", float("inf"), "config.epochs must be positive, got inf"),
        ("optimizer.warmup_epochs", 3.0, "config.optimizer.warmup_epochs must be at least 0 and less than epochs=3.0"),
        ("optimizer.lr", float("nan"), "config.optimizer.lr must be positive, got nan"),
        ("optimizer.weight_decay", -0.1, "config.optimizer.weight_decay must be at least 0, got -0.1"),
        ("optimizer.name", "adam", "config.optimizer.name must be one of adamw, lamb, sgd, got 'adam'"),
        ("optimizer.momentum", 1.0, "config.optimizer.momentum must be in [0, 1), got 1.0"),
        ("optimizer.decay_epochs", (2, 3), "config.optimizer.decay_epochs must be epochs after the warm-up and before"),
        ("optimizer.decay_epochs", (0.5,), "config.optimizer.decay_epochs must be epochs after the warm-up and before"),
        ("optimizer.clip_norm", 0.0, "config.optimizer.clip_norm must be positive, got 0.0"),
        ("label_smoothing", 1.0, "config.label_smoothing must be in [0, 1), got 1.0"),
        ("ema_decay", 1.0, "config.ema_decay must be in [0, 1)"),
        ("eval.resolutions", (8, 0), "config.eval.resolutions must be whole numbers of at least 1, got (8, 0)"),
        ("eval.every_epochs", 0.0, "config.eval.every_epochs must be positive, got 0.0"),
        ("eval.batch_size", 0, "config.eval.batch_size must be at least 1, got 0"),
        ("checkpoint_every_epochs", -1.0, "config.checkpoint_every_epochs must be positive, got -1.0"),
        ("log_every_steps", 0, "config.log_every_steps must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_answered_with_its_field(tiny_config, field, value, message):
    config = tiny_config(**{field: value})
    with pytest.raises(ConfigError) as error:
        build(config)
    assert message in str(error.value)


def test_missing_data_are_answered_with_the_field_to_set(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r"^config\.data\.dir holds no prepared cifar10: looked for") as error:
        build(tiny_config(**{"data.name": "cifar10", "data.dir": str(tmp_path)}))
    assert str(tmp_path) in str(error.value)


def test_the_tiny_config_itself_is_allowed(tiny_config):
    check(tiny_config())


def test_a_mistake_is_answered_before_anything_compiles(tiny_config, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ConfigError):
        build(tiny_config(**{"model.mixer.d_state": 5}))


def test_fields_have_dotted_names():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": None}}}
    flat = {"a": 1, "b.c": 2, "b.d.e": None}
    assert flatten(nested) == flat
    assert flatten(ConfigDict(nested)) == flat


def test_an_error_about_no_field_is_about_its_section():
    with pytest.raises(ConfigError, match=r"^config\.b: x must be positive$"), section({"b": {"c": 1}}, "b"):
        raise ValueError("x must be positive")


def test_an_error_about_a_field_of_another_section_is_about_its_own():
    with pytest.raises(ConfigError, match=r"^config\.b: c is wrong$"), section({"a": {"c": 1}, "b": {"d": 1}}, "b"):
        raise ValueError("c is wrong")


def test_other_errors_are_no_mistakes_of_the_config():
    with pytest.raises(KeyError), section({"b": {"c": 1}}, "b"):
        raise KeyError("c")


def test_a_new_workdir_gets_its_config(workdir, tiny_config):
    config = tiny_config()
    claim_workdir(workdir, config)
    written = json.loads((workdir / "config.json").read_text())
    assert written == json.loads(json.dumps(config.to_dict()))
    assert [entry.name for entry in workdir.iterdir()] == ["config.json"]


def test_a_workdir_can_be_claimed_again(workdir, tiny_config):
    claim_workdir(workdir, tiny_config())
    before = (workdir / "config.json").read_text()
    claim_workdir(workdir, tiny_config())
    assert (workdir / "config.json").read_text() == before


def test_a_workdir_of_another_config_is_refused_with_the_difference(workdir, tiny_config):
    claim_workdir(workdir, tiny_config())
    before = (workdir / "config.json").read_text()
    other = tiny_config(**{"optimizer.lr": 0.5, "model.mixer.channels": 2})
    with pytest.raises(ConfigError) as error:
        claim_workdir(workdir, other)
    lines = str(error.value).splitlines()
    assert lines[0] == f"--workdir={workdir} holds a run of another config:"
    assert lines[1:-1] == [
        "  config.model.mixer.channels: 'absent' there, 2 now",
        "  config.optimizer.lr: 0.01 there, 0.5 now",
    ]
    assert (workdir / "config.json").read_text() == before
    assert [entry.name for entry in workdir.iterdir()] == ["config.json"]


def test_a_directory_with_foreign_files_is_refused(workdir, tiny_config):
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"not empty and not a run \(it has thesis\.tex but no config\.json\)"):
        claim_workdir(workdir, tiny_config())
    assert [entry.name for entry in workdir.iterdir()] == ["thesis.tex"]
    assert (workdir / "thesis.tex").read_text() == "precious"


def test_a_claim_that_was_killed_can_be_repeated(workdir, tiny_config):
    workdir.mkdir()
    (workdir / "config.tmp").write_text('{"mod')
    claim_workdir(workdir, tiny_config())
    assert [entry.name for entry in workdir.iterdir()] == ["config.json"]


def test_only_the_first_process_writes(workdir, tiny_config, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    claim_workdir(workdir, tiny_config())
    assert not workdir.exists()


def test_a_run_may_go_on_with_other_devices_and_data_elsewhere(tmp_path, tiny_config):
    """And config.json has what it goes on with."""
    workdir = tmp_path / "run"
    claim_workdir(workdir, tiny_config())
    other = tiny_config(**{"mesh.fsdp": 2, "data.dir": "/elsewhere", "data.workers": 3})
    claim_workdir(workdir, other)
    assert json.loads((workdir / "config.json").read_text())["mesh"] == {"data": -1, "fsdp": 2}
    with pytest.raises(ConfigError, match=r"holds a run of another config:\n  config\.seed: 0 there, 1 now\nUse"):
        claim_workdir(workdir, tiny_config(**{"mesh.fsdp": 4, "seed": 1}))


def test_processes_that_were_started_differently_are_told_apart(tmp_path, tiny_config, monkeypatch):
    def told(change):
        def gathered(text):
            return [text, json.dumps(json.loads(text) | change)]

        monkeypatch.setattr("experiments.config.gathered", gathered)
        check_alike(tiny_config(), tmp_path)

    told({})
    with pytest.raises(ConfigError, match=r"config\.optimizer\.lr is 0\.01 in process 0 and 0\.5 in process 1"):
        told({"config.optimizer.lr": 0.5})
    with pytest.raises(ConfigError, match=r"--workdir is '.*' in process 0 and '/other' in process 1"):
        told({"--workdir": "/other"})


@pytest.mark.parametrize("rules", [("head.kernel", 0), (("head.kernel", "fsdp"),), (("head.kernel",),)])
def test_rules_of_sharding_are_pairs(tiny_config, rules):
    with pytest.raises(ConfigError, match=r"config\.sharding_rules must be pairs of a name and an axis"):
        check(tiny_config(sharding_rules=rules))
