"""How often a loop of a compiled program runs.

XLA says it in `known_trip_count`, or else the condition does: a counter that starts at a number, grows by a number and is
compared with a number. Anything else depends on data.
"""

from __future__ import annotations

import math
import re

from llama4_jax.plan.hlo import Computation, Instruction, Program


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Times that the body of `loop`, which stands in `computation`, runs; None where that depends on data."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = program.computations[loop.called("condition")[0]]
    compared = _comparison(program, condition)
    if compared is None:
        return None
    direction, left, right = compared
    (start,) = computation.operands(loop)
    counter = _element(left)
    first, limit = _start(computation, start, counter), _number(condition, right)
    if limit is None and _element(right) is not None:
        limit = _start(computation, start, _element(right))
    step = _step(program, program.computations[loop.called("body")[0]], counter, computation, start)
    if None in (first, limit, step) or direction not in ("LT", "LE") or step <= 0:
        return None
    return max(0, math.ceil((limit + (direction == "LE") - first) / step))


def _comparison(program: Program, condition: Computation) -> tuple[str, Instruction, Instruction] | None:
    """Direction and both sides of the comparison that ends a condition, be it in a fusion or not."""
    root = condition.root
    if root.opcode == "compare":
        return root.attribute("direction"), *condition.operands(root)
    if root.opcode == "fusion":
        inside = program.computations[root.called("calls")[0]]
        if inside.root.opcode == "compare":
            sides = [_outside(condition, root, side) for side in inside.operands(inside.root)]
            return inside.root.attribute("direction"), *sides
    return None


def _outside(caller: Computation, fusion: Instruction, value: Instruction) -> Instruction:
    """What a parameter of a fusion stands for; any other value is itself."""
    return caller.operands(fusion)[int(value.arguments)] if value.opcode == "parameter" else value


def _element(value: Instruction) -> int | None:
    return int(value.attribute("index")) if value.opcode == "get-tuple-element" else None


def _start(computation: Computation, carried: Instruction, element: int | None) -> int | None:
    """The number that element `element` of a loop's operand starts as."""
    if element is None or carried.opcode != "tuple":
        return None
    return _number(computation, computation.operands(carried)[element])


def _number(computation: Computation, value: Instruction) -> int | None:
    while value.opcode in ("copy", "bitcast"):
        (value,) = computation.operands(value)
    return int(value.arguments) if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.arguments) else None


def _step(program: Program, body: Computation, element: int | None, outside: Computation, start: Instruction):
    """By how much the counter grows in a body; None where the body does something else with it."""
    if element is None or body.root.opcode != "tuple":
        return None
    following = body.operands(body.root)[element]
    while following.opcode in ("copy", "bitcast"):
        (following,) = body.operands(following)
    sum_, inside = following, body
    if following.opcode == "fusion":
        inside = program.computations[following.called("calls")[0]]
        sum_ = inside.root
    if sum_.opcode != "add":
        return None
    for side in inside.operands(sum_):
        known = _number(inside, side)
        side = _outside(body, following, side) if inside is not body else side
        # A number that is the same in every round may be carried along from outside.
        carried = _element(side) if _element(side) != element else None
        known = known if known is not None else _number(body, side)
        known = known if known is not None else _start(outside, start, carried)
        if known is not None:
            return known
    return None
