"""Bytes of HBM that instructions read and write: operands and results once each, of what is sliced only the slice.

What lies in a memory on the chip (`S(n)` in the layout) is free. Source: the rules of XLA's `HloCostAnalysis`.
"""

from __future__ import annotations

import re

from llama4_jax.plan.hlo import Array, Computation, Instruction, Program

# They move nothing, or what they do is counted elsewhere: at the start of a pair, or in the computation that they call.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id"),
    *("replica-id", "opt-barrier", "domain", "while", "conditional", "call", "async-start", "async-update", "iota"),
}

# They write a part of their first operand where it lies; which operand holds the part.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}


def hbm_bytes(program: Program, computation: Computation, each: Instruction) -> float:
    """Bytes of HBM that one instruction reads and writes; of what it slices, only the slice."""
    if each.opcode in _FREE or each.opcode.endswith("-done"):
        return 0
    operands = computation.operands(each)
    if each.opcode == "fusion":
        inside = program.computations[each.called("calls")[0]]
        return sum(_read(program, inside, n, operand) for n, operand in enumerate(operands)) + _written(
            program, inside, inside.root, each.shape
        )
    if each.opcode in ("dynamic-slice", "gather"):
        return 2 * _in_hbm(each.shape)
    if each.opcode in (
        "slice",
        "slice-start",
    ):  # the latter gives (operand, slice, ...), and often in a memory on the chip
        kept = each.shape[1:2] if each.opcode == "slice-start" else each.shape
        return (sum(array.nbytes for array in kept) if _in_hbm(operands[0].shape) else 0) + _in_hbm(kept)
    if each.opcode in _IN_PLACE:
        return 2 * _in_hbm(operands[_IN_PLACE[each.opcode]].shape)
    if each.opcode == "custom-call":
        stated = re.search(r'"bytes_accessed":"(\d+)"', each.attributes)  # a kernel may leave much of an operand unread
        moved = sum(_in_hbm(operand.shape) for operand in operands) + _in_hbm(each.shape)
        return min(moved, int(stated.group(1))) if stated else moved
    results = each.shape
    if each.opcode.endswith("-start"):  # (source, target, ...) but of a copy (target, source, ...)
        results = each.shape[:1] if each.opcode == "copy-start" else each.shape[len(operands) : 2 * len(operands)]
    return sum(_in_hbm(operand.shape) for operand in operands) + _in_hbm(results)


def _in_hbm(shape: tuple[Array, ...]) -> int:
    return sum(array.nbytes for array in shape if array.in_hbm)


def _read(program: Program, inside: Computation, number: int, operand: Instruction) -> float:
    """Bytes of operand `number` that a fusion reads."""
    if not _in_hbm(operand.shape):
        return 0
    (parameter,) = (each for each in inside if each.opcode == "parameter" and int(each.arguments) == number)
    return min(_used(program, inside, parameter), _in_hbm(operand.shape))


def _used(program: Program, inside: Computation, value: Instruction) -> float:
    total = 0.0
    for user in inside.users(value.name):
        if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == value.name:
            total += user.nbytes
        elif user.opcode in _IN_PLACE and user.operands[0] == value.name:
            total += 0
        elif user.opcode == "bitcast":
            total += _used(program, inside, user)
        elif user.opcode == "fusion":
            called = program.computations[user.called("calls")[0]]
            numbers = [n for n, name in enumerate(user.operands) if name == value.name]
            parameters = (each for each in called if each.opcode == "parameter" and int(each.arguments) in numbers)
            for parameter in parameters:
                total += _used(program, called, parameter)
                if _passed_on(called) is parameter:  # what is read of it is what its users read
                    total += _used(program, inside, user)
        else:
            return value.nbytes
    return total


def _passed_on(computation: Computation) -> Instruction:
    """What a computation's result is another view of."""
    value = computation.root
    while value.opcode == "bitcast":
        (value,) = computation.operands(value)
    return value


def _written(program: Program, inside: Computation, root: Instruction, shape: tuple[Array, ...]) -> float:
    if root.opcode == "tuple":
        parts = inside.operands(root)
        if len(parts) == len(shape):
            return sum(_written(program, inside, part, (array,)) for part, array in zip(parts, shape))
    if not _in_hbm(shape):
        return 0
    if root.opcode == "bitcast":
        return _written(program, inside, inside.operands(root)[0], shape)
    if root.opcode in _IN_PLACE:
        return inside.operands(root)[_IN_PLACE[root.opcode]].nbytes
    if root.opcode == "fusion":
        called = program.computations[root.called("calls")[0]]
        return _written(program, called, called.root, shape)
    return _in_hbm(shape)
