"""The errors a user can meet. Each says in one sentence what is wrong and how to mend it; the CLI exits with 2.

ConduError
├── ConfigError      a setting, an option, a YAML file, the environment
├── DataError        pictures, labels, class lists, splits
├── ModelError       an open_clip name, tag, checkpoint, or weights that are not the store's
├── FusionError      deltas that cannot be fused (NaN, another layout)
├── TrainingError    training that cannot start or go on (NaN loss, too few resources)
├── ServiceError     a server that cannot be started or reached, or refuses
└── StoreError       the folder or bucket that holds versions
    ├── NotFound         no such store, version or task
    ├── DamagedObject    bytes that do not match their sha256
    ├── OtherBytes       an object is there already with other bytes
    └── VersionTaken     another writer committed this version number first
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class ConduError(Exception):
    """A mistake in the input or its surroundings; nothing was written.

    message: what is wrong, naming the thing and the value found. mend: what to do about it.
    """

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message, mend)
        self.message = message.rstrip(".")
        self.mend = mend.rstrip(".")

    def __str__(self) -> str:
        text = f"{self.message}: {self.mend}" if self.mend else self.message
        return text if text.endswith("?") else text + "."


class ConfigError(ConduError):
    """A setting, an option, a YAML file or an environment variable is wrong."""


class DataError(ConduError):
    """Pictures, labels, class lists or splits are wrong."""


class ModelError(ConduError):
    """A model cannot be loaded, or is not the one that the store was made with."""


class FusionError(ConduError):
    """A delta cannot be fused; the state before is untouched."""


class TrainingError(ConduError):
    """Training cannot start or cannot go on."""


class ServiceError(ConduError):
    """A server cannot be started, cannot be reached, or refuses."""


class StoreError(ConduError):
    """The store cannot be read or written."""


class NotFound(StoreError):
    """No such store, version or task."""


class DamagedObject(StoreError):
    """The bytes of a stored object do not match their sha256."""


class OtherBytes(StoreError):
    """An object that is to be written is there already with other bytes."""


class VersionTaken(StoreError):
    """Another writer committed this version number first."""


def without_credentials(text: str) -> str:
    """Returns the text with user and password of every address in it replaced by (set)."""
    return re.sub(r"//[^/\s]*@", "//(set)@", text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns 'did you mean X?' for the known name closest to `name`, or the list of known names (at most ten).

    Upper and lower case count as the same.
    """
    names = sorted(known)
    folded = {each.casefold(): each for each in names}
    close = get_close_matches(name.casefold(), folded, n=1)
    if close:
        return f"did you mean {folded[close[0]]}?"
    if not names:
        return "there are none yet"
    return "known: " + ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
