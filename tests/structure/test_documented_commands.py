"""Every `effc …` line in a page of the project is a command line that `effc` accepts."""

import re
import shlex
from pathlib import Path

import click
import pytest

from effc.cli.main import COMMANDS, cli
from effc.passes.pipeline_text import parse_pipeline
from effc.passes.recipes import preset

ROOT = Path(__file__).resolve().parents[2]
IGNORED = {".venv", ".git", "build", ".links", "demo", "node_modules"}
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not IGNORED & {part for part in path.relative_to(ROOT).parts[:-1][:1]}
)
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))


def code_lines(page: Path) -> list[str]:
    """Lines of code blocks (fenced or indented) and of shell scripts, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page.suffix == ".sh":
        return text.splitlines()
    fenced = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return [*fenced.splitlines(), *(line for line in text.splitlines() if line.startswith("    "))]


def command_lines(page: Path) -> list[list[str]]:
    """The words of every `effc` call, without what the shell would take."""
    found = []
    for line in code_lines(page):
        start = re.match(r"\s*(?:\$ |run )?effc (.*)", line)
        if start and "…" not in start[1]:
            words = shlex.shlex(start[1], posix=True, punctuation_chars=True)
            words.whitespace_split = True
            words.commenters = "#"
            call: list[str] = []
            for word in words:
                if set(word) <= set("|><&;()"):
                    break
                call.append(word)
            found.append(call)
    return found


CALLS = [(page, call) for page in (*PAGES, *SCRIPTS) for call in command_lines(page)]


@pytest.fixture(autouse=True)
def _paths_need_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (click.Path, click.File):
        monkeypatch.setattr(kind, "convert", lambda self, value, param, ctx: value)


def test_pages_have_commands() -> None:
    assert len(CALLS) > 10


@pytest.mark.parametrize(
    ("page", "call"), CALLS, ids=[f"{page.relative_to(ROOT)}: {' '.join(call)}" for page, call in CALLS]
)
def test_a_documented_command_is_accepted(page: Path, call: list[str]) -> None:
    if not call or call[0].startswith("-"):
        return
    assert call[0] in COMMANDS, f"{page}: there is no command {call[0]!r}"
    command = cli.get_command(click.Context(cli), call[0])
    assert command is not None
    try:
        context = command.make_context(call[0], list(call[1:]))
    except click.exceptions.Exit:
        return
    assert parse_pipeline(context.params.get("passes") or "") is not None
    if context.params.get("preset_name"):
        assert preset(context.params["preset_name"])
