"""How many threads an engine should use when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
MOST_ON_ANY_MACHINE = 64
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def default_threads() -> int:
    """Physical cores this process may run on, no more than its cgroup quota allows; at least 1.

    Matrix products gain nothing from the second hardware thread of a core, and more threads than a container's
    quota are throttled together.
    """
    cores = len({_core(cpu) for cpu in _allowed_cpus()})
    return max(1, min(cores, _quota()))


def most_threads() -> int:
    """The largest number worth asking for: far more threads than processors hang rather than run."""
    return max(MOST_ON_ANY_MACHINE, os.cpu_count() or 1)


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core(cpu: int) -> str:
    """A name that the hardware threads of one core share."""
    try:
        return Path(SIBLINGS.format(cpu)).read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Whole CPUs of the cgroup v2 quota, a large number without one."""
    unlimited = 1 << 20
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return unlimited
    return unlimited if quota == "max" else max(1, int(quota) // int(period))
