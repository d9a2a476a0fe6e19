"""The wheel holds every file of the package that git knows, and nothing else."""

import os
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"ir", "frontends", "passes", "backends", "runtime", "verify", "kernels", "cli"}
DATA = {".html", ".toml"}


def expected(clone: Path) -> set[str]:
    """Names in the wheel of the tracked Python files and data files."""
    listed = subprocess.run(["git", "ls-files"], cwd=clone, check=True, capture_output=True, text=True).stdout
    names = set()
    for path in map(Path, listed.splitlines()):
        top = path.parts[0]
        if top == "api" and (path.suffix == ".py" or path.name == "py.typed"):
            names.add(f"effc/{path.name}")
        elif top in FOLDERS and (path.suffix == ".py" or path.suffix in DATA or path.parent.name == "presets"):
            names.add(f"effc/{path.as_posix()}")
    return names


def test_a_source_archive_gets_every_native_file() -> None:
    listed = subprocess.run(["git", "ls-files", "kernels"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    native = [Path(name).name for name in listed.splitlines() if Path(name).suffix not in (".py", ".md")]
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    (patterns,) = (line.split()[2:] for line in lines if line.startswith("recursive-include kernels "))
    assert native and all(any(fnmatch(name, pattern) for pattern in patterns) for name in native)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_only_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("effc-*.whl")
    assert "-py3-none-" in wheel.name
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    built = {name for name in names if name.startswith("effc/kernels/_lib/")}
    assert built == {"effc/kernels/_lib/libeffc.so"}
    assert names - built == expected(source)


@pytest.mark.slow
def test_the_top_level_of_the_wheel_is_effc_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source]
    subprocess.run(command, check=True, env={**os.environ, "EFFC_BUILD_KERNELS": "0"})
    (wheel,) = tmp_path.glob("effc-*.whl")
    archive = zipfile.ZipFile(wheel)
    assert {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" not in name} == {"effc"}
    (top,) = (name for name in archive.namelist() if name.endswith("top_level.txt"))
    assert archive.read(top).decode().split() == ["effc"]
