"""A folder that appears under its name only when everything in it is written."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import shutil
from collections.abc import Sequence


class PartialFolder:
    """PATH.partial, until `publish` gives it its name. For one process; the others write into `partial`."""

    def __init__(self, path: str | pathlib.Path, replaceable: Sequence[str] = ()) -> None:
        """replaceable: patterns of names; an existing folder is replaced if it holds nothing else."""
        self.path = pathlib.Path(path).resolve()
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._old = self.path.with_name(self.path.name + ".replaced")
        self._replaceable = replaceable

    def prepare(self) -> None:
        """Make PATH.partial anew. FileExistsError when there is something at PATH that may not be replaced."""
        if _occupied(self.path):
            if not (self._replaceable and self.path.is_dir()):
                raise FileExistsError(f"{self.path} exists: choose another folder, or ask for it to be replaced")
            for name in sorted(p.name for p in self.path.iterdir()):
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self._replaceable):
                    raise FileExistsError(f"{self.path} cannot be replaced: move {name} out of it")
        self.discard()
        self.partial.mkdir(parents=True)

    def discard(self) -> None:
        """Remove what an unfinished write left."""
        if self.partial.exists():
            shutil.rmtree(self.partial)

    def publish(self) -> None:
        """Rename to PATH; what was there is PATH.replaced until then, and removed after."""
        if _occupied(self.path):
            if self._old.exists():
                shutil.rmtree(self._old)
            os.replace(self.path, self._old)
        os.replace(self.partial, self.path)
        if self._old.exists():
            shutil.rmtree(self._old)


def _occupied(path: pathlib.Path) -> bool:
    """Is there anything that a rename to `path` would lose, or fail on?"""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
