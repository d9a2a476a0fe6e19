"""Files that travel with a model: tokenizer, chat template, generation and preprocessing settings, pooling."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from effc.errors import InputError
from effc.frontends.environment import offline_and_quiet

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
SLOW_SOURCES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def collect(folder: Path) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """The assets in a model folder, links resolved, and notes.

    An engine folder is flat, so a file in a sub-folder gets its path with `_` for `/`:
    `1_Pooling/config.json` becomes `1_Pooling_config.json`. A folder with a slow tokenizer only gets a
    `tokenizer.json` made by transformers.
    """
    assets: dict[str, Path | bytes] = {
        name: (folder / name).resolve() for name in FILES if (folder / name).is_file()
    }
    for module in _sentence_modules(folder):
        path = folder / module / "config.json"
        if path.is_file():
            assets[f"{module}_config.json"] = path.resolve()
    if "tokenizer.json" in assets or not any(name in assets for name in SLOW_SOURCES):
        return assets, ()
    made, note = _make_fast(folder)
    return {**assets, **made}, (note,)


def _sentence_modules(folder: Path) -> list[str]:
    """Sub-folders a sentence-transformers `modules.json` names."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_bytes())
        names = [module["path"] for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is not a list of sentence-transformers modules ({error}).") from error
    unsafe = [name for name in names if not isinstance(name, str) or name.startswith((".", "/")) or "/" in name]
    if unsafe:
        raise InputError(f"{path}: names the module folder {unsafe[0]!r}, which is not a plain sub-folder.")
    return [name for name in names if name]


def _make_fast(folder: Path) -> tuple[Mapping[str, bytes], str]:
    from transformers import AutoTokenizer

    try:
        with offline_and_quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        return {}, f"No tokenizer.json could be made from the slow tokenizer ({reason})."
    if not getattr(tokenizer, "is_fast", False):
        return {}, "The tokenizer has no fast form: the engine has no tokenizer.json."
    return saved_tokenizer(tokenizer), "tokenizer.json was made from the slow tokenizer."


def saved_tokenizer(tokenizer: object) -> dict[str, bytes]:
    """The files a tokenizer saves, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name in FILES}
