"""The files of checkpoints: when a folder is complete, how one appears and disappears.

    step_<n>              complete: it appears under this name by one rename, when every file is on the disk
      manifest.json       what it consists of: size in bytes and CRC-32 of every other file
      state.json          the curriculum's state, the settings, the schedule, the last validation
      model/              weights and optimizer, in the format of megatron.core.dist_checkpointing
      random/rank_<r>.json  generator states of a rank
    step_<n>.partial      being written, or left behind by a kill
    step_<n>.deleted      being deleted, or left behind by a kill
    step_<n>.superseded   later than a step that was chosen to resume from; never touched again
    best                  link to the best one by `monitor`, of those that are kept

A rename is atomic and ordered after the contents (fsync of files and folders), so a kill or a power failure at any
moment leaves each folder either complete or under a name that is never read.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterable
from typing import Any

MANIFEST, STATE, BEST = "manifest.json", "state.json", "best"
_CHUNK = 1 << 24  # bytes read at once
Entries = dict[str, list[int]]  # path inside the checkpoint -> [bytes, CRC-32]


def step_folder(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"step_{step}"


def step_of(path: pathlib.Path) -> int | None:
    """The step of a complete checkpoint's folder, by its name; None for any other name."""
    match = re.fullmatch(r"step_(\d+)", path.name)
    return int(match[1]) if match else None


def steps(folder: pathlib.Path) -> list[int]:
    """The steps whose checkpoints are complete, ascending."""
    if not folder.is_dir():
        return []
    return sorted(step for path in folder.iterdir() if (step := step_of(path)) is not None)


def find(folder: pathlib.Path, resume_from: pathlib.Path | None) -> tuple[int, bool]:
    """(the step to continue from, -1 for none; is it `resume_from`).

    A run that began with `resume_from`, the folder of a checkpoint, and has saved since goes on from its own.
    ValueError when it cannot be used.
    """
    newest = max(steps(folder), default=-1)
    if resume_from is None:
        return newest, False
    path = step_folder(folder, newest)
    is_whole = newest >= 0 and damage(path, contents=False) is None
    if is_whole and read_state(path)["resumed_from"] == str(resume_from):
        return newest, False
    step = step_of(resume_from)
    if step is None or not resume_from.is_dir():
        raise ValueError("not the folder of a checkpoint; name one, …/checkpoints/step_<n>")
    if newest >= 0 and resume_from.parent != folder.resolve():
        raise ValueError(f"{folder} holds checkpoints of another run; choose another exp_manager.explicit_log_dir")
    return step, True


def start(folder: pathlib.Path, step: int) -> pathlib.Path:
    """An empty folder to write step_<step> into; what kills left behind is removed first.

    FileExistsError when that step's checkpoint is there already.
    """
    final = step_folder(folder, step)
    if final.exists():
        raise FileExistsError(f"{final} is there already: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob("step_*.partial"), *folder.glob("step_*.deleted")]:
        shutil.rmtree(left)
    partial = final.with_name(f"{final.name}.partial")
    for name in ("model", "random"):
        (partial / name).mkdir(parents=True)
    return partial


def entry(path: pathlib.Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file through to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(partial: pathlib.Path, step: int, state: str, written: Entries) -> pathlib.Path:
    """Turn what all ranks have written into step_<step>.

    state: JSON; written: of the files that ranks have written and synchronised; the others are this process's own.
    OSError when a file is not there or has another size: a folder that not all nodes share.
    """
    write_text(partial / STATE, state)
    own = [p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file()]
    for name in own:
        if name not in written:
            _synchronise(partial / name)
            written = {**written, name: entry(partial / name)}
    if damage := next(filter(None, (_difference(partial, name, *written[name][:1]) for name in written)), None):
        raise OSError(f"{damage}; exp_manager.explicit_log_dir must be on storage that all nodes share")
    write_text(partial / MANIFEST, json.dumps({"step": step, "files": dict(sorted(written.items()))}))
    for inside in (*(p for p in partial.iterdir() if p.is_dir()), partial):
        _synchronise(inside)
    final = step_folder(partial.parent, step)
    os.rename(partial, final)
    _synchronise(final.parent)
    return final


def discard(folder: pathlib.Path, discarded: Iterable[int]) -> list[pathlib.Path]:
    """Take checkpoints out of use by a rename each; returns the folders that are now to be removed."""
    doomed = []
    for step in discarded:
        path = step_folder(folder, step)
        doomed.append(path.with_name(f"{path.name}.deleted"))
        os.rename(path, doomed[-1])
        _synchronise(folder)
    return doomed


def link_best(folder: pathlib.Path, step: int | None) -> None:
    """Point `best` to step_<step>, by one rename; None: there is no best one."""
    link, fresh = folder / BEST, folder / f"{BEST}.new"
    fresh.unlink(missing_ok=True)  # of a kill
    if step is None:
        link.unlink(missing_ok=True)
        return
    fresh.symlink_to(step_folder(folder, step).name)
    os.replace(fresh, link)


def supersede(folder: pathlib.Path, after: int) -> None:
    """Set the checkpoints later than `after` aside, under names that nothing reads."""
    later = [step_folder(folder, step) for step in steps(folder) if step > after]
    for path in later:
        endings = itertools.chain([""], (f"_{n}" for n in itertools.count(2)))
        names = (path.with_name(f"{path.name}.superseded{ending}") for ending in endings)
        os.rename(path, next(name for name in names if not name.exists()))
    if later:
        _synchronise(folder)


def damage(path: pathlib.Path, part: int = 0, parts: int = 1, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if nothing is.

    Looks at one file in `parts`, so that ranks share the work; without `contents` at sizes alone.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (FileNotFoundError, KeyError, json.JSONDecodeError) as error:
        return f"{path / MANIFEST} is missing or not readable ({type(error).__name__})"
    for name, (size, crc) in list(files.items())[part::parts]:
        if different := _difference(path, name, size):
            return different
        if contents and entry(path / name)[1] != crc:
            return f"{path / name} is damaged: its checksum differs from the manifest's"
    return None


def _difference(path: pathlib.Path, name: str, size: int) -> str | None:
    if not (path / name).is_file():
        return f"{path / name} is missing"
    found = (path / name).stat().st_size
    return None if found == size else f"{path / name} has {found} bytes instead of {size}"


def read_state(path: pathlib.Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text())


def _synchronise(path: pathlib.Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
