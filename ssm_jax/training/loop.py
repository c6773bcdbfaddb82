"""The training loop."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.metrics import MetricWriter, ProgressBar, Throughput
from ssm_jax.training.steps import TrainState


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


def fit(
    state: TrainState,
    *,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Any],
    evaluate: Callable[[TrainState], dict[str, float]],
    schedule: Callable[[int], Any],
    checkpoints: Checkpoints,
    writer: MetricWriter,
    progress: ProgressBar,
    batch_size: int,
    total_steps: int,
    eval_every: int,
    checkpoint_every: int,
    log_every: int,
) -> TrainState:
    """Trains from `state.step` to `total_steps`.

    Metrics are fetched from the devices every `log_every` steps and written as means since the last time. The model
    is evaluated and saved every `eval_every` steps and at the end, and also saved every `checkpoint_every` steps.

    Raises NonFiniteLossError, before anything of it is saved, if a loss or the norm of its gradient is NaN or infinite.
    """
    start = int(state.step)
    window: list[dict[str, jax.Array]] = []
    throughput = Throughput()
    for step in range(start + 1, total_steps + 1):
        state, metrics = train_step(state, next(batches))
        window.append(metrics)
        if step == start + 1:
            jax.block_until_ready(metrics)  # compiled, which is not what images per second are about
            throughput.restart()
        else:
            throughput.add(batch_size)
        evaluating = step % eval_every == 0 or step == total_steps
        saving = evaluating or step % checkpoint_every == 0
        if saving or step % log_every == 0:
            means = _means(jax.device_get(window), last_step=step, checkpoints=checkpoints)
            window.clear()
            rate = throughput.rate
            row = {f"train/{name}": value for name, value in means.items()}
            writer.write(step, row | {"train/lr": float(schedule(step - 1)), "images_per_second": rate})
            progress.update(step, loss=means["loss"], accuracy=means["accuracy"], images_per_second=rate)
        scores = None
        if evaluating:
            scores = evaluate(state)
            writer.write(step, scores)
            progress.print(
                f"step {step:,}/{progress.total_steps:,}  loss {means['loss']:.4f}  "
                + "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
                + f"  {rate:,.0f} images/s"
            )
        if saving:
            checkpoints.save(state, scores)
            throughput.restart()
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
