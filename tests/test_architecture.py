"""The shape of the package: imports point down only, third parties stay optional, and no file is too long to read.

Imports are read from the source, not from a running interpreter, so that those inside functions and those that only a
type checker follows are held to the same rule.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent / "src" / "chest"

# From the bottom up. A module may import from lower rows and from its own package, never from its neighbours in a row.
# Names are relative to the package; `engines` stands for engines/__init__.py, and "" for the package's own.
LAYERS = [
    ["errors"],
    [
        "_compression",
        "_forms",
        "_fs",
        "_lifetime",
        "_machine",
        "_pagemap",
        "_reducers",
        "_sealing",
        "_size_plans",
        "_valuefile",
    ],
    ["_envelope", "_keys", "_pickled", "_scratch", "_sizing"],
    ["_problems", "abc"],
    ["_changes", "_entry"],
    ["_memory"],
    ["_native"],  # compiled
    ["_hot"],
    ["engines", "engines.*", "serializers", "serializers.*", "_records", "_sealed"],
    ["_reading", "_trust", "_value_files"],
    ["_check_files"],
    ["_publishing"],
    ["_store"],
    ["_aside", "_backup", "_checking", "_opening", "_spilling"],
    ["_gathering"],
    ["_rebuilding"],
    ["_repairing"],
    ["_keeper"],
    ["_views"],
    ["_dictionary"],
    ["_inside"],
    ["_sharing"],
    ["_processes"],
    ["_upkeep"],
    ["core"],
    [""],
    ["_cli", "_cli.*", "__main__", "safe", "integrations", "integrations.*", "testing", "testing.*", "migrate"],
]

REQUIRED = {
    "lmdb",
    "xxhash",
}  # the third parties that may be imported with the package; all others only when they are needed
LATE = ["serializers._safe", "serializers._safe_*"]
# Imported only when they are used, and each with the third party that it is about. Nothing else may import them before that.
MAX_LINES = 450


class Import(NamedTuple):
    target: str  # absolute, as in "chest.errors" or "numpy"
    line: int
    at_import: bool  # runs when the module is imported: not inside a function, not for type checkers only


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(file): file for file in sorted(ROOT.rglob("*.py"))}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _layer(module: str) -> int | None:
    for number, row in enumerate(LAYERS):
        if any(fnmatchcase(module, pattern) for pattern in row):
            return number
    return None


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that a `from ... import` names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    package = ["chest", *module.split(".")] if module else ["chest"]
    if MODULES[module].name != "__init__.py":
        package.pop()
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, node.module] if node.module else package)


def _imports(module: str) -> list[Import]:
    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, at_import)
            elif isinstance(child, ast.ImportFrom):
                target = _absolute(module, child)
                for alias in child.names:
                    # `from chest import errors` names a module, `from chest import Chest` the package.
                    full = f"{target}.{alias.name}"
                    is_module = target.partition(".")[0] == "chest" and full.partition(".")[2] in MODULES
                    yield Import(full if is_module else target, child.lineno, at_import)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_import and not inside and not _is_for_type_checkers(child))

    return list(visit(_tree(module), True))


def _package(module: str) -> str:
    """The sub-package a module belongs to: "engines" for `engines` and `engines.x`; a plain module is its own."""
    return module.partition(".")[0]


def test_there_is_something_to_look_at() -> None:
    assert {"errors", "abc"} <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_row_in_the_table(module: str) -> None:
    assert _layer(module) is not None, f"{module or 'chest'} has no row in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    here = _layer(module)
    assert here is not None
    wrong = []
    for target, line, _ in _imports(module):
        if target.partition(".")[0] != "chest":
            continue
        other = target.partition(".")[2]
        there = _layer(other)
        same_package = _package(other) == _package(module) and _package(module) != ""
        if not same_package and (there is None or there >= here):
            wrong.append(f"line {line}: {target}")
    assert not wrong, f"{module or 'chest'} imports from its own row or from above: {wrong}"


def _is_late(module: str) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in LATE)


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_only_when_they_are_needed(module: str) -> None:
    if _is_late(module):
        return
    allowed = REQUIRED | {"chest"} | sys.stdlib_module_names
    wrong = [
        f"line {line}: {target}"
        for target, line, at_import in _imports(module)
        if at_import and (target.partition(".")[0] not in allowed or _is_late(target.partition(".")[2]))
    ]
    assert not wrong, f"importing {module or 'chest'} imports third parties: {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long_to_read(module: str) -> None:
    n_lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert n_lines <= MAX_LINES, f"{MODULES[module].relative_to(ROOT)} has {n_lines} lines: split it"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(_tree(module)), f"{MODULES[module].relative_to(ROOT)} has no docstring"
