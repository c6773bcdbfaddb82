import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import ssm_jax
from configs.aggregation import comparison
from configs.s4nd import digits
from experiments import compare as module
from experiments.compare import PLAIN, compare, parse_shard, picture
from experiments.config import ConfigError
from experiments.experiment import build
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.loop import NonFiniteLossError, Stopped

pytestmark = pytest.mark.slow  # each run is one of experiments.train, which has tests of its own

METHODS = (PLAIN, "s6la")
NETWORK = {"img_size": 8, "patch_size": 4, "d_model": 8, "depth": 1, "num_heads": 2}
ACCURACY = {(PLAIN, 0): 0.5, (PLAIN, 1): 0.7, ("s6la", 0): 0.6, ("s6la", 1): 0.65}
RUNS = [f"{method}/seed_{seed}" for seed in (0, 1) for method in METHODS]


@pytest.fixture
def sweep():
    """Two methods with two seeds on the digits; dotted fields as arguments change the run of a comparison."""

    def make(methods=METHODS, seeds=(0, 1), comparisons=("digits",), **fields) -> ConfigDict:
        made = {}
        for name in comparisons:
            run = digits.get_config()
            run.model = {"name": "deit_tiny", **NETWORK}
            changes = {"batch_size": 256, "epochs": 2.0, "optimizer.warmup_epochs": 0.5, "eval.every_epochs": 1.0}
            changes |= {"checkpoint_every_epochs": 0.5, "eval.resolutions": (), "log_every_steps": 2}
            run.update_from_flattened_dict(changes | fields)
            made[name] = {"methods": methods, "note": "Some note.", "run": run}
        return ConfigDict({"seeds": seeds, "comparisons": made})

    return make


@pytest.fixture
def trained(monkeypatch):
    """Instead of training, runs are written down here, and get the accuracies above; `failing` ones raise."""

    class Trained(list):
        failing = ()

        def __call__(self, config, workdir):
            name = "/".join(workdir.parts[-2:])
            self.append(name)
            if name in self.failing:
                raise NonFiniteLossError(f"the loss of {name} is nan")
            method = workdir.parts[-2]
            rows = [{"step": step, "images_per_second": ips} for step, ips in [(1, 0.0), (2, 1000.0), (3, 4000.0)]]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            results = {"test": {"8": {"accuracy": ACCURACY[method, config.seed]}}}
            (workdir / "results.json").write_text(json.dumps(results))

    trained = Trained()
    monkeypatch.setattr(module, "train", trained)
    return trained


def written(workdir):
    return json.loads((workdir / "comparison.json").read_text())


def test_every_method_runs_with_every_seed_one_seed_after_another(sweep, trained, tmp_path):
    compare(sweep(), tmp_path)
    assert trained == RUNS
    for name in RUNS:
        config = json.loads((tmp_path / "digits" / name / "config.json").read_text())
        method, seed = name.split("/seed_")
        assert config["model"]["name"] == {PLAIN: "deit_tiny", "s6la": "deit_tiny_s6la"}[method]
        assert config["seed"] == int(seed)


def test_runs_of_one_comparison_differ_in_network_and_seed_alone(sweep, trained, tmp_path):
    compare(sweep(), tmp_path)
    configs = [json.loads((tmp_path / "digits" / name / "config.json").read_text()) for name in RUNS]
    for config in configs:
        del config["seed"], config["model"]["name"]
    assert all(config == configs[0] for config in configs)


def test_the_summary_has_mean_and_standard_deviation_over_seeds(sweep, trained, tmp_path):
    compare(sweep(), tmp_path)
    methods = written(tmp_path)["digits"]["methods"]
    for method in METHODS:
        accuracies = [ACCURACY[method, seed] for seed in (0, 1)]
        assert methods[method]["test_accuracy"] == {"0": accuracies[0], "1": accuracies[1]}
        assert methods[method]["mean"] == pytest.approx(np.mean(accuracies))
        assert methods[method]["std"] == pytest.approx(np.std(accuracies, ddof=1))


def test_the_summary_has_parameters_and_the_median_time_of_a_step(sweep, trained, tmp_path):
    compare(sweep(), tmp_path)
    for method, known in written(tmp_path)["digits"]["methods"].items():
        name = "deit_tiny" if method == PLAIN else f"deit_tiny_{method}"
        make = functools.partial(ssm_jax.create_model, name, num_classes=10, in_channels=1, **NETWORK)
        network = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        assert known["parameters"] == sum(x.size for x in jax.tree.leaves(nnx.state(network, nnx.Param)))
        assert known["step_ms"] == pytest.approx(1000 * 256 / 2500)  # images a second; that of the first step is none


def test_the_table_is_written_as_markdown(sweep, trained, tmp_path):
    trained.failing = ["s6la/seed_1"]
    compare(sweep(), tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == "## deit_tiny on scanned digits, 8 x 8"
    assert lines[2] == "| method | parameters | step, ms | runs | test accuracy, % |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:6]]
    assert [row[0] for row in cells] == list(METHODS)
    assert [row[3:] for row in cells] == [["2 of 2", "60.00 ± 14.14"], ["1 of 2", "60.00 (failed: seed 1)"]]
    assert lines[7].startswith("d_model=8, depth=1, img_size=8, num_heads=2, patch_size=4; 8 steps of 256 images; ")
    assert lines[7].endswith("Some note.")


def test_the_picture_has_a_dot_for_every_run(sweep, trained, tmp_path):
    trained.failing = ["s6la/seed_1"]
    summary = compare(sweep(comparisons=("digits", "again", "once_more")), tmp_path)
    panels = picture(summary).axes
    assert [axes.axison for axes in panels] == [True, True, True, False]
    for axes in panels[:3]:
        dots = [tuple(xy) for line in axes.lines if line.get_marker() == "o" for xy in line.get_xydata().tolist()]
        np.testing.assert_allclose(dots, [(50.0, 0), (70.0, 0), (60.0, 1)])
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_never_repeated(sweep, trained, tmp_path):
    first = compare(sweep(seeds=(0,)), tmp_path)
    assert first["digits"]["methods"][PLAIN]["std"] is None
    assert trained == RUNS[:2]
    again = compare(sweep(), tmp_path)
    assert trained == RUNS
    assert again["digits"]["methods"][PLAIN]["test_accuracy"] == {0: 0.5, 1: 0.7}


def test_a_run_that_fails_is_named_and_the_others_go_on(sweep, trained, tmp_path, capsys):
    trained.failing = ["s6la/seed_0"]
    summary = compare(sweep(), tmp_path)
    assert trained == RUNS
    assert summary["digits"]["methods"]["s6la"]["test_accuracy"] == {1: 0.65}
    assert [*module.failures(summary)] == ["digits/s6la/seed_0"]
    message = module.failures(summary)["digits/s6la/seed_0"]
    assert message.endswith("NonFiniteLossError: the loss of s6la/seed_0 is nan")
    assert "digits/s6la/seed_0 failed: " in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "digits/s6la/seed_0/error.txt").read_text()


def test_a_run_that_failed_is_tried_again_by_the_next_start(sweep, trained, tmp_path):
    trained.failing = ["s6la/seed_0"]
    compare(sweep(), tmp_path)
    trained.failing = ()
    trained.clear()
    summary = compare(sweep(), tmp_path)
    assert trained == ["s6la/seed_0"]
    assert not module.failures(summary)
    assert summary["digits"]["methods"]["s6la"]["test_accuracy"] == {0: 0.6, 1: 0.65}
    assert not (tmp_path / "digits/s6la/seed_0/error.txt").exists()


def test_shards_together_are_one_process(sweep, trained, tmp_path):
    config = sweep(seeds=(0, 1), comparisons=("digits", "again"))
    compare(config, tmp_path / "one")
    whole = sorted(trained)
    trained.clear()
    parts = []
    for number in (1, 2, 3):
        compare(config, tmp_path / "three", shard=(number, 3))
        parts.append(len(trained) - sum(parts))
    assert sorted(trained) == whole
    assert parts == [3, 3, 2]
    assert written(tmp_path / "three") == written(tmp_path / "one")


def test_a_summary_trains_nothing_and_names_what_is_not_finished(sweep, trained, tmp_path):
    compare(sweep(), tmp_path, shard=(1, 2))
    trained.clear()
    methods = compare(sweep(), tmp_path, summarize=True)["digits"]["methods"]
    assert trained == []
    assert {method: known["unfinished"] for method, known in methods.items()} == {PLAIN: [], "s6la": [0, 1]}
    assert methods["s6la"]["mean"] is None
    assert (tmp_path / "comparison.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": (PLAIN, "sla")}, r"^config\.comparisons\.digits\.methods must be among plain, .*s6la.*'sla'"),
        ({"methods": (PLAIN, PLAIN)}, r"^config\.comparisons\.digits\.methods .*each at most once"),
        ({"methods": ()}, r"^config\.comparisons\.digits\.methods must be among"),
        ({"seeds": ()}, r"^config\.seeds must be different numbers, at least one, got \(\)"),
        ({"seeds": (1, 1)}, r"^config\.seeds must be different numbers"),
        ({"model.num_heads": 3}, r"^config\.comparisons\.digits\.run\.model"),
        (
            {"data.resolution": 6},
            r"^config\.comparisons\.digits\.run\.model: images must .*\(in digits/plain/seed_0\)$",
        ),
        ({"epochs": 0.0}, r"^config\.comparisons\.digits\.run\.epochs must be positive, got 0\.0"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_trained(sweep, trained, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        compare(sweep(**options), tmp_path / "runs")
    assert trained == []
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_the_last_comparison_is_answered_before_the_first_is_trained(sweep, trained, tmp_path):
    config = sweep(comparisons=("digits", "wrong"))
    config.comparisons.wrong.run.model.depth = 0
    with pytest.raises(ConfigError, match=r"^config\.comparisons\.wrong\.run\.model\.depth must be at least 1, got 0"):
        compare(config, tmp_path / "runs")
    assert trained == []


def test_runs_of_another_budget_are_not_mixed_with_those_that_are_there(sweep, trained, tmp_path):
    compare(sweep(), tmp_path, shard=(2, 4))
    trained.clear()
    with pytest.raises(ConfigError, match=r"s6la/seed_0 holds a run of another config:\n  config\.epochs: 2\.0 there"):
        compare(sweep(epochs=5.0), tmp_path)
    assert trained == []


@pytest.mark.parametrize(("text", "shard"), [("1/1", (1, 1)), ("2/3", (2, 3)), ("12/12", (12, 12))])
def test_a_shard_is_a_number_of_how_many(text, shard):
    assert parse_shard(text) == shard


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "1", "a/b", "-1/3", ""])
def test_an_impossible_shard_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--shard must be I/N with I from 1 to N, such as 1/3, got "):
        parse_shard(text)


def test_a_run_that_is_interrupted_and_started_again_gives_the_table_of_an_unbroken_one(sweep, tmp_path, monkeypatch):
    """Stopped at the second of its four checkpoints."""
    config = sweep(methods=("s6la",), seeds=(3,))
    unbroken = compare(config, tmp_path / "unbroken")
    saves, save = [], Checkpoints.save

    def stopping(self, *arguments):
        save(self, *arguments)
        saves.append(self)
        if len(saves) == 2:
            raise Stopped(int(self.last))

    monkeypatch.setattr(Checkpoints, "save", stopping)
    with pytest.raises(Stopped):
        compare(config, tmp_path / "stopped")
    assert not list((tmp_path / "stopped").rglob("results.json"))
    resumed = compare(config, tmp_path / "stopped")
    assert len(saves) == 4
    ours, theirs = (summary["digits"]["methods"]["s6la"] for summary in (resumed, unbroken))
    assert ours["test_accuracy"] == theirs["test_accuracy"]
    assert ours | {"step_ms": 0} == theirs | {"step_ms": 0}


def test_the_command_ends_with_what_failed(command, tmp_path):
    """At a rate of 1e30 a network is infinite after a step."""
    fields = {"seeds": "(0,)", "data_dir": ""}
    run = "comparisons.cifar10_deit.run"
    fields |= {
        f"{run}.data.name": "digits",
        f"{run}.data.resolution": 8,
        f"{run}.batch_size": 256,
        f"{run}.epochs": 1.0,
    }
    fields |= {f"{run}.model.{name}": NETWORK[name] for name in ("img_size", "patch_size", "depth")}
    fields[f"{run}.model.d_model"] = 12
    fields |= {f"{run}.optimizer.lr": 1e30, f"{run}.optimizer.warmup_epochs": 0.0}
    fields["comparisons.cifar10_deit.methods"] = "('plain',)"
    process = command("experiments.compare", config="configs/aggregation/comparison.py:cifar10_deit,quick", tiny=False)
    done = process.run(f"--workdir={tmp_path}", *(f"--config.{name}={value}" for name, value in fields.items()))
    assert done.returncode == 1, done.stderr
    assert "error: 1 runs failed: cifar10_deit/plain/seed_0. Each has an error.txt." in done.stderr
    assert "Traceback" not in done.stderr
    assert "NonFiniteLossError" in (tmp_path / "cifar10_deit/plain/seed_0/error.txt").read_text()
    assert (tmp_path / "comparison.md").exists()


def test_an_interrupted_write_leaves_the_runs_of_the_others(sweep, trained, tmp_path):
    """Another process may just have made a run's folder, and not yet written its config."""
    (tmp_path / "digits/s6la/seed_1").mkdir(parents=True)
    compare(sweep(), tmp_path, shard=(1, 4))
    assert trained == RUNS[:1]


@pytest.mark.parametrize("words", ["", "quick"])
def test_all_comparisons_are_made_of_networks_that_there_are(words, jpeg_dir):
    config = comparison.get_config(words)
    config.data_dir = str(jpeg_dir)
    assert list(config.comparisons) == sorted(comparison.COMPARISONS)
    for options in config.comparisons.values():
        options.run.batch_size = 48  # there are no more than 54 images
    runs = module.plan(config, jpeg_dir)
    assert len(runs) == 3 * 2 * (6 + 5)
    for run in runs:
        if run.seed == 0 and run.method in METHODS:
            built = build(run.config)
            assert built.dataset.title in ("CIFAR-10, JPEG copy", "tiny_imagenet20")


def test_some_comparisons_can_be_chosen():
    assert list(comparison.get_config("cifar10_resnet,quick").comparisons) == ["cifar10_resnet"]
    chosen = comparison.get_config("cifar10_deit,tiny_imagenet20_resnet").comparisons
    assert list(chosen) == ["cifar10_deit", "tiny_imagenet20_resnet"]


def test_unknown_words_are_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"takes quick and any of cifar10_resnet, .*tiny_imagenet20_deit, got 'qick'"):
        comparison.get_config("cifar10_resnet,qick")
