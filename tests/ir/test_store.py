"""The store shows whole entries only, and keeps within its limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from effc.errors import OutputError
from effc.ir.store import ENGINES, Store, content_key


def _put(store: Store, key: str, data: bytes) -> None:
    with store.writing(key) as file:
        file.write(data)


def test_an_entry_is_found_after_it_was_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = content_key(a=1, b="two")
    assert store.find(key) is None
    _put(store, key, b"data")
    path = store.find(key)
    assert path is not None
    assert path.read_bytes() == b"data"
    store.drop(key)
    assert store.find(key) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = content_key(a=1)

    def fail() -> None:
        with store.writing(key) as file:
            file.write(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert store.find(key) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_keys_depend_on_every_part() -> None:
    assert content_key(a=1, b=2) == content_key(b=2, a=1)
    assert len({content_key(a=1), content_key(a=2), content_key(a="1"), content_key(b=1)}) == 4


def test_the_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = [content_key(n=n) for n in range(3)]
    for age, key in zip((30, 20, 10), keys, strict=True):
        _put(store, key, b"x" * 100)
        path = store.find(key)
        assert path is not None
        os.utime(path, (1000 - age, 1000 - age))
    store.find(keys[0])
    store.prune(limit=200)
    assert [store.find(key) is not None for key in keys] == [True, False, True]


def test_a_folder_of_the_cache_is_one_entry(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = content_key(n=0)
    _put(store, key, b"x" * 100)
    for age, name in ((500, "old"), (1, "new")):
        folder = tmp_path / ENGINES / name
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(b"x" * 100)
        os.utime(folder / "weights.bin", (1000 - age, 1000 - age))
    store.prune(limit=200)
    assert [path.name for path in (tmp_path / ENGINES).iterdir()] == ["new"]
    assert store.find(key) is not None


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="EFFC_CACHE"):
        _put(Store(tmp_path / "file"), content_key(a=1), b"")
