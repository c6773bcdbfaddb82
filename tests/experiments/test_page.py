"""report.html, as a browser would see it."""

import base64
import html.parser
import json
import re
import shutil

import pytest

from experiments import page
from experiments.experiment import build
from experiments.record import recorded
from ssm_jax.training.loop import Stopped


class Seen(html.parser.HTMLParser):
    """Tags, their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def words(text):
    return " ".join(" ".join(Seen(text).text).split())


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run, to be changed; without its checkpoints, which the page does not need."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir, ignore=shutil.ignore_patterns("checkpoints"))
    return workdir


def test_a_finished_run_has_a_page(finished):
    workdir, _, scores = finished
    seen = words((workdir / "report.html").read_text())
    assert "isotropic_s4nd on scanned digits, 8 x 8" in seen
    assert f"Finished: {scores[8]['accuracy']:.2%} accuracy on 360 test images" in seen
    for resolution, score in scores.items():
        assert f"{resolution} x {resolution} {score['loss']:.4f} {score['accuracy']:.2%}" in seen
    for title in ("loss", "accuracy", "learning rate", "norms", "dt of s4nd", "|A| of s4nd", "kernels", "predictions"):
        assert f" {title} " in seen
    assert "config.model.d_model 8" in seen
    assert "ssm_c" in seen
    assert "MB per device" in seen
    assert "jax 0." in seen


def test_fields_that_are_not_the_defaults_come_first(finished):
    seen = words((finished[0] / "report.html").read_text())
    changed, all_fields = seen.split("Config ")[1].split(" Parameters ")[0].split(" all ")
    assert "config.epochs 3.0 1.0" in changed
    assert "config.seed" not in changed
    assert "config.seed 0" in all_fields
    assert "config.epochs 3.0" in all_fields


def test_a_page_needs_nothing_else(finished):
    seen = Seen((finished[0] / "report.html").read_text())
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    sources = [value for name, value in seen.attributes if name in ("src", "href")]
    assert len(sources) > 8
    for source in sources:
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.*)", source).groups()
        image = base64.b64decode(data, validate=True)
        assert image.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert "url(" not in (finished[0] / "report.html").read_text()


def test_all_text_is_escaped(copy):
    evil = "</td><script>alert('x')</script>&amp;\""
    config, run = (json.loads((copy / name).read_text()) for name in ("config.json", "run.json"))
    config["data"]["dir"] = config["model"]["name"] = evil
    config["published"] = {"value": 1.0, "metric": evil, "source": evil}
    run["starts"][0] |= {"command": evil, "outcome": evil, "platform": evil, "commit": evil, "device": evil}
    run["dataset"]["title"] = run["sharding"] = evil
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "run.json").write_text(json.dumps(run))
    (copy / "pictures" / "a<b.png").write_bytes((copy / "pictures" / "kernels.png").read_bytes())
    text = page.page(copy)
    assert "script" not in Seen(text).tags
    assert words(text).count("".join(evil.split())) >= 8


def test_a_published_number_is_marked_as_that_of_others(copy):
    config = json.loads((copy / "config.json").read_text())
    config["published"] = {"value": 98.5, "metric": "accuracy", "source": "table 3"}
    (copy / "config.json").write_text(json.dumps(config))
    seen = words(page.page(copy))
    assert "Published by others for this recipe, no result of this run: 98.5 % accuracy (table 3)." in seen


def unfinished(workdir, last, **start):
    """Makes a run one that came to the step `last`."""
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "pictures")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= last))
    run = json.loads((workdir / "run.json").read_text())
    run["starts"][0] = {k: v for k, v in run["starts"][0].items() if k not in ("end", "outcome")} | start
    (workdir / "run.json").write_text(json.dumps(run))


def test_a_run_that_still_goes_on_has_one(copy):
    unfinished(copy, 8)
    seen = words(page.page(copy))
    assert re.search(r"Step 8 of 12 \(67%\), best val/accuracy so far \d+\.\d\d%; it is running, or was killed\.", seen)
    assert "On the validation images." in seen


def test_a_run_that_has_not_begun_has_one(copy):
    unfinished(copy, 0)
    assert "Step 0 of 12 (0%); it is running, or was killed." in words(page.page(copy))


class Report:
    """What a start of a run that ends with an error leaves."""

    def __init__(self, workdir, config, error):
        experiment = build(config)
        with pytest.raises(type(error)), recorded(experiment, workdir):
            raise error
        self.start = json.loads((workdir / "run.json").read_text())["starts"][-1]
        self.seen = words((workdir / "report.html").read_text())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Stopped(8), "stopped after step 8, which is saved."),
        (ValueError("out <of> luck"), "ValueError: out <of> luck"),
    ],
)
def test_a_run_that_ends_otherwise_says_how(finished, copy, error, outcome):
    unfinished(copy, 8)
    (copy / "report.html").unlink()
    report = Report(copy, finished[1], error)
    assert report.start["outcome"] == outcome
    assert "Step 8 of 12 (67%)" in report.seen
    assert outcome.rstrip(".") in report.seen
    assert "1 earlier" in report.seen


def test_a_page_that_fails_does_not_hide_why_a_run_did(finished, copy):
    (copy / "config.json").write_text("broken")
    with pytest.raises(ZeroDivisionError), recorded(build(finished[1]), copy):
        raise ZeroDivisionError


def test_the_command_writes_it_without_looking_for_devices(finished, copy, command):
    """Which a run may have taken for itself. What is no run has no page."""
    (copy / "report.html").unlink()
    report = command("experiments.report", config="", tiny=False)
    done = report.run(f"--workdir={copy}", JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_text() == (finished[0] / "report.html").read_text()
    assert f"wrote {copy}/report.html" in done.stdout
    other = report.run(f"--workdir={copy.parent}")
    assert other.returncode == 1
    assert (
        other.stderr
        == f"error: --workdir={copy.parent} is not a run: it has no run.json, with which every run begins.\n"
    )
