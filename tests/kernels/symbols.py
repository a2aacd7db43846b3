"""What stands in for a relayed kernel's numbers, tensors and layouts where its Python code is run.

Values are symbols that say where they come from, so what reaches global memory shows what was read
on the way. Cell: 16 rows of a chunk of shared memory, what an epilogue warp reads and writes at
once.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

from sonicmoe_kernels.cute.epilogues import Gradients
from sonicmoe_kernels.tiles import SLICES

FRAGMENT = 4  # values that stand for a lane's part of a chunk: columns 0 and 1 of rows 0 and 8


class Symbol(tuple):
    """A number that remembers what it was made of."""

    def to(self, _dtype):
        return self

    def __mul__(self, other):
        return Symbol(("*", self, other))

    def __add__(self, other):
        return Symbol(("+", self, other))

    def __radd__(self, other):
        return Symbol(("+", other, self))


def activate(_activation, values):
    return Symbol(("act", *values))


def differentiate(_activation, values, da):
    dh = tuple(Symbol(("dact", half, *values, da)) for half in range(len(values)))
    return Gradients(activate(None, values), dh)


class Registers(list):
    """A lane's fragment."""

    def fill(self, value):
        self[:] = [value] * len(self)


class Accumulators:
    """A warpgroup's sums: of which k tiles, and how they are called once they are complete."""

    def __init__(self):
        self.products = []

    def __getitem__(self, i):
        return Symbol(("sum", *self.products[0][:-1], i))


class Anything:
    """What only passes through."""

    def __getattr__(self, _name):
        return self

    def __call__(self, *_args, **_kwargs):
        return self

    def __getitem__(self, _key):
        return self


class Cells(NamedTuple):
    """Store or load buffers of a CTA; `part` is a slice of them, or all slices of a chunk."""

    space: str
    part: int | None = None

    def __getitem__(self, key):  # type: ignore[override]
        chunk = key[3]
        parts = range(SLICES) if self.part is None else (self.part,)
        return [(self.space, chunk * SLICES + part) for part in parts]


class Boxes(NamedTuple):
    """TMA's view of the same: the last index numbers cells."""

    space: str

    def __getitem__(self, key):  # type: ignore[override]
        return (self.space, key[1])


class Rows(NamedTuple):
    """Rows of a global tensor from `first + row` on, clipped at `length` rows if that is given."""

    name: str
    first: int
    length: int | None
    row: int

    def at(self, column, half=0):
        return self, column, half


class GlobalBoxes(NamedTuple):
    rows: Rows

    def __getitem__(self, key):  # type: ignore[override]
        return self.rows.at(*key[1:])


class Coordinates:
    def __getitem__(self, key):
        return key[1:]


class Lanes(NamedTuple):
    """ldmatrix or stmatrix of a warp."""

    direction: str

    def get_slice(self, _thread):
        return self

    def retile(self, registers):
        return registers


class Scores:
    def __getitem__(self, row):
        return Symbol(("score", row))


def h_values(row, column, half):
    return tuple(Symbol(("H", row, column, half, i)) for i in range(FRAGMENT))


def rebind(function: FunctionType, fakes: dict) -> FunctionType:
    """The function with other globals: those it names that are in `fakes`."""
    known = dict(function.__globals__)
    known.update({name: fake for name, fake in fakes.items() if name in known})
    code = as_written(function)
    closure = function.__closure__ if code.co_freevars else None
    bound = FunctionType(code, known, function.__name__, function.__defaults__, closure)
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound


def as_written(function: FunctionType) -> CodeType:
    """The code of the source file: compiling a kernel leaves another in its place."""
    todo = [_code_of_file(inspect.getsourcefile(function))]
    while todo:
        code = todo.pop()
        if code.co_qualname == function.__qualname__:
            return code
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    raise LookupError(function.__qualname__)


@functools.cache
def _code_of_file(path: str) -> CodeType:
    return compile(Path(path).read_text(), path, "exec", dont_inherit=True)
