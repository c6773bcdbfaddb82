import contextlib
import json
import re

import jax
import numpy as np
import pytest
import standin
from etils import epath
from flax import nnx

import ssm_jax
from configs.common import sweeps
from configs.s4nd import digits
from configs.sweeps import aggregation, progressive, tiny_imagenet, video, zero_shot
from experiments import results
from experiments import sweep as module
from experiments.config import ConfigError
from experiments.experiment import build
from experiments.lock import locked
from experiments.sweep import command_of, name_of, parse_shard, picture
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.loop import NonFiniteLossError, Stopped

pytestmark = pytest.mark.slow  # each run is one of experiments.train, which has tests of its own

ROWS = {"plain": "deit_tiny", "s6la": "deit_tiny_s6la"}
NETWORK = {"img_size": 8, "patch_size": 4, "d_model": 8, "depth": 1, "num_heads": 2}
ACCURACY = {("plain", 0): 0.5, ("plain", 1): 0.7, ("s6la", 0): 0.6, ("s6la", 1): 0.65}
SPEEDS = [(1, 0.0), (2, 1000.0), (3, 4000.0), (6, 500.0)]
RUNS = [f"{row}/seed_{seed}" for seed in (0, 1) for row in ROWS]


@pytest.fixture
def config():
    """Two networks with two seeds on the digits; dotted fields as arguments change all runs."""

    def make(rows=tuple(ROWS), seeds=(0, 1), tables=("digits",), paper="s6la", **fields):
        made = {}
        for name in tables:
            of_table = {}
            for row in rows:
                run = digits.get_config()
                run.model = {"name": ROWS[row], **NETWORK}
                changes = {"batch_size": 256, "epochs": 2.0, "optimizer.warmup_epochs": 0.5, "eval.every_epochs": 1.0}
                changes |= {"checkpoint_every_epochs": 0.5, "eval.resolutions": (), "log_every_steps": 2}
                run.update_from_flattened_dict(changes | fields)
                of_table[row] = sweeps.row(f"DeiT, {row}", run)
            made[name] = sweeps.table("DeiT on digits", "Some note.", of_table)
        made = sweeps.sweep(paper, made)
        made.seeds = seeds
        return made

    return make


@pytest.fixture
def run(tmp_path):
    """Runs a sweep, with its results beside the workdir."""

    def run(config, workdir=None, **options):
        workdir = workdir or tmp_path / "runs"
        return module.sweep(config, workdir, out=workdir.parent / "results" / f"{workdir.name}.json", **options)

    return run


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
            row = workdir.parts[-2]
            rates = [{"step": step, "images_per_second": ips} for step, ips in SPEEDS]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(rate) + "\n" for rate in rates))
            start = {"end": f"{len(self)}", "device": "cpu", "devices": 1, "commit": None, "versions": {}}
            (workdir / "run.json").write_text(json.dumps({"starts": [{}, start]}))
            accuracy = ACCURACY[row, config.seed]
            scores = {"8": {"accuracy": accuracy, "loss": 1.0}, "16": {"accuracy": accuracy / 2, "loss": 2.0}}
            (workdir / "results.json").write_text(json.dumps({"test": scores}))

    trained = Trained()
    monkeypatch.setattr(module, "train", trained)
    return trained


def runs_of(found, row, table="digits"):
    return found["tables"][table]["rows"][row]["runs"]


def states(found, row, table="digits"):
    return {seed: run["state"] for seed, run in runs_of(found, row, table).items()}


def test_every_row_runs_with_every_seed_one_seed_after_another(config, run, trained, tmp_path):
    run(config())
    assert trained == RUNS
    for name in RUNS:
        made = json.loads((tmp_path / "runs/digits" / name / "config.json").read_text())
        row, seed = name.split("/seed_")
        assert made["model"]["name"] == ROWS[row]
        assert made["seed"] == int(seed)


def test_the_results_are_the_runs_own(config, run, trained, tmp_path):
    found = run(config(), command="a command")
    assert json.loads((tmp_path / "results/runs.json").read_text()) == found
    assert (found["paper"], found["sweep"], found["command"]) == ("s6la", "runs", "a command")
    for (row, seed), accuracy in ACCURACY.items():
        known = runs_of(found, row)[str(seed)]
        assert known["id"] == f"digits/{row}/seed_{seed}"
        assert known["scores"]["8"] == {"accuracy": accuracy, "loss": 1.0}
        assert known["ended"] == str(1 + RUNS.index(f"{row}/seed_{seed}"))
        assert known["device"] == "cpu"
        assert known["seconds"] == pytest.approx(8 * 256 / 1000)  # 8 steps; the first rate is that of a compilation


def test_rows_have_what_networks_were_trained_on(config, run, trained):
    for row, known in run(config())["tables"]["digits"]["rows"].items():
        make = lambda row=row: ssm_jax.create_model(  # noqa: E731
            ROWS[row], num_classes=10, in_channels=1, rngs=nnx.Rngs(0), **NETWORK
        )
        network = nnx.state(nnx.eval_shape(make), nnx.Param)
        assert known["parameters"] == sum(x.size for x in jax.tree.leaves(network))
        assert (known["label"], known["dataset"]) == (f"DeiT, {row}", "scanned digits")
        assert (known["resolution"], known["steps"], known["batch_size"]) == (8, 8, 256)
        assert sum(known["images"].values()) == 1797


def test_each_stage_of_training_has_its_own_speed(config, run, trained):
    made = config(rows=("plain",), seeds=(0,))
    network = digits.get_config()
    network.update(batch_size=256, epochs=2.0)
    network.optimizer.warmup_epochs = 0.0
    network.stages.update(epochs=(1.0, 1.0), resolutions=(4, 8), bandlimits=(0.0, 0.0))
    made.tables.digits.rows.plain.run = network
    (known,) = runs_of(run(made), "plain").values()
    assert known["seconds"] == pytest.approx(4 * 256 / 2500 + 4 * 256 / 500)


def test_the_table_has_means_and_standard_deviations_by_resolution(config, run, trained, tmp_path):
    trained.failing = ["s6la/seed_1"]
    run(config())
    lines = (tmp_path / "runs/sweep.md").read_text().splitlines()
    assert lines[0] == "## DeiT on digits"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert cells[0] == ["network", "parameters", "training", "runs", "8 x 8, %", "16 x 16, %"]
    assert [row[0] for row in cells[2:]] == ["DeiT, plain", "DeiT, s6la"]
    assert cells[2][3:] == ["2 of 2", "60.00 ± 14.14", "30.00 ± 7.07"]
    assert cells[3][3:] == ["1 of 2 (failed: seed 1)", "60.00", "30.00"]
    assert "8 steps of 256" in lines[7]
    assert " on 1 x cpu, without" in lines[7]
    assert lines[7].endswith(" Some note.")


def test_the_picture_has_every_score(config, run, trained, tmp_path):
    found = run(config(tables=("digits", "again", "once_more")))
    panels = picture(found).axes
    assert [axes.axison for axes in panels] == [True, True, True, False]
    for axes in panels[:3]:
        bars = {container.get_label(): container for container in axes.containers}
        for row in ROWS:
            accuracies = np.array([ACCURACY[row, seed] for seed in (0, 1)])
            line, _, (spread,) = bars[f"DeiT, {row}"].lines
            means = 100 * accuracies.mean() * np.array([1, 0.5])
            np.testing.assert_allclose(np.asarray(line.get_ydata(), float), means)
            ends = np.array([segment[:, 1] for segment in spread.get_segments()])
            deviation = 100 * accuracies.std(ddof=1) * np.array([1, 0.5])
            np.testing.assert_allclose(ends, np.stack([means - deviation, means + deviation], 1))
    assert (tmp_path / "runs/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_never_repeated(config, run, trained):
    run(config(seeds=(0,)))
    assert trained == RUNS[:2]
    found = run(config())
    assert trained == RUNS
    assert set(states(found, "plain").values()) == {"finished"}


def test_a_run_that_fails_is_named_and_the_others_go_on(config, run, trained, tmp_path, capsys):
    trained.failing = ["s6la/seed_0"]
    found = run(config())
    assert trained == RUNS
    assert states(found, "s6la") == {"0": "failed", "1": "finished"}
    message = "ssm_jax.training.loop.NonFiniteLossError: the loss of s6la/seed_0 is nan"
    assert module.failures(found) == {"digits/s6la/seed_0": message}
    assert "digits/s6la/seed_0 failed: " in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "runs/digits/s6la/seed_0/error.txt").read_text()


def test_a_run_that_failed_is_tried_again_by_the_next_start(config, run, trained, tmp_path):
    trained.failing = ["s6la/seed_0"]
    run(config())
    trained.failing = ()
    trained.clear()
    found = run(config())
    assert trained == ["s6la/seed_0"]
    assert not module.failures(found)
    assert not (tmp_path / "runs/digits/s6la/seed_0/error.txt").exists()


def test_a_row_starts_from_the_weights_of_another_one_of_its_seed(config, run, trained, tmp_path):
    made = config()
    made.tables.digits.rows.s6la.weights_of = "digits/plain"
    made.tables.digits.rows.s6la.run.model.name = ROWS["plain"]
    trained.failing = ["plain/seed_1"]
    found = run(made)
    for seed in (0, 1):
        there = json.loads((tmp_path / f"runs/digits/s6la/seed_{seed}/config.json").read_text()) if seed == 0 else None
        if there:
            assert there["weights"] == str(tmp_path / f"runs/digits/plain/seed_{seed}")
    assert states(found, "s6la") == {"0": "finished", "1": "failed"}
    assert "starts from" in module.failures(found)["digits/s6la/seed_1"]
    trained.failing = ()
    assert not module.failures(run(made))


def test_progress_is_told_over_all_runs(config, run, trained, capsys):
    run(config(seeds=(0,)))
    capsys.readouterr()
    run(config())
    told = [line for line in capsys.readouterr().out.splitlines() if "are finished" in line]
    assert told[0] == "run 1 of 2 here, 2 of all 4 are finished: digits/plain/seed_1"
    assert told[1].startswith("run 2 of 2 here, 3 of all 4 are finished: digits/s6la/seed_1, 0:00:0")


def test_shards_together_are_one_process(config, run, trained, tmp_path):
    made = config(seeds=(0, 1), tables=("digits", "again"))
    run(made, tmp_path / "one")
    whole = sorted(trained)
    trained.clear()
    parts = []
    for number in (1, 2, 3):
        found = run(made, tmp_path / "three", shard=(number, 3))
        parts.append(len(trained) - sum(parts))
    assert sorted(trained) == whole
    assert parts == [3, 3, 2]
    assert all(set(states(found, row, table).values()) == {"finished"} for row in ROWS for table in made.tables)


def test_a_summary_trains_nothing_and_names_what_is_not_finished(config, run, trained, tmp_path):
    run(config(), shard=(1, 2))
    trained.clear()
    found = run(config(), summarize=True)
    assert trained == []
    assert states(found, "plain") == {"0": "finished", "1": "finished"}
    assert states(found, "s6la") == {"0": "missing", "1": "missing"}
    assert (tmp_path / "runs/sweep.png").exists()


def test_results_of_other_runs_are_not_written_over(config, run, trained, tmp_path):
    run(config())
    before = (tmp_path / "results/runs.json").read_text()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    trained.clear()
    with pytest.raises(
        ConfigError, match=r"runs\.json has results that this .* of digits/plain/seed_0, .* and others\. Move it away"
    ):
        run(config())
    assert trained == []
    assert (tmp_path / "results/runs.json").read_text() == before
    (tmp_path / "elsewhere").rename(tmp_path / "runs")
    run(config())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sweep": "runs", "tables": {"a": {}}}'])
def test_results_that_are_none_are_refused_by_the_name_of_their_file(config, run, trained, tmp_path, text):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/runs.json").write_text(text)
    with pytest.raises(ConfigError, match=r"results/runs\.json (is no JSON|has not what experiments\.sweep writes)"):
        run(config())
    assert trained == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, r"^config\.seeds must be different numbers, at least one, got \(\)"),
        ({"seeds": (1, 1)}, r"^config\.seeds must be different numbers"),
        ({"tables": ()}, r"^config\.tables must have at least one"),
        ({"paper": "mine"}, r"^config\.paper must be s4nd or s6la, got 'mine'"),
        ({"model.num_heads": 3}, r"^config\.tables\.digits\.rows\.plain\.run\.model"),
        ({"data.resolution": 6}, r"^config\.tables\.digits\.rows\.plain\.run\.model: images must "),
        ({"epochs": 0.0}, r"^config\.tables\.digits\.rows\.plain\.run\.epochs must be positive, got 0\.0"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_trained(config, run, trained, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(config(**options))
    assert trained == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["digits/none", "s6la", "digits/s6la"])
def test_weights_must_be_of_a_row_before(config, run, trained, name):
    made = config()
    made.tables.digits.rows.s6la.weights_of = name
    with pytest.raises(ConfigError, match=rf"s6la\.weights_of must be TABLE/ROW .* one of digits/plain, got '{name}"):
        run(made)
    assert trained == []


def test_a_mistake_in_the_last_table_is_answered_before_the_first_is_trained(config, run, trained):
    made = config(tables=("digits", "wrong"))
    made.tables.wrong.rows.s6la.run.model.depth = 0
    with pytest.raises(ConfigError, match=r"^config\.tables\.wrong\.rows\.s6la\.run\.model\.depth must be at"):
        run(made)
    assert trained == []


def test_runs_of_another_budget_are_not_mixed_with_those_that_are_there(config, run, trained):
    run(config(), shard=(2, 4))
    trained.clear()
    with pytest.raises(ConfigError, match=r"s6la/seed_0 holds a run of another config:\n  config\.epochs: 2\.0 there"):
        run(config(epochs=5.0))
    with pytest.raises(
        ConfigError, match=r"To train only this row anew, remove \S*/runs/digits/s6la, and the sweep's results"
    ):
        run(config(epochs=5.0))
    assert trained == []


def test_a_run_that_another_process_finishes_in_the_meantime_is_not_repeated(config, run, trained, monkeypatch):
    def train(made, workdir):
        trained(made, workdir)
        if len(trained) == 1:
            run(config(), shard=(2, 2))

    monkeypatch.setattr(module, "train", train)
    run(config())
    assert sorted(trained) == sorted(RUNS)


def test_a_run_that_another_process_trains_is_left_to_it(config, run, trained, tmp_path, monkeypatch, capsys):
    def train(made, workdir):
        with locked(workdir):
            trained(made, workdir)

    monkeypatch.setattr(module, "train", train)
    in_use = tmp_path / "runs" / "digits" / RUNS[0]
    with locked(epath.Path(in_use)):
        found = run(config())
    printed = capsys.readouterr().out
    assert f"digits/{RUNS[0]} is left to another process. --workdir={in_use} is in use" in printed
    assert f"digits/{RUNS[1]}\n" in printed  # without a pace: nothing was trained yet
    assert re.search(rf"digits/{RUNS[2]}, \S+ left at this pace\n", printed)
    assert trained == RUNS[1:]
    assert states(found, "plain") == {"0": "missing", "1": "finished"}


def test_a_finished_run_that_cannot_be_read_is_named(config, run, trained, tmp_path):
    run(config())
    (tmp_path / "runs/digits/plain/seed_1/results.json").write_text('{"test": ')
    with pytest.raises(
        ConfigError, match=r"plain/seed_1/results\.json is no JSON: .* Remove .*plain/seed_1, and the sweep's"
    ):
        run(config(), summarize=True)


def test_a_config_of_one_run_is_no_sweep(run):
    with pytest.raises(
        ConfigError, match=r"^config has no paper, seeds, tables: experiments\.sweep takes configs like"
    ):
        run(digits.get_config())


def test_the_command_has_the_fields_that_were_changed_and_no_folders_of_this_machine():
    arguments = ["--config=mine.py:8", "--config.data_dir=/data", "--workdir=runs/a", "--config.seeds=(3,)"]
    arguments.append("--config.tables.a.rows.b.run.data.dir=/data")
    assert command_of("mine.py:8", arguments) == (
        "python -m experiments.sweep --config=mine.py:8 --config.data_dir=DATA_DIR '--config.seeds=(3,)' "
        "--config.tables.a.rows.b.run.data.dir=DIR"
    )


@pytest.mark.parametrize(("text", "shard"), [("1/1", (1, 1)), ("2/3", (2, 3)), ("12/12", (12, 12))])
def test_a_shard_is_a_number_of_how_many(text, shard):
    assert parse_shard(text) == shard


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "1", "a/b", "-1/3", ""])
def test_an_impossible_shard_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--shard must be I/N with I from 1 to N, such as 1/3, got "):
        parse_shard(text)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("configs/sweeps/zero_shot.py", "zero_shot"),
        ("configs/sweeps/aggregation.py:quick,cifar10_deit", "aggregation_quick_cifar10_deit"),
        ("/somewhere/my-sweep.py", "my-sweep"),
    ],
)
def test_a_sweep_is_called_as_its_config(file, name):
    assert name_of(file) == name


def test_a_run_that_is_interrupted_and_started_again_gives_the_scores_of_an_unbroken_one(
    config, run, tmp_path, monkeypatch
):
    """Stopped at the second of its four checkpoints."""
    made = config(rows=("s6la",), seeds=(3,))
    unbroken = run(made, tmp_path / "unbroken")
    saves, save = [], Checkpoints.save

    def stopping(self, *arguments):
        save(self, *arguments)
        saves.append(self)
        if len(saves) == 2:
            raise Stopped(int(self.last))

    monkeypatch.setattr(Checkpoints, "save", stopping)
    with pytest.raises(Stopped):
        run(made, tmp_path / "stopped")
    assert not list((tmp_path / "stopped").rglob("results.json"))
    resumed = run(made, tmp_path / "stopped")
    assert len(saves) == 4
    ours, theirs = (runs_of(found, "s6la")["3"] for found in (resumed, unbroken))
    assert ours["scores"] == theirs["scores"]
    assert ours["seconds"] > 0


def test_the_command_ends_with_what_failed(command, tmp_path):
    """At a rate of 1e30 a network is infinite after a step."""
    fields = {"seeds": "(0,)", "data_dir": ""}
    for row in aggregation.METHODS["deit"]:
        run = f"tables.cifar10_deit.rows.{row}.run"
        fields |= {f"{run}.data.name": "digits", f"{run}.data.resolution": 8, f"{run}.batch_size": 256}
        fields |= {f"{run}.epochs": 1.0, f"{run}.model.d_model": 48}
        fields |= {f"{run}.model.{name}": NETWORK[name] for name in ("img_size", "patch_size", "depth")}
        fields |= {f"{run}.optimizer.lr": 1e30, f"{run}.optimizer.warmup_epochs": 0.0}
    process = command("experiments.sweep", config="configs/sweeps/aggregation.py:cifar10_deit,quick", tiny=False)
    done = process.run(
        f"--workdir={tmp_path}/runs",
        f"--results={tmp_path}/results",
        "--shard=1/5",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    )
    assert done.returncode == 1, done.stderr
    assert "error: 1 runs failed: cifar10_deit/plain/seed_0. Each has an error.txt." in done.stderr
    assert "Traceback" not in done.stderr
    assert "NonFiniteLossError" in (tmp_path / "runs/cifar10_deit/plain/seed_0/error.txt").read_text()
    assert [*results.load(tmp_path / "results")] == ["aggregation_cifar10_deit_quick"]


def test_an_interrupted_write_leaves_the_runs_of_the_others(config, run, trained, tmp_path):
    """Another process may just have made a run's folder, and not yet written its config."""
    (tmp_path / "runs/digits/s6la/seed_1").mkdir(parents=True)
    run(config(), shard=(1, 4))
    assert trained == RUNS[:1]


SWEEPS = {
    "zero_shot": zero_shot.get_config,
    "progressive": progressive.get_config,
    "tiny_imagenet": tiny_imagenet.get_config,
    "video": video.get_config,
    "aggregation": aggregation.get_config,
    "aggregation:quick": lambda: aggregation.get_config("quick"),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_all_rows_are_of_networks_that_there_are(name, jpeg_dir, tmp_path):
    config = SWEEPS[name]()
    config.data_dir = str(jpeg_dir)
    if "video_dir" in config:
        config.video_dir = str(standin.make("hmdb51", tmp_path))
    for table in config.tables.values():
        for row in table.rows.values():
            row.run.batch_size = 48  # there are no more than 54 images
            row.run.optimizer.warmup_epochs = 0.0
    for run in module.plan(config, jpeg_dir):
        if run.seed == 0:
            assert build(run.config).dataset.title in ("CIFAR-10, JPEG copy", "tiny_imagenet20", "HMDB-51, split 1")


@pytest.mark.parametrize("stem", ["patch", "new_s4nd_patch"])
def test_weights_that_do_not_fit_are_noticed_before_the_first_run(stem, jpeg_dir, tmp_path):
    config = video.get_config()
    config.data_dir, config.video_dir = str(jpeg_dir), str(standin.make("hmdb51", tmp_path))
    config.tables.images.rows.s4nd.run.model.stem = stem
    for table in config.tables.values():
        for row in table.rows.values():
            row.run.batch_size = 48  # there are no more than 54 images
            row.run.optimizer.warmup_epochs = 0.0
    wrong = r"^config\.tables\.videos\.rows\.s4nd\.weights_of='images/s4nd': .*: stem\.conv\.bias is missing"
    fits = contextlib.nullcontext() if stem == "patch" else pytest.raises(ConfigError, match=wrong)
    with fits:
        assert len(module._check(module.plan(config, tmp_path / "runs"))) == 5


def test_tables_and_rows_keep_their_order():
    config = aggregation.get_config()
    assert list(config.tables) == aggregation.TABLES
    assert list(config.tables.cifar10_deit.rows) == [*aggregation.METHODS["deit"]]
    assert list(zero_shot.get_config("8").tables.from_8.rows)[:2] == ["conv2d", "s4nd_legs_000"]


def test_some_tables_can_be_chosen():
    assert list(aggregation.get_config("cifar10_resnet,quick").tables) == ["cifar10_resnet"]
    chosen = aggregation.get_config("cifar10_deit,tiny_imagenet20_resnet").tables
    assert list(chosen) == ["cifar10_deit", "tiny_imagenet20_resnet"]
    assert list(zero_shot.get_config("32,8").tables) == ["from_8", "from_32"]


def test_unknown_words_are_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"takes quick and any of cifar10_resnet, .*tiny_imagenet20_deit, got 'qick'"):
        aggregation.get_config("cifar10_resnet,qick")
    with pytest.raises(ValueError, match=r"takes any of 8, 16, 32, got '64'"):
        zero_shot.get_config("64")
