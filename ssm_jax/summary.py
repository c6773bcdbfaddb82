"""What a network costs: parameters, multiply-adds, and what its backward pass needs, from a trace; nothing is run."""

import inspect
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core
from jax.typing import DTypeLike

from ssm_jax.layers.conv import PRODUCTS


class Part(NamedTuple):
    """One row: a part of a network, or all of it."""

    name: str
    kind: str
    """Its class."""
    parameters: int
    multiply_adds: int
    """Of matrix products, convolutions and FFTs, in one forward pass of the whole batch."""
    saved_bytes: int
    """Made in the forward pass of a training step and kept for the backward pass."""


class Summary(NamedTuple):
    """The cost of a network for inputs of one shape; `print` shows it as a table."""

    parts: tuple[Part, ...]
    total: Part
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        title = f"{self.total.kind}: {self.shape} -> {self.output_shape}"
        table = Table(title=title, caption="of one forward pass of this batch; MB are what its backward pass needs")
        for column in ("part", "class"):
            table.add_column(column)
        for column in ("parameters", "multiply-adds, G", "saved, MB"):
            table.add_column(column, justify="right")
        for part in (*self.parts, self.total):
            if part is self.total:
                table.add_section()
            costs = (f"{part.parameters:,}", f"{part.multiply_adds / 1e9:.3f}", f"{part.saved_bytes / 1e6:.1f}")
            table.add_row(part.name, part.kind, *costs)
        console = Console(file=io.StringIO(), width=100)
        console.print(table)
        return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def summary(model: nnx.Module, shape: Sequence[int], *, dtype: DTypeLike = jnp.float32, **arguments: Any) -> Summary:
    """Adds up what `model(inputs, **arguments)` costs.

    ```python
    model = nnx.eval_shape(lambda: ssm_jax.create_model("convnext_tiny_s4nd", num_classes=1000, rngs=nnx.Rngs(0)))
    print(ssm_jax.summary(model, (1, 224, 224, 3)))
    ```

    Multiply-adds are of what is computed on this backend: S4ND has the method of convolution that `conv="auto"` takes
    here. A complex multiplication counts four, and an FFT of n points 2 n log2(n), half of that for real numbers.

    Args:
        model: a network of this package, or any module called with one array; it may be abstract (`nnx.eval_shape`).
        shape: of the inputs, batch first.
        dtype: of the inputs.
        **arguments: of the call, such as `rate`.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    takes_rngs = "rngs" in inspect.signature(type(model).__call__).parameters

    def forward(params: Any, rest: Any, inputs: jax.Array) -> jax.Array:
        traced = nnx.merge(graphdef, params, rest, copy=True)
        for name, part in _parts(traced):
            _replace(traced, name, _Named(part, name))
        rngs = {"rngs": nnx.Rngs(dropout=0)} if takes_rngs else {}
        return traced(inputs, **rngs, **arguments)

    inputs = jax.ShapeDtypeStruct(tuple(shape), dtype)
    jaxpr, output = jax.make_jaxpr(forward, return_shape=True)(params, rest, inputs)
    work = Counter()
    for name, count in _multiply_adds(jaxpr.jaxpr, ""):
        work[name] += count

    def backward(params: Any, rest: Any, inputs: jax.Array) -> Any:
        return jax.vjp(lambda params, inputs: forward(params, rest, inputs), params, inputs)[1]

    linear = jax.make_jaxpr(backward)(params, rest, inputs)
    saved = _saved_bytes(linear.jaxpr)

    kinds = {name: type(part).__name__ for name, part in _parts(model)}
    parameters = Counter()
    for path, variable in nnx.to_flat_state(params):
        dotted = ".".join(map(str, path))
        owner = next((name for name in kinds if dotted.startswith(f"{name}.")), dotted)
        parameters[owner] += math.prod(variable.shape)
    in_order = dict.fromkeys([*map(_scope, jaxpr.jaxpr.eqns), *parameters, *saved])
    parts = tuple(
        Part(name or "(between)", kinds.get(name, ""), parameters[name], work[name], saved[name])
        for name in in_order
        if parameters[name] or work[name] or saved[name]
    )
    totals = (sum(counter.values()) for counter in (parameters, work, saved))
    return Summary(parts, Part("all", type(model).__name__, *totals), tuple(shape), output.shape)


class _Named(nnx.Module):
    """A module whose operations carry its name."""

    def __init__(self, module: nnx.Module, name: str):
        self.module = module
        self.scope = name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with jax.named_scope(self.scope):
            return self.module(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


def _parts(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """The modules that a network consists of, by their names; those in a list each by itself."""
    parts = []
    for name, child in vars(model).items():
        if isinstance(child, nnx.List):
            parts += [(f"{name}.{i}", item) for i, item in enumerate(child) if isinstance(item, nnx.Module)]
        elif isinstance(child, nnx.Module):
            parts.append((name, child))
    return parts


def _replace(model: nnx.Module, name: str, part: nnx.Module) -> None:
    attribute, _, number = name.partition(".")
    if number:
        getattr(model, attribute)[int(number)] = part
    else:
        setattr(model, attribute, part)


def _scope(eqn: core.JaxprEqn) -> str:
    """The outermost name that an operation carries."""
    return str(eqn.source_info.name_stack).split("/")[0]


def _inner(eqn: core.JaxprEqn) -> Iterator[Any]:
    """The programs within an operation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "jaxpr"):
                yield item.jaxpr
            elif hasattr(item, "eqns"):
                yield item


def _multiply_adds(jaxpr: Any, name: str) -> Iterator[tuple[str, int]]:
    """The work of each operation, and the name of its part."""
    for eqn in jaxpr.eqns:
        part = name or _scope(eqn)
        kind = eqn.primitive.name
        shapes: list[tuple[int, ...]] = [getattr(v.aval, "shape", ()) for v in eqn.invars]
        out: tuple[int, ...] = getattr(eqn.outvars[0].aval, "shape", ()) if eqn.outvars else ()
        times = 4 if eqn.outvars and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating) else 1
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            yield part, times * math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
            yield part, math.prod(out) * math.prod(shapes[1]) // shapes[1][out_axis]
        elif kind == "mul" and str(eqn.source_info.name_stack).endswith(PRODUCTS):
            yield part, math.prod(out)
        elif kind == "fft":
            size = math.prod(eqn.params["fft_lengths"])
            batch = math.prod(shapes[0][: len(shapes[0]) - len(eqn.params["fft_lengths"])])
            complex_to_complex = eqn.params["fft_type"] in (jax.lax.FftType.FFT, jax.lax.FftType.IFFT)
            yield part, round(batch * (1 + complex_to_complex) * size * math.log2(max(size, 2)))
        repeat = eqn.params["length"] if kind == "scan" else 1
        for inner in _inner(eqn):
            for owner, count in _multiply_adds(inner, part):
                yield owner, repeat * count


def _saved_bytes(jaxpr: Any) -> Counter:
    """Bytes of what comes out of a program without having gone in, by the name of the part that made it."""
    made = {v: _scope(eqn) for eqn in jaxpr.eqns for v in eqn.outvars}
    saved = Counter()
    for v in {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}:
        if v in made:
            name = made[v].removeprefix("jvp(").rstrip(")")
            saved[name] += math.prod(v.aval.shape) * v.aval.dtype.itemsize
    return saved
