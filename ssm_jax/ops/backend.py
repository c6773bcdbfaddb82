"""Which backend a program is for, where the fastest way to compute something depends on it."""

import contextlib
from collections.abc import Iterator

import jax

_TARGET = jax.make_user_context(None)  # a part of the keys of JAX's caches of traced functions


def target_backend() -> str:
    """`cpu`, `gpu` or `tpu`: what the program that is being traced is for, by default the backend in use."""
    return _TARGET.value or jax.default_backend()


@contextlib.contextmanager
def traced_for(backend: str) -> Iterator[None]:
    """In this context programs are traced for a backend that need not be there, to be compiled or run where it is."""
    with _TARGET(backend):
        yield
