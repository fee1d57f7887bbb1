"""House rules that a syntax tree can see."""

from __future__ import annotations

import ast
import collections
import re

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 100
MAX_PARAMETERS = 10
EMPTY_NAMES = {"utils", "util", "common", "helpers", "misc", "experimental"}
PURE_PACKAGES = {"core", "kernels", "nn", "model", "quant"}  # what jit, grad and scan trace


def measured(sources):
    return [source for source in sources if source.parts[0] in ("llama4_jax", "experiments", "benchmarks", "launch")]


def test_every_file_opens_with_a_docstring(sources):
    bare = [source.name for source in sources if source.text.strip() and not ast.get_docstring(source.tree)]
    assert not bare, bare


def test_no_file_is_empty(sources):
    empty = [source.name for source in sources if not source.text.strip()]
    assert not empty, f"say in a docstring what the package is for: {empty}"


def test_no_file_is_long(sources):
    long = [(source.name, lines) for source in sources if (lines := source.text.count("\n")) > MAX_FILE_LINES]
    assert not long, f"split by noun: {long}"


def test_no_function_is_long(sources):
    long = [
        (source.at(function), function.name, lines)
        for source in measured(sources)
        for function in source.functions()
        if (lines := function.end_lineno - function.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, long


def test_no_signature_has_more_than_ten_parameters(sources):
    wide = [
        (source.at(function), function.name, count)
        for source in measured(sources)
        for function in source.functions()
        if (count := parameters(function)) > MAX_PARAMETERS
    ]
    assert not wide, f"the missing noun is a dataclass: {wide}"


def parameters(function) -> int:
    """Parameters that a caller fills in: not self or cls."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for i, name in enumerate(names) if not (i == 0 and name in ("self", "cls"))])


def test_no_folder_or_file_has_an_empty_name(sources):
    vague = [source.name for source in sources if EMPTY_NAMES & set(source.parts)]
    assert not vague, f"name what it is about: {vague}"


def test_no_two_test_files_have_one_name(sources):
    """Folders of tests are no packages: pytest imports each file by its name alone, and refuses a second."""
    names = collections.Counter(source.parts[-1] for source in sources if source.parts[0] == "tests")
    repeated = [name for name, count in names.items() if count > 1 and name != "conftest"]
    assert not repeated, f"rename one of each: {repeated}"


def test_nothing_is_left_to_do(sources):
    marks = re.compile(r"#.*\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    left = [(source.name, match.group()) for source in sources if (match := marks.search(source.text))]
    assert not left, left


def test_attributes_are_assigned_in_init_only(library):
    """Mutation inside a traced function is lost without a word, so modules never do it."""
    wrong = [
        source.at(target)
        for source in library
        if len(source.parts) > 2 and source.parts[1] in PURE_PACKAGES
        for function in source.functions()
        if function.name not in ("__init__", "__post_init__")
        for target in assigned_attributes(function)
    ]
    assert not wrong, f"assigned outside __init__; return the new value instead: {wrong}"


def assigned_attributes(function) -> list[ast.AST]:
    """Targets like `a.b = ...`, `self.w[...] = ...` and `setattr(a, ...)` in a function."""
    found = []
    for node in ast.walk(function):
        targets = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            found.append(node)
        found += [leaf for target in targets for leaf in flat(target) if touches_attribute(leaf)]
    return found


def flat(target) -> list[ast.AST]:
    if isinstance(target, ast.Tuple | ast.List):
        return [leaf for item in target.elts for leaf in flat(item)]
    return [target.value] if isinstance(target, ast.Starred) else [target]


def touches_attribute(target) -> bool:
    while isinstance(target, ast.Subscript):
        target = target.value
    return isinstance(target, ast.Attribute)


def test_the_library_reads_neither_flags_nor_environment(library):
    wrong = []
    for source in library:
        wrong += [
            f"{source.name} imports {name}"
            for name in source.imports()
            if name.startswith(("absl.flags", "absl.app", "argparse", "os.environ", "os.getenv", "sys.argv"))
        ]
        wrong += [
            f"{source.at(node)} uses {node.value.id}.{node.attr}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in (("os", "environ"), ("os", "getenv"), ("sys", "argv"))
        ]
    assert not wrong, f"pass it as an argument from an experiment: {wrong}"


def test_the_check_for_attribute_assignment_sees_every_spelling():
    code = "def f(self):\n self.a = 1\n self.b += 1\n self.c[0] = 1\n x, self.d = 1, 2\n setattr(self, 'e', 1)\n y = 1"
    assert len(assigned_attributes(ast.parse(code).body[0])) == 5
