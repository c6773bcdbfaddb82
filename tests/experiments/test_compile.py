"""`python -m experiments.compile`: what can be seen without a compiler for TPUs, and, where there is one, all of it."""

import importlib.util
import json
import types

import jax
import pytest
from rich.console import Console

from experiments import compile as compiling
from experiments import experiment
from experiments.compile import OutOfMemoryError, batch_sizes, examine, largest, print_report, usable_memory
from experiments.config import ConfigError
from experiments.configs import recipes
from experiments.experiment import build
from ssm_jax.chips import TPUS
from ssm_jax.topologies import tpu_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)


# The largest batch


def line(slope, start=100.0):
    return lambda size: start + slope * size


def search(sizes, need, limit, tries=4):
    """The largest of `sizes`, after at most `tries` calls of `need`."""
    calls = []

    def needed(size):
        assert size not in calls
        calls.append(size)
        return need(size)

    found = largest(sizes, needed, limit, {0: need(0), sizes[-1]: need(sizes[-1])})
    assert len(calls) <= tries
    return found


@pytest.mark.parametrize("slope", [0.5, 0.9, 3.0, 11.0])
def test_the_largest_batch_is_found_with_few_programs(slope):
    sizes = [*range(8, 4097, 8)]
    need, limit = line(slope), 1000.0
    assert search(sizes, need, limit) == max(size for size in sizes if need(size) <= limit)


def test_a_bent_line_takes_a_few_more():
    sizes = [*range(64, 16385, 64)]

    def need(size):
        return 500 + 3.0 * size + 1e-4 * size**2 + 200 * (size % 3)

    best = search(sizes, need, 16_000, tries=8)
    assert best is not None
    assert need(best) <= 16_000
    assert need(best + 64) > 16_000 or need(best + 128) > 16_000


def test_close_to_the_limit_programs_may_shrink():
    """As XLA's do, which rather computes things twice than refuse a program."""
    sizes = [*range(64, 64 * 65, 64)]

    def need(size):
        return min(10.0 * size, 15_000 + 0.1 * size) if size <= 3000 else 10.0 * size

    assert search(sizes, need, 16_000, tries=8) == 46 * 64


def test_even_the_smallest_batch_may_be_too_large():
    assert search([8, 16, 24], line(5.0), 120.0) is None


def test_the_state_alone_may_be_too_large():
    assert search([8, 16, 24], line(5.0), 90.0) is None


def test_a_search_ends(monkeypatch):
    monkeypatch.setattr(compiling, "_TRIES", 3)
    sizes = [*range(1, 10_000)]
    calls = []

    def needed(size):  # all of a sudden
        calls.append(size)
        return 10.0 if size < 7_000 else 1e9

    assert largest(sizes, needed, 100.0, {0: 10.0, 9_999: 1e9}) in calls
    assert len(calls) == 3


def test_batches_are_those_that_devices_accumulation_and_mixing_allow(tiny_config):
    assert batch_sizes(tiny_config(batch_size=40), 8) == [8, 16, 24, 32, 40]
    assert batch_sizes(tiny_config(batch_size=96, accumulate=4), 8) == [32, 64, 96]
    assert batch_sizes(tiny_config(batch_size=8 * 128), 8) == [*range(16, 1025, 16)]  # 64 are enough
    mixed = tiny_config(**{"batch_size": 80, "augment.mixup": 0.2, "augment.mix_group": 4})
    assert batch_sizes(mixed, 8) == [8, 16, 32, 64]  # 1, 2, 4 and 8 rows on each device


# Reports


class Program(jax.stages.Compiled):
    """A compiled step of a TPU."""

    def __init__(self):
        pass

    def as_text(self):
        return (
            "ENTRY %main (u: f32[8]) -> f32[8] {\n"
            "  %all-reduce.1 = f32[50]{0} all-reduce(%u), replica_groups=[1,8]<=[8], "
            'metadata={op_name="jit(step)/sum"}\n'
            '  ROOT %e = f32[8]{0} copy(%u), backend_config={"estimated_cycles":"1500000"}\n'
            "}\n"
        )

    def cost_analysis(self):
        return {"flops": 2e9, "bytes accessed": 8.19e8}

    def memory_analysis(self):
        return types.SimpleNamespace(
            argument_size_in_bytes=3 * 2**20,
            output_size_in_bytes=2**20,
            alias_size_in_bytes=2**20,
            temp_size_in_bytes=2**30,
            generated_code_size_in_bytes=2**20,
        )


@pytest.fixture
def compiler(monkeypatch):
    """Compiles nothing, and gives every step a GiB and more, or refuses those with more than 96 rows."""
    batches = []

    def compile_for(lowered):
        (_, batch), _ = lowered.in_avals
        batches.append(rows := batch["image"].shape[0])
        if rows > 96:
            raise OutOfMemoryError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
                f"({rows / 48:.2f}G) exceeds available HBM (2.00G)."
            )
        return Program()

    monkeypatch.setattr(compiling, "compile_for", compile_for)
    monkeypatch.setattr(compiling, "usable_memory", lambda device: 2 * 2**30)
    for module in (compiling, experiment):
        monkeypatch.setattr(module, "chip", lambda kind: TPUS["v5e"])
    return batches


def test_a_step_that_fits_is_reported(tiny_config, compiler, capsys):
    config = tiny_config(batch_size=64)
    found = examine(config, jax.devices(), 0)
    assert compiler == [64]
    assert found["fits"]
    assert found["needed"] == 2**30 + 4 * 2**20
    assert found["seconds"] == pytest.approx(1.5e6 / 1.5e9)
    assert found["collectives"] == [
        {"kind": "all-reduce", "count": 1, "bytes": 200, "sent": 350, "largest": "jit(step)/sum"}
    ]
    assert found["bounds"]["traffic"] == pytest.approx(1e-3)
    assert found["bounds"]["collectives"] == pytest.approx(350 / 200e9)
    assert found["mfu"] == pytest.approx(found["model_flops"] / 8 / 197e12 / 1e-3)
    json.dumps(found)
    print_report(Console(width=120), found)
    text = capsys.readouterr().out
    for words in ("fits: 1.00 GiB of the 2.00 GiB", "1.00 ms", "all-reduce", "opt state", "not measurements"):
        assert words in text


def test_a_step_that_does_not_fit_comes_with_the_largest_that_does(tiny_config, compiler, capsys):
    said = []
    found = examine(tiny_config(batch_size=512), jax.devices(), 0, said.append)
    assert not found["fits"]
    assert found["needed"] >= 512 / 48 * 2**30
    assert (found["largest_batch"], found["refused_batch"]) == (96, 104)
    assert {96, 104, 512} <= {*compiler}
    assert said[-1].startswith(f"batch {compiler[-1]} ")
    assert "--config.accumulate=8" in found["remedies"]  # the fewest equal parts of at most 96
    assert "--config.dtype=bfloat16" in found["remedies"]
    print_report(Console(width=120), found)
    text = capsys.readouterr().out
    for words in ("does not fit", "largest batch that fits: 96; 104 does not", "--config.accumulate=8"):
        assert words in text


def test_remedies_are_of_fields_that_the_network_has(tiny_config, compiler):
    tiny = tiny_config(**{"batch_size": 512, "dtype": "bfloat16"})
    assert not any("remat" in remedy or "dtype" in remedy for remedy in examine(tiny, jax.devices(), 0)["remedies"])


def test_numbers_are_read_from_what_the_compiler_says():
    error = OutOfMemoryError("Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.")
    assert (error.needed, error.usable) == (18.5 * 2**30, 15.75 * 2**30)
    error = OutOfMemoryError("the total memory required (512.25M) exceeds available HBM (300K).")
    assert (error.needed, error.usable) == (512.25 * 2**20, 300 * 2**10)


# Experiments without data


@pytest.mark.parametrize(
    "name", ["s4nd/celeb_a_convnext.py:64", "s4nd/hmdb51_s3d.py", "s4nd/cifar10_progressive_8.py:small"]
)
def test_an_experiment_needs_no_data_to_be_described(name):
    config = next(recipe.config for recipe in recipes() if recipe.name == name)
    config.batch_size = 64
    described = build(config, files=False)
    images = described.abstract_batch["image"]
    assert images.sharding.shard_shape(images.shape)[0] == 8
    assert described.abstract_state.step.shape == ()
    assert described.total_steps > 100


def test_an_experiment_may_have_some_of_the_devices(tiny_config):
    assert build(tiny_config(), devices=jax.devices()[:2]).mesh.size == 2


def test_smoke_runs_can_be_compiled_too(tiny_config):
    assert build(tiny_config(smoke=True), files=False, devices=jax.devices()[:4]).mesh.size == 4


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": "v5e:8"}, r"^--topology must be CHIP:AxB"),
        ({"topology": "v5e:8x8", "slices": 0}, r"^--slices must be at least 1"),
        ({"topology": "v5e:8x8"}, r"pip install -e '\.\[tpu\]'"),
    ],
)
def test_mistakes_are_answered_at_once(tiny_config, arguments, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        compiling.run(tiny_config(), **arguments)


@needs_libtpu
def test_a_run_compiles_for_a_slice(command, tmp_path):
    run = command("experiments.compile").run("--topology=v5e:2x2", f"--out={tmp_path}/found.json")
    assert run.returncode == 0, run.stderr
    assert "fits" in run.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    (stage,) = found["stages"]
    assert stage["parts"]["donated"] > 0.9 * stage["parts"]["results"]
    assert {row["kind"] for row in stage["collectives"]} == {"all-reduce"}
    assert 0 < stage["mfu"] < 1


@needs_libtpu
def test_devices_have_almost_the_memory_of_their_chips():
    assert 0.9 < usable_memory(tpu_devices("v5e:2x2")[0]) / TPUS["v5e"].memory < 1
