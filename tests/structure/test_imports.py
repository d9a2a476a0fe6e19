"""Imports point one way: cli -> api -> (frontends, passes, backends, verify) -> ir; runtime and kernels stand alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("api", "ir", "frontends", "passes", "backends", "runtime", "verify", "kernels", "cli")
NOT_IN_THE_PACKAGE = ("tests", "benchmarks", "examples", "docs")
API = frozenset(path.stem for path in (ROOT / "api").glob("*.py")) - {"__init__", "__main__", "errors"}

ALLOWED = {
    "kernels": set(),
    "runtime": {"kernels"},
    "ir": {"kernels"},
    "frontends": {"ir", "kernels"},
    "passes": {"ir", "kernels"},
    "backends": {"ir", "passes", "runtime", "kernels"},
    "verify": {"ir", "passes", "backends", "runtime", "kernels"},
    "api": {"ir", "frontends", "passes", "backends", "verify", "runtime", "kernels"},
    "cli": {"api", "ir", "frontends", "passes", "backends", "verify", "runtime", "kernels"},
}
"""Folder -> folders it may import besides itself and `effc.errors`."""

ENTRY_POINT = {("api/__main__.py", "cli")}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield str(node.module)
            if node.module == "effc":
                yield from (f"effc.{alias.name}" for alias in node.names)


def home(module: str) -> str | None:
    """Folder of an effc module; None for the root, errors and other packages."""
    head, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if head != "effc" or not first or first in ("errors", "__version__"):
        return None
    return first if first in FOLDERS else "api" if first in API or first[0].isupper() else first


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        name = path.relative_to(ROOT).as_posix()
        for module in imported(ast.parse(path.read_text(encoding="utf-8"), name)):
            target = home(module)
            allowed = target is None or target == folder or target in ALLOWED[folder]
            if not allowed and (name, target) not in ENTRY_POINT and name != "api/__init__.py":
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_the_rules_have_no_cycle() -> None:
    seen: set[str] = set()
    for folder, allowed in ALLOWED.items():
        assert allowed <= seen, f"{folder} may import {allowed - seen}, which come after it"
        seen.add(folder)
    assert seen == set(FOLDERS)


def test_nothing_imports_a_folder_by_its_bare_name() -> None:
    wrong = []
    for path in (one for folder in (*FOLDERS, *NOT_IN_THE_PACKAGE) for one in sources(folder)):
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if module.partition(".")[0] in (*FOLDERS, *NOT_IN_THE_PACKAGE):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


@pytest.mark.parametrize("folder", ["api", "cli", "ir", "passes", "runtime", "kernels"])
def test_torch_is_never_imported_at_the_top(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            heads = (
                {module.partition(".")[0] for module in imported(node)}
                if isinstance(node, ast.Import | ast.ImportFrom)
                else set()
            )
            if heads & {"torch", "transformers"}:
                wrong.append(f"{path.relative_to(ROOT)}: {heads}")
    assert not wrong
