"""What must be pure is pure, by its imports and by its calls; and what watches knows nothing of what breaks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sosa_stream

ROOT = Path(sosa_stream.__file__).parent
PURE = sorted(
    [*ROOT.glob("detect/*.py"), *ROOT.glob("decide/*.py"), ROOT / "engine.py", ROOT / "effects.py", ROOT / "figures.py"]
)
ALLOWED_MODULES = {
    *(
        "__future__",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "itertools",
        "math",
        "re",
        "typing",
    ),
    "numpy",
    *("sosa_stream.decide", "sosa_stream.detect", "sosa_stream.effects", "sosa_stream.errors", "sosa_stream.settings"),
    "sosa_stream.figures",
    *("sosa_stream.protocol.actions", "sosa_stream.protocol.columns", "sosa_stream.protocol.messages"),
}
FORBIDDEN_NAMES = {
    *("open", "print", "input", "exec", "eval", "compile", "__import__", "globals", "breakpoint"),
    *("Path", "PurePath", "pathlib", "tomllib"),  # what an allowed module has imported for itself
}
FORBIDDEN_ATTRIBUTES = {
    *("now", "today", "utcnow", "time", "monotonic", "perf_counter", "random", "environ", "getenv", "urandom"),
    *("read_text", "write_text", "read_bytes", "write_bytes", "fromfile", "tofile", "load", "save", "memmap", "uuid4"),
    *("Path", "exists", "is_file", "is_dir", "stat", "iterdir", "glob", "mkdir", "unlink", "touch"),
}


def _imports(tree: ast.AST) -> Iterator[str]:
    """Each imported module, and each name imported from one, which may be a module too, behind its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports_faults(tree: ast.AST) -> bool:
    return any(module == "sosa_stream.faults" or module.startswith("sosa_stream.faults.") for module in _imports(tree))


def _impure_names(tree: ast.AST) -> set[str]:
    """Forbidden names and attributes, also where a name is only imported, or imported under another."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {part for module in _imports(tree) for part in module.split(".")}
    return ((names | imported) & FORBIDDEN_NAMES) | ((attributes | imported) & FORBIDDEN_ATTRIBUTES)


def _allowed(module: str) -> bool:
    return any(module == allowed or module.startswith(allowed + ".") for allowed in ALLOWED_MODULES)


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_module_imports_no_clock_file_socket_or_framework(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [module for module in _imports(tree) if not _allowed(module)] == []


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_module_names_nothing_impure(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert _impure_names(tree) == set()


def test_watching_code_never_imports_the_fault_injectors() -> None:
    paths = [*PURE, *ROOT.glob("web/**/*.py"), *ROOT.glob("daemon/**/*.py"), *ROOT.glob("replay/**/*.py")]
    guilty = [
        str(path.relative_to(ROOT)) for path in paths if _imports_faults(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert guilty == []


def test_the_check_itself_sees_an_impure_module() -> None:
    tree = ast.parse("import time\nfrom os import path\ntime.time()\n")
    assert [module for module in _imports(tree) if not _allowed(module)] == ["time", "os.path"]
    assert _impure_names(tree) == {"time"}


@pytest.mark.parametrize(
    "source",
    [
        "from sosa_stream.settings import Path",
        "from sosa_stream.settings import Path as Settings",
        "from sosa_stream import settings\nsettings.Path('a')",
        "def check(where):\n    return where.is_file()",
    ],
)
def test_the_check_itself_sees_a_path_that_an_allowed_module_has_imported(source: str) -> None:
    tree = ast.parse(source)
    assert all(_allowed(module) for module in _imports(tree)), "only the names give it away"
    assert _impure_names(tree)


@pytest.mark.parametrize(
    "source",
    [
        "from sosa_stream import faults",
        "from sosa_stream import errors, faults as other",
        "import sosa_stream.faults",
        "from sosa_stream.faults import parse_faults",
        "from sosa_stream.faults.spec import FaultSpec",
    ],
)
def test_the_check_itself_sees_the_fault_injectors(source: str) -> None:
    assert _imports_faults(ast.parse(source))
    assert not _imports_faults(ast.parse("from sosa_stream import errors\nimport sosa_stream.engine"))
