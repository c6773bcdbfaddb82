"""A trace of some train steps for XProf, and TensorBoard's plugin of it."""

import tempfile
from typing import Any

import jax
from etils import epath


class Trace:
    """Traces the steps `first` to `last` into `folder`; a context manager, and `tracing` of the training loop.

    What devices and host do from the beginning of the one to the end of the other, evaluations between them too. Of
    several processes the first traces, its own devices: all do the same. The trace is made in a local folder and
    copied, as `folder` may be of an object store.
    """

    def __init__(self, folder: epath.PathLike, first: int, last: int):
        """Starts nothing yet."""
        self._folder = epath.Path(folder)
        self._first, self._last = first, last
        self._local: Any = None

    def __call__(self, step: int, state: Any) -> None:
        """Is told that `step` begins, with the state before it."""
        if step == self._first and jax.process_index() == 0:
            jax.block_until_ready(state)  # of the steps before nothing is left to do
            self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)
        elif step == self._last + 1:
            jax.block_until_ready(state)
            self._stop()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._local is None:
            return
        with self._local as name:
            self._local = None
            jax.profiler.stop_trace()
            for path in epath.Path(name).glob("plugins/profile/*/*"):
                copy = self._folder / path.relative_to(name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
