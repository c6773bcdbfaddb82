"""The training loop."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.metrics import MetricWriter, ProgressBar, Throughput, memory
from ssm_jax.training.scores import is_detail
from ssm_jax.training.steps import TrainState

_AHEAD = 4
"""Steps that may wait for the devices: enough to keep them busy, and batches in their memory."""


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


class Stopped(Exception):  # noqa: N818  (not an error)
    """Training was asked to stop; the state after `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step:,}, which is saved.")
        self.step = step


def fit(
    state: TrainState,
    *,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Any],
    evaluate: Callable[[TrainState], dict[str, float] | None],
    schedule: Callable[[int], Any],
    checkpoints: Checkpoints,
    writer: MetricWriter,
    progress: ProgressBar,
    batch_size: int,
    total_steps: int,
    eval_every: int,
    checkpoint_every: int,
    log_every: int,
    stopping: Callable[[int], bool] = lambda step: False,
    tracing: Callable[[int, TrainState], None] = lambda step, state: None,
    throughput: Throughput | None = None,
) -> TrainState:
    """Trains from `state.step` to `total_steps`.

    Metrics are fetched from the devices every `log_every` steps and written as means since the last time. The model
    is evaluated and saved every `eval_every` steps and at the end, and also saved every `checkpoint_every` steps.
    `stopping` is asked once after each step, after the evaluation where there is one; `evaluate` may ask it amid an
    evaluation, and gives None if it is to stop: the state is then saved without scores. `tracing` is told the number of
    each step before it begins, and the state, see `ssm_jax.training.profiling.Trace`.

    Raises:
        NonFiniteLossError: before anything of it is saved, if a loss or the norm of its gradient is NaN or infinite.
        Stopped: as soon as `stopping(step)` holds, once the state after that step has been saved to the end.
    """
    start = int(state.step)
    window: list[dict[str, jax.Array]] = []
    throughput = throughput or Throughput()
    for step in range(start + 1, total_steps + 1):
        tracing(step, state)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            with throughput.waiting(), jax.profiler.TraceAnnotation("wait for input"):
                batch = next(batches)
            state, metrics = train_step(state, batch)
        window.append(metrics)
        if len(window) > _AHEAD:
            jax.block_until_ready(window[-_AHEAD - 1])
        if step == start + 1:
            jax.block_until_ready(metrics)  # compiled, which is not what images per second are about
            throughput.restart()
        else:
            throughput.add(batch_size)
        evaluating = step % eval_every == 0 or step == total_steps
        stop = not evaluating and stopping(step)
        saving = evaluating or stop or step % checkpoint_every == 0
        if saving or step % log_every == 0:
            means = _means(jax.device_get(window), last_step=step, checkpoints=checkpoints)
            window.clear()
            rates = throughput.row
            rate = rates.get("images_per_second", math.nan)
            row = {f"train/{name}": value for name, value in means.items()}
            writer.write(step, row | {"train/lr": float(schedule(step - 1))} | rates | memory())
            progress.update(step, means, images_per_second=rate)
            throughput.restart()
        scores = None
        if evaluating:
            scores = evaluate(state)
            stop = scores is None
        if scores is not None:
            writer.write(step, scores)
            progress.print(
                f"step {step:,}/{progress.total_steps:,}  loss {means['loss']:.4f}  "
                + "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if not is_detail(name))
                + ("" if math.isnan(rate) else f"  {rate:,.0f} images/s")
            )
        if saving:
            writer.flush()
            checkpoints.save(state, scores)
            throughput.restart()
        if stop or (evaluating and stopping(step)):
            assert checkpoints.last == step  # which waits for it
            raise Stopped(step)
    return state


def _means(window: list[dict[str, Any]], *, last_step: int, checkpoints: Checkpoints) -> dict[str, float]:
    for step, metrics in enumerate(window, start=last_step - len(window) + 1):
        bad = [name for name in ("loss", "grad_norm") if not np.isfinite(metrics[name])]
        if bad:
            last = checkpoints.last
            kept = "no checkpoint was saved yet" if last is None else f"the checkpoint of step {last} is kept"
            raise NonFiniteLossError(
                f"the {bad[0]} is {metrics[bad[0]]} at step {step}; {kept}. Try a lower config.optimizer.lr or "
                "config.optimizer.ssm_lr, a longer config.optimizer.warmup_epochs, config.optimizer.clip_norm=1.0, or "
                "config.dtype=float32, in a new --workdir."
            )
    return {name: float(np.mean([metrics[name] for metrics in window])) for name in window[0]}
