"""The commands in the READMEs of the examples run as they stand, one after the other."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ("tiny_decoder", "own_pass")


def commands(readme: Path) -> list[str]:
    """Indented lines that call `python` or `effc`."""
    return re.findall(r"^    ((?:python|effc) .*)$", readme.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Programs `python` and `effc` of this interpreter, in front of all others."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("python", ""), ("effc", "-m effc")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "EFFC_CACHE": str(tmp_path / "cache")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_commands_of_an_example_run(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(ROOT / "examples" / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    lines = commands(folder / "README.md")
    assert lines
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or "make_model" in line, f"$ {line} printed nothing"


def test_every_example_is_run_or_is_the_demo() -> None:
    folders = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == {*EXAMPLES, "demo"}


def test_the_demo_is_a_valid_script() -> None:
    subprocess.run(["sh", "-n", ROOT / "examples" / "demo" / "demo.sh"], check=True)
