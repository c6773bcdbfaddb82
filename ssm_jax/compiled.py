"""Reading compiled programs: which collectives they run, what they take of memory, and XLA's estimate of their time.

Programs are HLO text, `jax.stages.Compiled.as_text()`, as XLA's compilers for CPUs, GPUs and TPUs write it: of one
device, of which all run the same.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
"""Of collectives."""


class Collective(NamedTuple):
    """An operation in which devices exchange data."""

    kind: str
    bytes: int
    """Of the whole array on one device: what an all-gather gives, what a reduce-scatter takes."""
    devices: int | None
    """That exchange with each other; None where they are pairs, or not told."""
    count: float
    """Times that the program runs it; nan in a loop whose turns are not known."""
    op_name: str
    """The operation in JAX that it comes from."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends, at least, whatever the algorithm, all times together."""
        share = 1.0 if self.devices is None else 1 - 1 / self.devices
        return self.count * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Memory(NamedTuple):
    """Bytes that a program takes on each device."""

    arguments: int
    results: int
    donated: int
    """Of the results, those that lie where arguments were."""
    temporary: int
    code: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.arguments + self.results - self.donated + self.temporary + self.code


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Reads off what a program takes."""
    found: Any = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def collectives(hlo: str) -> tuple[Collective, ...]:
    """All collectives of a program, in its order; those in two halves, `-start` and `-done`, are one.

    TPU programs have two forms of their own: an all-reduce in a fusion called all-reduce-scatter, of which each device
    keeps a part, is a reduce-scatter, and one that is spread over several fusions, beside products, is one.
    """
    found, spread = [], set()
    for step in _run(_computations(hlo), calls=True):
        kind = step.opcode.removesuffix("-done")
        if kind not in KINDS:
            continue
        text = step.start if step.opcode.endswith("-done") else step.text
        if "async_collective_fusion_config" in text:
            piece = (step.caller, *re.findall(r'channel_id=\d+|chain_id="\d+"', text))
            if piece in spread:
                continue
            spread.add(piece)
        devices = _group_size(text)
        size = _bytes(step.type)
        if kind == "reduce-scatter":
            size *= devices or 1
        if step.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        names = [re.search(r'op_name="([^"]*)"', source) for source in (text, step.text, step.call)]
        found.append(Collective(kind, size, devices, step.times, next((name[1] for name in names if name), "")))
    return tuple(found)


def scheduled_cycles(hlo: str) -> float:
    """Sums `estimated_cycles` over the operations of a scheduled TPU program, with loops as often as they run.

    What runs beside them, such as prefetches and collectives, has no estimate and counts nothing. A loop whose turns
    are not known counts as one turn: see `open_loops`.
    """
    return sum(
        step.times * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', step.text)))
        for step in _run(_computations(hlo), calls=False, unknown=1.0)
    )


def open_loops(hlo: str) -> int:
    """The number of loops in a program that run until something is so, for a number of turns that is not known."""
    computations = _computations(hlo)
    loops = (line for lines in computations.values() for line in lines if " while(" in line)
    return sum(
        math.isnan(turns(line, computations[found[1]]))
        for line in loops
        if (found := re.search(r"condition=%([^\s,]+)", line))
    )


def turns(loop: str, condition: list[str]) -> float:
    """How often a loop runs: as the line of it says, or the one constant with which its condition compares; or nan."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return float(known[1])
    constants = [float(n) for line in condition for n in re.findall(r" = s32\[\]\S* constant\((\d+)\)", line)]
    return constants[0] if len(constants) == 1 else math.nan


class _Step(NamedTuple):
    """A line of a program that runs."""

    text: str
    type: str
    opcode: str
    times: float
    computation: str
    caller: str
    call: str
    """The line of the caller that has the computation."""
    start: str
    """Of an operation in two halves, the line of the first."""


def _computations(hlo: str) -> dict[str, list[str]]:
    """Lines by the name of the computation, `ENTRY` for where the program begins."""
    blocks = re.findall(r"^(ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    return {"ENTRY" if entry else name: body.splitlines() for entry, name, body in blocks}


def _run(
    computations: Mapping[str, list[str]],
    *,
    calls: bool,
    unknown: float = math.nan,
    name: str = "ENTRY",
    times: float = 1.0,
    caller: str = "",
    call: str = "",
) -> Iterator[_Step]:
    """What a program runs: with the bodies of loops, and of fusions, branches and other calls if wanted.

    A loop of which it is not known how often it runs has `unknown` turns.
    """
    starts: dict[str, str] = {}
    for line in computations[name]:
        if not (found := re.match(r"\s*(?:ROOT )?%(\S+) = ", line)):
            continue
        type_, opcode = _type_and_opcode(line[found.end() :])
        if opcode.endswith("-start"):
            starts[found[1]] = line
        operand = re.search(r"-done\([^%]*%([^\s,)]+)", line)
        start = starts.get(operand[1], line) if operand else ""
        yield _Step(line, type_, opcode, times, name, caller, call, start)
        if opcode == "while" and (loop := re.search(r"condition=%([^\s,]+), body=%([^\s,]+)", line)):
            count = turns(line, computations[loop[1]])
            inner = times * (unknown if math.isnan(count) else count)
            yield from _run(
                computations, calls=calls, unknown=unknown, name=loop[2], times=inner, caller=name, call=line
            )
        elif calls and opcode not in ("async-update", "async-done"):
            for inner in _called(line):
                yield from _run(
                    computations, calls=calls, unknown=unknown, name=inner, times=times, caller=name, call=line
                )


def _called(line: str) -> list[str]:
    """Names of the computations that an operation other than a loop runs."""
    names = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%([^\s,]+)", line)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += re.findall(r"%([^\s,]+)", branches)
    return names


def _type_and_opcode(text: str) -> tuple[str, str]:
    """Of what stands behind `NAME = `: a type, which is in parentheses if it is a tuple, and an operation."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            return text[:end], text[end + 1 :].partition("(")[0]
    return text, ""


def _bytes(type_: str) -> int:
    """Of all arrays in a type such as `(bf16[8,128]{1,0}, pred[])`."""
    total = 0
    for dtype, shape in re.findall(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", type_):
        bits = re.search(r"\d+", dtype)
        total += math.prod(map(int, filter(None, shape.split(",")))) * (int(bits[0]) if bits else 8)
    return total // 8


def _group_size(line: str) -> int | None:
    """Of a line's first group of devices: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['a'=2,'b'=2] {'a'}`."""
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", groups[1])}
        axes = re.findall(r"'([^']+)'(:\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part) if part else sizes[axis] for axis, _, part in axes)
    return None
