"""Which files of a folder are published: an allowlist, and a look into each."""

from __future__ import annotations

import json
import pathlib
import re

ALLOWED = re.compile(
    r"(model|model-\d{5}-of-\d{5})\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|tokenizer\.model|chat_template\.(jinja|json)|(LICENSE|NOTICE)(\.txt|\.md)?"
)
_OPTIMIZER = re.compile(r"optim|exp_avg|momentum|master_param", re.IGNORECASE)
_LONGEST_HEADER = 100_000_000  # bytes of JSON, as in the format's own limit
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")


def checked_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name -> file, of everything that is to be published; a README.md is left to the card.

    ValueError, naming all of them, when the folder holds anything else.
    """
    found, wrong = {}, []
    for path in sorted(folder.iterdir()):
        if path.name in ("README.md", ".gitattributes", ".git", ".cache"):
            continue
        if not path.is_file() or not ALLOWED.fullmatch(path.name):
            wrong.append(path.name)
        elif why := _damage(path):
            wrong.append(f"{path.name} ({why})")
        else:
            found[path.name] = path
    if wrong:
        raise ValueError(
            f"{folder} holds what is no part of a published model: {', '.join(wrong)}; only safetensors, config, "
            "tokenizer and licence are uploaded: move the rest away"
        )
    if "config.json" not in found or not any(name.endswith(".safetensors") for name in found):
        raise ValueError(f"{folder} is no Hugging Face folder: it needs config.json and model*.safetensors")
    return found


def check_text(name: str, text: str) -> None:
    """ValueError where a text holds what looks like an access key; which one is not said."""
    if _SECRET.search(text):
        raise ValueError(f"{name} holds what looks like an access key; remove it")


def _damage(path: pathlib.Path) -> str | None:
    """What is wrong with an allowed file's contents."""
    if path.suffix == ".safetensors":
        return _tensor_damage(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80" or start[:2] == b"PK":
        return "a pickle or an archive"
    if path.name == "tokenizer.model":  # SentencePiece's, binary
        return None
    try:
        text = path.read_text(encoding="utf-8")
        check_text(path.name, text)
        if path.suffix == ".json":
            json.loads(text)
    except ValueError as error:
        return str(error)
    return None


def _tensor_damage(path: pathlib.Path) -> str | None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(_LONGEST_HEADER, path.stat().st_size):
            return "no safetensors file"
        try:
            header = json.loads(file.read(size))
        except ValueError:
            return "no safetensors file"
    states = [name for name in header if _OPTIMIZER.search(name)]
    return f"an optimizer's states: {states[0]}" if states else None
