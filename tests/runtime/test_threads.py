"""The default number of threads: cores, not hardware threads, within affinity and quota."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc.runtime import threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hardware threads each, all allowed, no quota."""
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(threads, "SIBLINGS", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: list(range(8)))
    return tmp_path


def test_hardware_threads_of_a_core_count_once(machine: Path) -> None:
    assert threads.default_threads() == 4


def test_affinity_limits(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: [1, 2, 5])
    assert threads.default_threads() == 2


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("odd", 4)]
)
def test_the_quota_of_a_container_limits(machine: Path, quota: str, expected: int) -> None:
    (machine / "cpu.max").write_text(quota)
    assert threads.default_threads() == expected


def test_without_topology_every_cpu_is_a_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SIBLINGS", str(machine / "absent{}"))
    assert threads.default_threads() == 8


def test_this_machine_has_at_least_one() -> None:
    assert threads.default_threads() >= 1
