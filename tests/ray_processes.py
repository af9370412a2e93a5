"""Finds the processes of the Ray cluster that this process started, to kill them as a machine would."""

from __future__ import annotations

import os
from pathlib import Path


def ray_processes(name: str, root: int | None = None) -> list[int]:
    """Process ids of the actors of class `name`, among those that descend from process `root` (None: this one)."""
    return [pid for pid in descendants(root or os.getpid()) if _title(pid).startswith(f"ray::{name}")]


def descendants(root: int) -> list[int]:
    """Process ids of the children of `root`, of their children, and so on."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if pid != root and _descends(pid, root)]


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
