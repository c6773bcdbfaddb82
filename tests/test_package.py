import ast
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, *, path=(), cwd=ROOT):
    """Runs code in a fresh interpreter, and gives what it prints."""
    environment = {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


def test_importing_the_package_does_not_import_what_training_needs():
    heavy = ["orbax", "grain", "tensorflow", "tensorflow_datasets", "torch", "cv2", "matplotlib", "sklearn"]
    heavy += ["ml_collections", "tensorboardX"]
    loaded = run_python("import ssm_jax, sys; print(*sys.modules)").split()
    assert "ssm_jax.layers" in loaded
    assert [name for name in heavy if name in loaded] == []


def test_training_never_imports_tensorflow(tmp_path, cifar10_dir):
    """Where it is installed: here is a module of its name that can be imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("__version__ = '2.21.0'\n")
    code = f"""
        import sys
        import experiments.train
        from ssm_jax.data.datasets import load_dataset
        from ssm_jax.training.metrics import MetricWriter
        for split in load_dataset("cifar10", {str(cifar10_dir)!r}).splits.values():
            split[0]
        with MetricWriter({str(tmp_path)!r}) as writer:
            writer.write(1, {{"loss": 1.0}})
        print("experiments.report" in sys.modules, "tensorflow" in sys.modules)
    """
    assert run_python(textwrap.dedent(code), path=[tmp_path]).splitlines()[-1] == "True False"


def test_no_file_imports_tensorflow_or_torch():
    """At run time, tensorboardX imports torch where it is installed."""
    for folder in ["ssm_jax", "experiments", "configs"]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in imports(path):
                assert name.split(".")[0] not in ("tensorflow", "torch"), path


def test_the_package_imports_nothing_from_experiments():
    for path in sorted((ROOT / "ssm_jax").rglob("*.py")):
        for name in imports(path):
            assert name.split(".")[0] not in ("experiments", "configs", "tests"), path


def test_arrows_point_from_training_and_models_to_layers_to_ops():
    below = {
        "ops": {"ops"},
        "layers": {"layers", "ops"},
        "models": {"models", "layers", "ops"},
        "data": {"data", "ops", "plots"},
        "training": {"training", "layers", "ops", "version"},
    }
    for folder, allowed in below.items():
        for path in sorted((ROOT / "ssm_jax" / folder).rglob("*.py")):
            for name in imports(path):
                package, _, rest = name.partition(".")
                if package == "ssm_jax":
                    assert rest.split(".")[0] in allowed, f"{path} imports {name}"


def test_the_version_is_that_of_the_project():
    import ssm_jax

    assert ssm_jax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
