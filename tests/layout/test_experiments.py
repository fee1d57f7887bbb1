"""Every experiment states its claim, how to run it and how long it takes, and can write its numbers as JSON."""

from __future__ import annotations

import ast
import re


def test_docstrings_state_claim_command_and_duration(experiments):
    for source in experiments:
        text = ast.get_docstring(source.tree) or ""
        name = source.parts[-1]
        assert re.search(r"\bclaim\b", text, re.IGNORECASE), f"{source.name}: the docstring names no claim"
        assert f"python -m experiments.{name}" in text, f"{source.name}: the docstring has no command to run it"
        assert re.search(r"\b(seconds|minutes|hours)\b", text), (
            f"{source.name}: the docstring does not say how long it takes"
        )


def test_every_experiment_ends_with_numbers_that_json_can_hold(sources, experiments):
    """The flag --json belongs to experiments/output.py; an experiment has it by importing that, and uses it at its end."""
    (output,) = [source for source in sources if source.name == "experiments/output.py"]
    assert "json" in defined_flags(output)
    for source in experiments:
        assert "experiments.output" in source.imports(), f"{source.name} does not import experiments.output"
        assert calls(source, "output", "finish"), f"{source.name} never calls output.finish(results)"


def defined_flags(source) -> list[str]:
    return [
        node.args[0].value
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith("DEFINE")
        and isinstance(node.args[0], ast.Constant)
    ]


def calls(source, module: str, function: str) -> bool:
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == f"{module}.{function}"
        for node in ast.walk(source.tree)
    )


def test_every_experiment_is_run_as_a_module(experiments):
    for source in experiments:
        assert 'if __name__ == "__main__":' in source.text, f"{source.name} does nothing when it is run"
