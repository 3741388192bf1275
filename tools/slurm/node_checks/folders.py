"""Is a folder shared? Every node writes a file into it and looks for the others'."""

from __future__ import annotations

import os
import pathlib
import secrets
import time


def _token_file(folder: pathlib.Path, node: int) -> pathlib.Path:
    return folder / f".preflight_{node}"


def write_token(folder: pathlib.Path, node: int) -> str:
    """Make the folder and put a file there; returns its content. OSError when that is not possible."""
    content = secrets.token_hex(16)  # another one each time: what an earlier job left is not taken for it
    folder.mkdir(parents=True, exist_ok=True)
    with _token_file(folder, node).open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return content


def unseen(folder: pathlib.Path, tokens: dict[int, str], limit_s: float) -> list[int]:
    """The nodes whose file has not appeared here with its content after `limit_s`."""
    end = time.monotonic() + limit_s
    missing = sorted(tokens)
    while True:
        os.listdir(folder)  # lets a network file system look again
        missing = [node for node in missing if not _holds(_token_file(folder, node), tokens[node])]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.2)


def _holds(path: pathlib.Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except FileNotFoundError:
        return False


def remove_token(folder: pathlib.Path, node: int) -> None:
    _token_file(folder, node).unlink(missing_ok=True)
