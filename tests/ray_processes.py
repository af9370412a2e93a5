"""Finds the processes of the Ray cluster that this process started, to kill them as a machine would."""

from __future__ import annotations

import os
from pathlib import Path


def ray_processes(name: str, root: int | None = None) -> list[int]:
    """Process ids of the actors of class `name`, among those that descend from process `root` (None: this one)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _title(int(entry.name)).startswith(f"ray::{name}"):
            found.append(int(entry.name))
    return [pid for pid in found if _descends(pid, root or os.getpid())]


def _title(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _descends(pid: int, root: int) -> bool:
    while pid > 1:
        if pid == root:
            return True
        try:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
