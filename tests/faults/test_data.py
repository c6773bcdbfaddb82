"""A damaged record of a dataset: another one takes its place, in an interrupted run the same one."""

import re
import shutil

import pytest

pytestmark = pytest.mark.faults
PROCESSES = 1


@pytest.fixture(scope="module")
def fields(fields, cifar10_dir, tmp_path_factory):
    """A CIFAR-10 of 60 images, of which one is damaged in the file that has all of them."""
    folder = tmp_path_factory.mktemp("data") / "damaged"
    shutil.copytree(cifar10_dir, folder)
    (file,) = folder.glob("cifar10/*/*-train.array_record-*")
    data = bytearray(file.read_bytes())
    images = [found.start() for found in re.finditer(b"\x89PNG", data)]
    assert len(images) == 60
    data[images[30] + 40] ^= 1
    file.write_bytes(data)
    return fields | {
        "data.name": "cifar10",
        "data.dir": folder,
        "data.resolution": 8,
        "data.max_broken": 0.02,
        "batch_size": 18,  # of 54, as the others are for validation: 3 steps per epoch, 76 in all
        "epochs": 76 / 3,
        "checkpoint_every_epochs": 19 / 3,
        "eval.every_epochs": 38 / 3,
    }


def test_damaged_record(run, undisturbed):
    run.row["fault"] = "damaged record of a dataset; then kill -9"
    told = r"example \d+ of .+ cannot be read, 1 of 54 examples so far\."
    assert re.fullmatch(f"0: {told}", undisturbed.row["saw"])
    run.start()
    run.hold(lambda: run.step >= 45).kill()
    ((_, _, errors),) = run.ended()
    assert len(re.findall(told, errors)) == 1
    run.row["saw"] = undisturbed.row["saw"]
    run.goes_on(undisturbed)
