import json
import subprocess

import pytest

from benchmarks import compile_matrix
from benchmarks.compile_matrix import compile_cell, file_of, imagenet_recipes, markdown

CONVNEXT, VIT = "s4nd/imagenet_convnext.py", "s4nd/imagenet_vit_b16.py"


def stage(needed, **fields):
    return {"fits": True, "needed": needed, "state": 3e6, "batch_size": 4096, "seconds": 0.0123, "mfu": 0.456} | fields


def save(folder, recipe, topology, *stages):
    file_of(folder, recipe, topology).write_text(json.dumps({"topology": topology, "stages": stages}))


def test_the_table_has_the_cells_that_there_are(tmp_path):
    save(tmp_path, CONVNEXT, "v5e:8x8", stage(2**30), stage(3 * 2**29))
    save(tmp_path, VIT, "v4:4x4x4", stage(2**34, fits=False, largest_batch=1024))
    assert markdown(tmp_path).splitlines() == [
        "| recipe | batch | state, MB | v4:4x4x4 | v5e:8x8 |",
        "| :-- | --: | --: | --: | --: |",
        f"| {CONVNEXT} | 4,096 | 3 |  | 1.50 GiB, 12.3 ms, 46% |",
        f"| {VIT} | 4,096 | 3 | does not fit; largest batch 1,024 |  |",
    ]


def test_a_cell_that_is_there_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled"))
    save(tmp_path, CONVNEXT, "v5e:8x8", stage(2**30))
    assert compile_cell(tmp_path, CONVNEXT, "v5e:8x8").endswith(": 1.00 GiB, 12.3 ms, 46%")


def test_a_cell_is_what_the_command_leaves(tmp_path, monkeypatch):
    def run(command, **_):
        assert command[1:5] == ["-m", "experiments.compile", f"--config=configs/{VIT}", "--topology=v5e:8x8"]
        save(tmp_path, VIT, "v5e:8x8", stage(2**30))
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert "1.00 GiB" in compile_cell(tmp_path, VIT, "v5e:8x8")


def test_a_cell_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 2, "", "error: no libtpu"))
    assert "failed:\nerror: no libtpu" in compile_cell(tmp_path, VIT, "v5e:8x8")
    assert not [*tmp_path.iterdir()]


def test_all_files_for_imagenet_are_in_it_with_names_of_their_own(tmp_path):
    names = imagenet_recipes("*")
    assert {CONVNEXT, VIT, "s4nd/imagenet_convnext_s4nd.py:released", "s6la/imagenet_swin_tiny_s6la.py"} <= {*names}
    files = {file_of(tmp_path, name, topology) for name in names for topology in compile_matrix.TOPOLOGIES}
    assert len(files) == len(names) * len(compile_matrix.TOPOLOGIES)
    assert imagenet_recipes("s4nd/*vit*") == [VIT, "s4nd/imagenet_vit_s4nd.py"]
