"""The scripts in launch/, with programs in place of gcloud, xpk, sbatch and others that note how they were called.

Those of gcloud and sbatch also do what counts here of the real ones: they pass a command line on to hosts, which are
folders, and run a job.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not shutil.which("flock"), reason="hosts are Linux machines, which have flock")

AWKWARD = (
    "--config=configs/s4nd/digits.py",
    '--workdir=runs/it\'s "mine"  $HOME',
    "--config.model.name=`id`\\$(id)${x}",
    "--config.weights=",
    "--config.data.dir=a;b|c&d>e<f*?[g]{1,2}~!#(h)\ti",
    "--config.data.name=ü--",
    "-- --help",
)
"""Arguments of experiments.train that shells would like to change."""

SIMPLE = ("--", "--config=configs/s4nd/digits.py", "--workdir=gs://bucket/run")

NOTE = f"""#!{sys.executable} -IS
import json, os, subprocess, sys
name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["NOTES"], "a") as notes:
    print(json.dumps([name, *argv]), file=notes)
"""
"""The beginning of programs in place of others."""

PROGRAMS = {
    # What ssh does with a command line: the words that gcloud makes of it are joined again. Hosts are folders.
    "gcloud": """
hosts = [h for h in sorted(os.listdir(os.environ["HOSTS"])) if f"--worker={h}" in argv or "--worker=all" in argv]
if argv[2:4] == ["queued-resources", "describe"]:
    states = open(os.environ["STATES"]).read().split("\\n")
    open(os.environ["STATES"], "w").write("\\n".join(states[1:]))
    print(states[0])
elif argv[2:4] == ["tpu-vm", "scp"] and "--recurse" not in argv:
    for host in hosts:
        subprocess.run(["cp", argv[4], os.path.join(os.environ["HOSTS"], host, argv[5].partition(":")[2])], check=True)
elif argv[2:4] == ["tpu-vm", "ssh"]:
    command = " ".join(next(a for a in argv if a.startswith("--command=")).removeprefix("--command=").split(" "))
    for host in hosts:
        home = os.path.join(os.environ["HOSTS"], host)
        path = f"{home}/bin:" + os.environ["PATH"]
        ended = subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {"HOME": home, "PATH": path})
        if ended.returncode:
            sys.exit(ended.returncode)
""",
    "sbatch": """
job = next(i for i, a in enumerate(argv) if not a.startswith("--"))
os.chdir(next(a for a in argv if a.startswith("--chdir=")).removeprefix("--chdir="))
sys.exit(subprocess.run(["bash", *argv[job:]], env=os.environ | {"SLURM_JOB_ID": "7"}).returncode)
""",
    "srun": """
command = next(i for i, a in enumerate(argv) if not a.startswith("--"))
sys.exit(subprocess.run(argv[command:]).returncode)
""",
    "docker": "sys.stdin.read() if argv[0] == 'build' else None",
    # The next round of a loop begins when nothing trains any more.
    "sleep": """
for host in os.listdir(os.environ["HOSTS"]):
    lock = os.path.join(os.environ["HOSTS"], host, "ssm_jax/train.lock")
    if os.path.exists(lock):
        subprocess.run(["flock", lock, "true"])
""",
    "xpk": "",
    "kubectl": "",
    "scontrol": "",
}

PYTHON = """
import signal, time
if argv[:2] == ["-m", "experiments.train"]:
    if os.environ.get("TRAINS_UNTIL_STOPPED"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("training with", os.environ.get("JAX_PLATFORMS"), flush=True)
    if os.environ.get("TRAINS_UNTIL_STOPPED"):
        while True:
            time.sleep(0.05)
    statuses = open(os.environ["STATUSES"]).read().split()
    open(os.environ["STATUSES"], "w").write(" ".join(statuses[1:]))
    sys.exit(int(statuses[0]) if statuses else 0)
"""
"""Trains, as long or with the status that the test says."""

UV = """
if argv[0] == "venv":
    os.makedirs(".venv/bin", exist_ok=True)
    subprocess.run(["cp", os.environ["PYTHON"], ".venv/bin/python"], check=True)
"""


def write_program(path, body=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NOTE + body)
    path.chmod(0o755)


class Place:
    """A checkout with the scripts, two hosts, and programs that note how they were called."""

    def __init__(self, folder):
        self.checkout, self.hosts, self.notes = folder / "a checkout", folder / "hosts", folder / "notes"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / ".gitignore").write_text(".venv/\nruns/\n")
        git = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.org"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Scripts"]):
            subprocess.run([*git, *command], cwd=self.checkout, check=True)
        for name, body in PROGRAMS.items():
            write_program(folder / "bin" / name, body)
        write_program(folder / "python", PYTHON)
        write_program(self.checkout / ".venv/bin/python", PYTHON)
        for host in "01":
            write_program(self.hosts / host / "bin/python3")
            write_program(self.hosts / host / ".local/bin/uv", UV)
        self.states, self.statuses = folder / "states", folder / "statuses"
        self.states.write_text("ACTIVE")
        self.statuses.touch()
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "NOTES": str(self.notes),
            "HOSTS": str(self.hosts),
            "STATES": str(self.states),
            "STATUSES": str(self.statuses),
            "PYTHON": str(folder / "python"),
        }

    def run(self, *command, **environment):
        """What a command answers. Words with a slash at the beginning of it are scripts of the checkout."""
        return subprocess.run(
            command, cwd=self.checkout, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )

    def noted(self):
        """Calls since the last time, of all but the programs on hosts."""
        calls = [json.loads(line) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return calls

    def wait(self, holds):
        """Until something holds that a process in the background sees to."""
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def trained(calls):
    """Arguments of experiments.train, for each time that it was started."""
    return [call[3:] for call in calls if call[:3] == ["python", "-m", "experiments.train"]]


CALLS = {
    "create": ("tpu.sh", "create", "--name=pod", "--type=v5litepod-16", "--spot", "--network=a b"),
    "train": ("tpu.sh", "train", "--name=pod", "--project=it's mine", "--", *AWKWARD),
    "log": ("tpu.sh", "log", "--name=pod"),
    "fetch": ("tpu.sh", "fetch", "--name=pod", "--from=runs/a b"),
    "fetch from a bucket": ("tpu.sh", "fetch", "--name=pod", "--from=gs://bucket/run"),
    "delete": ("tpu.sh", "delete", "--name=pod"),
    "xpk train": (
        *("xpk.sh", "train", "--name=run", "--cluster=c", "--type=v5litepod-16", "--image=registry/ssm jax"),
        *("--slices=2", "--storage=a b", "--", *AWKWARD),
    ),
    "xpk log": ("xpk.sh", "log", "--name=run"),
    "xpk delete": ("xpk.sh", "delete", "--name=run", "--cluster=c", "--zone=us-west4-a"),
    "slurm": ("slurm.sh", "--nodes=2", "--gpus-per-node=h100:8", "--comment=two words", "--", *AWKWARD),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_dry_run_prints_the_commands_that_a_run_runs(place, call):
    script, *arguments = call
    printed = place.run(f"launch/{script}", "--dry-run", *arguments)
    assert printed.returncode == 0, printed.stderr
    assert place.noted() == []
    (place.hosts / "0/ssm_jax").mkdir()
    (place.hosts / "0/ssm_jax/train.log").touch()

    def run(*command):
        # `log` does not end by itself.
        process = place.run("timeout", "0.5" if call[1] == "log" else "60", *command)
        assert process.returncode in ((0, 124) if call[1] == "log" else (0,)), process.stderr
        place.wait(lambda: place.run("flock", "-n", str(place.hosts / "0/ssm_jax/train.lock"), "true").returncode == 0)
        calls = place.noted()
        return [c for c in calls if c[0] not in ("python", "uv", "python3", "srun") and "describe" not in c]

    pasted = run("bash", "-c", printed.stdout)
    assert pasted
    assert run(f"launch/{script}", *arguments) == pasted


def test_help_is_the_head_of_the_script(place):
    for script in ("tpu.sh", "xpk.sh", "slurm.sh"):
        helped = place.run(f"launch/{script}", "--help")
        assert (helped.returncode, helped.stderr) == (0, "")
        assert f"launch/{script}" in helped.stdout
        assert "shellcheck" not in helped.stdout
        assert not re.search("^#", helped.stdout, re.MULTILINE)


MISTAKES = [
    ("tpu.sh", "'' is not create, train,"),
    ("tpu.sh start", "'start' is not create, train,"),
    ("tpu.sh create pod", "unexpected argument 'pod'"),
    ("tpu.sh create --type=v6e-8", "--name=... is missing"),
    ("tpu.sh create --name=pod", "--type=... is missing"),
    ("tpu.sh create --name=pod --type=h100", "--type=h100: the TPUs"),
    ("tpu.sh create --name=pod --typ=v6e-8", "--type=... is missing"),
    ("tpu.sh stop --name=pod --worker=1", "unexpected argument '--worker=1'"),
    ("tpu.sh create --name pod", "--name needs a value: --name=VALUE"),
    ("tpu.sh create --name= --type=v6e-8", "--name= is empty"),
    ("tpu.sh create --name=pod --type=v6e-8 --spot=yes", "--spot takes no value"),
    ("tpu.sh train --name=pod", "--config=... is missing after --"),
    ("tpu.sh train --name=pod -- --config=a", "--workdir=... is missing after --"),
    ("tpu.sh train --name=pod --config=a --workdir=b", "unexpected argument '--config=a'"),
    ("tpu.sh train --name=pod --commit=nonsense -- --config=a --workdir=b", "--commit=nonsense is no commit"),
    ("tpu.sh fetch --name=pod", "--from=... is missing"),
    ("tpu.sh keep --name=pod -- --config=a --workdir=b", "--type=... is missing"),
    ("tpu.sh keep --name=pod --type=a -- --config=a --workdir=b", "--type=a: the TPUs"),
    ("xpk.sh", "'' is not train, log or delete"),
    ("xpk.sh train --name=a --type=v6e-8 --image=b -- --config=a --workdir=b", "--cluster=... is missing"),
    ("xpk.sh train --name=a --cluster=c --type=v6e-8 --image=b", "--config=... is missing after --"),
    ("xpk.sh delete --cluster=c", "--name=... is missing"),
    ("xpk.sh log run", "unexpected argument 'run'"),
    ("xpk.sh log --name=run --follow", "unexpected argument '--follow'"),
    ("slurm.sh --nodes=2", "--config=... is missing after --"),
    ("slurm.sh --gpus-per-node 8 -- --config=a --workdir=b", "--gpus-per-node needs a value"),
    ("slurm.sh --gpus-per-node=h100 -- --config=a --workdir=b", "--gpus-per-node=h100: not a number"),
    ("slurm.sh --gres=gpu:8 -- --config=a --workdir=b", "--gres=gpu:8: there is one process per GPU"),
    ("slurm.sh 4 -- --config=a --workdir=b", "unexpected argument '4'"),
]


def test_mistakes_are_answered_before_anything_is_run(place):
    for command, message in MISTAKES:
        answer = place.run("bash", "-c", f"launch/{command}")
        assert (answer.returncode, answer.stdout) == (2, ""), command
        assert re.fullmatch(f"error: [^\n]*{re.escape(message)}[^\n]*\n", answer.stderr), (command, answer.stderr)
    assert place.noted() == []


def test_slurm_needs_an_environment_that_is_installed(place):
    shutil.rmtree(place.checkout / ".venv")
    answer = place.run("launch/slurm.sh", *SIMPLE)
    assert answer.returncode == 2
    assert "make .venv/installed ACCELERATOR=gpu" in answer.stderr


def test_all_hosts_of_a_tpu_get_the_commit_and_the_arguments(place):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=place.checkout, capture_output=True, text=True).stdout
    with (place.checkout / "launch/tpu.sh").open("a") as script:
        script.write("# not committed\n")
    answer = place.run("launch/tpu.sh", "train", "--name=pod", "--", *AWKWARD, "--config.seed=1\n2")
    assert answer.returncode == 0, answer.stderr
    assert "not committed stay behind" in answer.stderr
    for host in "01":
        place.wait((place.hosts / host / "ssm_jax/train.status").exists)
    calls = place.noted()
    assert trained(calls) == [[*AWKWARD, "--config.seed=1\n2"]] * 2
    assert ["uv", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[tpu]"] in calls
    for host in "01":
        installed = place.hosts / host / "ssm_jax/launch/tpu.sh"
        assert installed.read_text() == (ROOT / "launch/tpu.sh").read_text()
        assert os.access(installed, os.X_OK)
        assert (place.hosts / host / "ssm_jax/train.log").read_text() == "training with tpu,cpu\n"
    (archive,) = place.hosts.parent.glob("ssm_jax-*.tar.gz")
    assert archive.name == f"ssm_jax-{commit[:12]}.tar.gz"
    with tarfile.open(archive) as files:
        assert ".venv" not in files.getnames()


def test_training_on_a_tpu_goes_on_until_it_is_stopped(place):
    def tpu(action, *arguments):
        return place.run("launch/tpu.sh", action, "--name=pod", *arguments, TRAINS_UNTIL_STOPPED="1")

    def statuses():
        return [line.rpartition(": ")[2] for line in tpu("status").stdout.splitlines()]

    assert tpu("train", *SIMPLE).returncode == 0
    logs = [place.hosts / host / "ssm_jax/train.log" for host in "01"]
    place.wait(lambda: all("training" in log.read_text() for log in logs))
    assert statuses() == ["running"] * 2

    again = tpu("train", *SIMPLE)
    assert again.returncode == 2
    assert "is training already; stop that first" in again.stderr
    assert statuses() == ["running"] * 2

    assert tpu("stop").returncode == 0
    assert statuses() == ["75"] * 2
    assert tpu("stop").returncode == 0
    assert tpu("train", *SIMPLE).returncode == 0
    place.wait(lambda: all(log.read_text().count("training") == 2 for log in logs))
    for host in "01":  # as when the host goes down
        os.killpg(int((place.hosts / host / "ssm_jax/train.pid").read_text()), signal.SIGKILL)
    place.wait(lambda: statuses() == ["not running"] * 2)


def kept(place, states, statuses):
    """What `keep` does of creating, deleting and starting when it meets these states and statuses; how it ends."""
    place.states.write_text("\n".join(states))
    place.statuses.write_text(" ".join(statuses))
    (place.hosts / "1").rename(place.hosts.parent / "another")  # the statuses are those of one host
    ended = place.run("launch/tpu.sh", "keep", "--name=pod", "--type=v6e-8", "--spot", *SIMPLE)
    calls = []
    for call in place.noted():
        if call[:4] == ["gcloud", "compute", "tpus", "queued-resources"] and call[4] != "describe":
            calls.append(call[4])
        elif trained([call]):
            calls.append("train")
    return calls, ended


def test_keep_creates_a_preempted_tpu_again_and_goes_on_to_the_end(place):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING"]
    calls, ended = kept(place, [*states, *["ACTIVE"] * 9], ["75", "134", "1", "0"])
    assert calls == ["create", "train", "train", "delete", "create", "train", "train"]
    assert (ended.returncode, ended.stdout) == (0, "pod: done\n")


@pytest.mark.parametrize(("status", "times"), [("2", 1), ("1", 5)])
def test_keep_gives_up_when_training_cannot_succeed(place, status, times):
    calls, ended = kept(place, ["ACTIVE"] * 99, [status] * 99)
    assert calls == ["train"] * times
    assert ended.returncode == int(status)
    assert f"error: training ended with {status}: launch/tpu.sh log --name=pod" in ended.stderr


def test_the_arguments_arrive_in_the_container_of_xpk(place):
    answer = place.run("launch/xpk.sh", *CALLS["xpk train"][1:])
    assert answer.returncode == 0, answer.stderr
    call = next(call for call in place.noted() if call[0] == "xpk")
    assert {"--num-slices=2", "--max-restarts=50", "--restart-on-exit-codes=1,75"} < {*call}
    command = next(a for a in call if a.startswith("--command=")).removeprefix("--command=")
    assert "\n" not in command  # a line of a YAML block
    write_program(place.hosts.parent / "bin/python", PYTHON)
    place.run("bash", "-c", f"({command}) & PID=$!; wait $PID")
    assert trained(place.noted()) == [[*AWKWARD]]

    stopped = f"({command}) >printed & PID=$!; until [ -s printed ]; do sleep; done; kill -TERM $PID; wait $PID"
    assert place.run("bash", "-c", stopped, TRAINS_UNTIL_STOPPED="1").returncode == 75


def test_the_job_of_slurm_is_one_process_per_gpu_with_the_arguments(place):
    answer = place.run(
        *("launch/slurm.sh", "--nodes=2", "--gpus-per-node=h100:8", "--cpus-per-task=12", "--", *AWKWARD, "--x=1\n2"),
        SLURM_GPUS_ON_NODE="8",
        SLURM_CPUS_PER_TASK="12",
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "training with cuda,cpu\n"
    sbatch, srun, python = place.noted()
    job = sbatch.index(str(place.checkout / "launch/train.sbatch"))
    assert {"--nodes=2", "--gpus-per-node=h100:8", "--ntasks-per-node=8", "--cpus-per-task=12"} < {*sbatch[:job]}
    assert "--cpus-per-task=12" in srun
    assert trained([python]) == [[*AWKWARD, "--x=1\n2"]]


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
def test_a_job_goes_back_to_the_queue_when_it_was_stopped_with_its_state_saved(place, status):
    place.statuses.write_text(str(status))
    assert place.run("launch/slurm.sh", *SIMPLE).returncode == status
    requeued = [call for call in place.noted() if call[0] == "scontrol"]
    assert requeued == ([["scontrol", "requeue", "7"]] if status == 75 else [])


def test_the_commands_of_the_docs_are_understood(place):
    page = (ROOT / "docs/pods.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    (launch/(?!detached).*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert {Path(shlex.split(command)[0]).name for command in commands} == {"tpu.sh", "xpk.sh", "slurm.sh"}
    for command in commands:
        script, *arguments = shlex.split(command)
        answer = place.run(script, "--dry-run", *arguments)
        assert answer.returncode == 0, (command, answer.stderr)
        for config in re.findall(r"--config=(\S+\.py)", command):
            assert (ROOT / config).is_file()


def test_the_image_has_a_supported_python_and_an_extra_that_there_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    (version,) = re.findall(r"^FROM python:([\d.]+)-slim$", dockerfile, re.MULTILINE)
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    (extra,) = re.findall(r"-e '\.\[(\w+)\]'", dockerfile)
    assert f"-e '.[{extra}]'" in (ROOT / "launch/tpu.sh").read_text()
    assert extra in project["optional-dependencies"]
    assert (ROOT / re.findall(r"-c (\S+)", dockerfile)[0]).is_file()
