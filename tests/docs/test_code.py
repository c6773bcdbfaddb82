"""The Python in README.md and the pages runs, and the commands in them are ones that their programs take."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {
    "configs/FILE": "configs/s4nd/digits.py",
    "configs/sweeps/NAME.py": "configs/sweeps/zero_shot.py",
    "mine.py": "configs/sweeps/zero_shot.py",
}


def python(code, *arguments, cwd=ROOT):
    """Runs code in a fresh interpreter, and gives what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(page):
    """Language and text of each block of code; of what is indented, the language is empty."""
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            yield token.info.strip(), token.content


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_in_the_docs_runs(page, tmp_path):
    code = [text for language, text in blocks(page) if language == "python"]
    if not code:
        pytest.skip(f"{page.name} has no Python")
    python("\n".join(code), cwd=tmp_path)


def test_the_readme_and_the_guide_have_python():
    for page in [ROOT / "README.md", ROOT / "docs" / "getting_started.md", ROOT / "docs" / "layers.md"]:
        assert "python" in [language for language, _ in blocks(page)]


@pytest.mark.slow
def test_the_sweep_in_the_guide_can_start(tmp_path):
    (code,) = (text for _, text in blocks(ROOT / "docs" / "getting_started.md") if "sweeps.sweep(" in text)
    (tmp_path / "mine.py").write_text(code)
    options = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}", f"--results={tmp_path}", "--summarize"]
    command = [sys.executable, "-m", "experiments.sweep", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0 of 2") == 3


def lines(page):
    """Command lines of a page: whole ones in blocks, and with False such as are mentioned in the text."""
    for language, text in blocks(page):
        if language in ("", "bash", "sh", "console"):
            text = text.replace("\\\n", " ")
            yield from ((line.strip().removeprefix("$ "), True) for line in text.splitlines())
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        for part in token.children or ():
            if part.type == "code_inline":
                yield part.content, False


def words(line):
    """Of a command, without its comment; `[--option]` is an option, and `...` none."""
    for name, file in PLACEHOLDERS.items():
        line = line.replace(name, file)
    found = shlex.split(re.sub(r"(^|\s)#.*", "", re.sub(r"\[(--[^\]]*)\]", r"\1", line)))
    return [word for word in found if word != "..."]


def python_commands(page):
    """Module and arguments of each `python -m MODULE`, also of what launch scripts start, and whether it is whole."""
    for line, whole in lines(page):
        if re.match(r"(\S*/)?python -m ", line):
            module, *arguments = words(line)[2:]
            if module.split(".")[0] in ("experiments", "benchmarks", "ssm_jax"):
                yield module, arguments, whole and "..." not in line
        elif re.match(r"launch/\w+\.sh .* -- ", line):
            yield "experiments.train", words(line.partition(" -- ")[2]), True


PARSE = """
import json, os, runpy, signal, sys
from absl import app, flags
import ssm_jax.models, ssm_jax.training.checkpoints, ssm_jax.data.pipeline  # once for all: the slow part


def run(main, argv=None, flags_parser=None):
    "In the place of absl's: parses the flags, and leaves it at that."
    try:
        rest = (whole and flags_parser or flags.FLAGS)(sys.argv)
    except flags.IllegalFlagValueError as error:
        if whole or "must have a value other than None" not in str(error):
            raise
    else:
        if len(rest) > 1 and module != "ssm_jax.data.prepare":
            raise SystemExit(f"unexpected {rest[1:]}")
    os._exit(0)


app.run = run
for command in json.load(sys.stdin):
    module, arguments, whole = command
    if child := os.fork():
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(*command)
    else:
        signal.alarm(60)
        try:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            print("does not parse flags:", file=sys.stderr)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
"""
"""Parses command lines by their own programs, each in a process that is left when it is done, and prints what fails."""


def refused(commands):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        cwd=ROOT,
        env=environment,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_commands_are_ones_that_their_programs_take():
    commands = {json.dumps(command): command for page in PAGES for command in python_commands(page)}
    assert len(commands) > 40
    failed, messages = refused([*commands.values()])
    assert failed == [], messages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python -m experiments.nothing", "No module named"),
        ("python -m experiments.train --workdir=runs/a", "config"),
        ("python -m experiments.train --config=configs/s4nd/gone.py --workdir=runs/a", "gone.py"),
        ("python -m experiments.train --config=configs/s4nd/digits.py --workdir=runs/a --config.gone=1", "'gone'"),
        ("python -m experiments.train --config=configs/s4nd/digits.py --workdir=a --config.epochs=many", "many"),
        ("python -m experiments.train --config=configs/s4nd/cifar10_iso_conv2d.py:9x9 --workdir=runs/a", "9x9"),
        ("python -m benchmarks.conv --channel=3", "channel"),
        ("python -m benchmarks.conv channels", "channels"),
        ("launch/slurm.sh --nodes=2 -- --config=configs/s4nd/digits.py --workdir=runs/a --gone", "gone"),
    ],
)
def test_mistakes_in_commands_are_found(tmp_path, line, message):
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n    {line}\n")
    (command,) = python_commands(page)
    (failed,), messages = refused([command])
    assert command[0] in failed
    assert message in messages


def test_files_targets_and_extras_in_commands_exist():
    known = {
        r"^make ([a-z]+)\b": re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE),
        r"^launch/(\S+\.sh)": os.listdir(ROOT / "launch"),
        r"^pip install .*\.\[(\w+)\]": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ],
    }
    for pattern, names in known.items():
        found = {name for page in PAGES for line, _ in lines(page) for name in re.findall(pattern, line)}
        assert found
        assert found <= set(names)
