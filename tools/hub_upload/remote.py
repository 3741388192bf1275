"""The Hub, by huggingface_hub: one commit with all files. The token goes to the client and nowhere else."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi


def push(repo_id: str, files: Mapping[str, pathlib.Path], private: bool, message: str) -> str:
    """Make the repository if there is none, and commit the files; the commit's address. HF_ENDPOINT names the Hub."""
    token = huggingface_hub.get_token()
    if token is None:
        raise ValueError("no token for the Hub: set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    return str(api.create_commit(repo_id, operations=operations, commit_message=message).commit_url)


def redacted(text: str) -> str:
    """Without the token, on one line."""
    token = huggingface_hub.get_token()
    return " ".join((text.replace(token, "***") if token else text).split())
