"""The text of a compiled program (`compiled.as_text()`) as computations, instructions and shapes.

Source: the grammar of XLA's HLO text as its own parser reads it (openxla/xla, `hlo/parser/hlo_parser.cc`); only what the
counts of `plan.count` need.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,<= ]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"%?([\w.\-]+)\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: element type, sizes, and whether it lies in HBM (not in a memory on the chip)."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        return -(-self.size * bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`; a shape that is a tuple is flattened to its arrays."""

    name: str
    shape: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # what stands in the brackets: of a constant its value, of a parameter its number
    attributes: str
    is_root: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.shape)

    @property
    def scope(self) -> str:
        """The path of named scopes and primitives that the instruction was made by."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str | None:
        """The text of `name=...`: of a list in braces what is inside them."""
        found = re.search(rf"(?:^|, ){name}=", self.attributes)
        if not found:
            return None
        rest = self.attributes[found.end() :]
        if rest.startswith("{"):
            return rest[1 : _closing(rest)]
        return re.match(r"[^,\s]*(?:\[[^\]]*\][^,\s]*)*", rest).group()

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"-?\d+", self.attribute(name) or ""))

    def called(self, *names: str) -> list[str]:
        """Computations that the attributes `names` name, in order."""
        found = [self.attribute(name) or "" for name in names]
        return [part.strip().lstrip("%") for text in found for part in text.split(",") if part.strip()]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the schedule."""

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self if instruction.is_root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    def users(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self if name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Program:
    """The program in `text`. Raises ValueError for a text that holds no entry computation, or a line it cannot read."""
    text = re.sub(r"\{\n(\"[^\n]*)\n\}", r"{\1}", text)  # what a kernel says of itself stands on lines of its own
    computations, entry, name, lines = {}, None, None, {}
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, lines = header.group(2), {}
                entry = name if header.group(1) else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, lines)
            name = None
        elif " = " in line:
            instruction = _instruction(line.strip())
            lines[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"no ENTRY computation in {text[:80]!r}...; pass the text of `compiled.as_text()`")
    return Program(entry, computations)


def bits(dtype: str) -> int:
    """Bits of one element: f32 is 32, bf16 16, s4 4, f8e4m3fn 8, c64 64."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if not found:
        raise ValueError(f"element type {dtype!r} is unknown; give its bits in plan/hlo.py")
    return int(found.group(1))


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape as HLO writes it; `S(n)` in a layout, with n > 0, is a memory on the chip."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        numbers = tuple(int(size) for size in re.findall(r"\d+", sizes))
        found.append(Array(dtype, numbers, in_hbm=not re.search(r"S\([1-9]", layout)))
    return tuple(found)


def _instruction(line: str) -> Instruction:
    is_root, line = line.startswith("ROOT "), line.removeprefix("ROOT ")
    name, rest = line.split(" = ", 1)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    arguments, attributes = rest[opening + 1 : closing], rest[closing + 1 :].removeprefix(",").strip()
    opcode = rest[:opening].strip()
    names = () if opcode in ("constant", "parameter", "iota") else tuple(_operands(arguments))
    return Instruction(name.lstrip("%"), arrays(shape), opcode, names, arguments, attributes, is_root)


def _operands(text: str) -> Iterator[str]:
    for part in _split(text):
        found = _NAME.search(re.sub(r"/\*.*?\*/", "", part))
        if found:
            yield found.group(1)


def _split(text: str) -> Iterator[str]:
    """Parts between the commas that stand in no bracket."""
    depth, start = 0, 0
    for index, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _closing(text: str) -> int:
    """Where the bracket that `text` opens with is closed; brackets in quotes do not count."""
    depth, quoted = 0, False
    for index, letter in enumerate(text):
        if letter == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted and letter in "([{":
            depth += 1
        elif not quoted and letter in ")]}":
            depth -= 1
            if depth == 0:
                return index
    raise ValueError(f"a bracket is not closed in {text[:80]!r}")
