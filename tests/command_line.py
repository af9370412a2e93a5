"""Runs `condu-ray`: in this process, where that shows what is meant, or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Said:
    """What a command left behind: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document on standard output."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Learned:
    """What `condu-ray learn --json` of two tasks gave, on a real Ray cluster. said: the document it printed."""

    store: Path
    said: dict[str, Any]
    tasks: list[str]


def condu(*arguments: str | Path) -> Said:
    """`condu-ray ARGUMENTS` in this process."""
    from condu_ray.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return Said(code, out.getvalue(), err.getvalue())


def process(*arguments: str | Path, code: str = "from condu_ray.cli import main; main()", **environment: str) -> Said:
    """`condu-ray ARGUMENTS` as a process; `code`: what Python runs instead."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return Said(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
