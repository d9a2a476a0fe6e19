"""Every folder says what it is for, every pass has a page, and the files of the project speak of the project."""

import subprocess
from pathlib import Path

import pytest

from effc.catalogue import describe_pass
from effc.passes.base import Contract, Pass
from effc.passes.pipeline_text import format_pass, parse_pipeline
from effc.passes.registry import BUILTIN, pass_class

ROOT = Path(__file__).resolve().parents[2]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in listed.splitlines()]


def test_every_top_folder_and_every_folder_of_passes_has_a_readme() -> None:
    folders = {path.parts[0] for path in tracked() if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    folders |= {f"passes/{path.parts[1]}" for path in tracked() if path.parts[0] == "passes" and len(path.parts) > 2}
    folders |= {
        f"backends/{path.parts[1]}" for path in tracked() if path.parts[0] == "backends" and len(path.parts) > 2
    }
    missing = sorted(folder for folder in folders if not (ROOT / folder / "README.md").is_file())
    assert not missing


def test_every_package_folder_is_importable() -> None:
    code = ("ir", "frontends", "passes", "backends", "runtime", "verify", "kernels", "cli")
    folders = {path.parent for path in tracked() if path.suffix == ".py" and path.parts[0] in code}
    missing = sorted(str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file())
    assert not missing


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_pass_has_a_page_and_a_round_trip(name: str) -> None:
    cls = pass_class(name)
    page = describe_pass(name)
    assert issubclass(cls, Pass)
    assert cls.name == name
    assert isinstance(cls.contract, Contract)
    assert len(page["doc"].splitlines()[0]) > 10
    assert all(option["doc"] for option in page["options"]), "an option without a meaning"
    assert parse_pipeline(name) == (cls(),)
    assert parse_pipeline(format_pass(cls())) == (cls(),)


def test_every_pass_file_is_in_the_registry() -> None:
    homes = {target.partition(":")[0] for target in BUILTIN.values()}
    for path in (ROOT / "passes").rglob("*.py"):
        module = "effc." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        if "(Pass):" in path.read_text(encoding="utf-8"):
            assert module in homes, f"{path} defines a pass that the registry does not name"


def test_registered_classes_know_their_names() -> None:
    assert all(pass_class(name).name == name for name in BUILTIN)
