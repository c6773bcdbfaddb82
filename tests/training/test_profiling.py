import contextlib

import jax
import jax.numpy as jnp
import pytest
from traces import traced

from ssm_jax.training.profiling import Trace


@jax.jit
def train_step(x):
    return x @ x


def run(folder, first, last, *, total=6):
    """Runs as `fit` does."""
    with Trace(folder, first, last) as tracing:
        x = jnp.eye(4)
        for step in range(1, total + 1):
            tracing(step, x)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                x = train_step(x)


@pytest.mark.parametrize(("first", "last"), [(2, 3), (5, 6)])
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, first, last):
    """The last ones too, after which none begins."""
    run(tmp_path, first, last)
    names, numbers = traced(tmp_path)
    assert numbers == [first, last]
    assert any("train_step" in name for name in names)


def test_other_processes_trace_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path, 2, 3)
    assert list(tmp_path.iterdir()) == []


def test_where_training_fails_the_trace_is_kept(tmp_path):
    with contextlib.suppress(ZeroDivisionError), Trace(tmp_path, 1, 2) as tracing:
        tracing(1, jnp.eye(4))
        raise ZeroDivisionError
    assert [*tmp_path.glob("plugins/profile/*/*.xplane.pb")]
