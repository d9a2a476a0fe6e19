"""What a path given to a command names: a model, or an engine folder."""

from __future__ import annotations

from pathlib import Path

from effc.cli.output import Reporter


def is_engine(path: str | Path) -> bool:
    """Whether the path is an engine folder."""
    return (Path(path) / "effc.json").is_file()


def engine_folder(path: str, reporter: Reporter, *, task: str | None, dtype: str | None, twin: bool) -> Path:
    """The engine to compare with: the path itself if it is an engine, else the model's plain fp32 export, cached."""
    if is_engine(path):
        return Path(path)
    from effc.compiler import reference_engine

    reporter.progress(f"export {path} as the reference", 0, 0)
    return reference_engine(path, dtype=dtype, task=task, twin=twin)
