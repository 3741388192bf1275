"""Publish a policy on the Hugging Face Hub: a Hugging Face folder, or a checkpoint of a run, with a model card.

    # what would be uploaded, written to a folder and listed; no token, no network
    python tools/upload_to_hub.py results/kk/checkpoints/best OWNER/NAME --source models/Qwen2.5-7B \\
        --license apache-2.0 --evaluation results/kk/evaluation.json --dry-run preview

    # the same to the Hub; the token comes from HF_TOKEN or `hf auth login`
    python tools/upload_to_hub.py results/kk/checkpoints/best OWNER/NAME --source models/Qwen2.5-7B \\
        --license apache-2.0 --evaluation results/kk/evaluation.json

A checkpoint is converted first, as by tools/convert_checkpoint.py to-hf (which see for models larger than the memory of
one process). Only files that a published model consists of are taken; anything else in the folder is refused by name:
pickles, optimizer states, links that lead nowhere. Repositories are private unless --public.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from hub_upload.card import model_card
from hub_upload.files import check_text, checked_files
from hub_upload.remote import push, redacted

CONVERT = pathlib.Path(__file__).with_name("convert_checkpoint.py")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="a Hugging Face folder, or a checkpoint of a run")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; made where there is none")
    parser.add_argument("--license", required=True, help="of the weights, as the Hub knows it: apache-2.0, mit, …")
    parser.add_argument("--source", help="of a checkpoint: the folder the run started from")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="on the Hub, that training started from")
    parser.add_argument("--run", type=pathlib.Path, help="the run's folder, for the card (default: the checkpoint's)")
    parser.add_argument(
        "--evaluation",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="JSON",
        help="what examples/evaluate.py wrote, for the card; may be given several times",
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--message", default="Upload model", help="of the commit (default: %(default)s)")
    parser.add_argument("--dry-run", type=pathlib.Path, metavar="FOLDER", help="write there what would be uploaded")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, pathlib.Path]:
    """Path in the repository -> local file; what has to be made lies in `scratch`. ValueError for what is refused."""
    model, checkpoint = args.model.resolve(), None
    if not model.is_dir():
        raise ValueError(f"{args.model}: no such folder")
    if (model / "model" / "metadata.json").is_file():
        if not args.source:
            raise ValueError(f"{args.model} is a checkpoint: name the folder its run started from, --source")
        checkpoint, model = model, scratch / "converted"
        _convert(checkpoint, model, args.source)
    run = args.run or (checkpoint.parent.parent if checkpoint and (checkpoint / "state.json").is_file() else None)
    found = checked_files(model)
    card = model_card(model, args.repo_id, args.license, args.base_model, run, checkpoint, args.evaluation)
    check_text("README.md", card)
    (scratch / "README.md").write_text(card, encoding="utf-8")
    return {**found, "README.md": scratch / "README.md"}


def _convert(checkpoint: pathlib.Path, out: pathlib.Path, source: str) -> None:
    command = [sys.executable, str(CONVERT), "to-hf", str(checkpoint), str(out), "--source", source]
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # it has no use for them
    environment = {key: value for key, value in os.environ.items() if key not in secrets}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{checkpoint} could not be converted: {done.stderr.strip().splitlines()[-1:]}")


def write_preview(files: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    """Copies of the files. ValueError where the folder is there already."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--dry-run {folder}: the folder is not empty; name a new one")
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def upload(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        files = prepare(args, pathlib.Path(scratch))
        for name, path in files.items():
            print(f"{path.stat().st_size:>14,}  {name}")
        print(f"{sum(path.stat().st_size for path in files.values()):>14,}  bytes in {len(files)} files", flush=True)
        if args.dry_run is not None:
            write_preview(files, args.dry_run)
            print(f"dry run: nothing was uploaded; {args.repo_id} would get what lies in {args.dry_run}")
            return
        print(f"uploaded: {push(args.repo_id, files, not args.public, args.message)}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        upload(parse(argv))
    except Exception as error:  # noqa: BLE001  a traceback of the client's could hold the request, and so the token
        print(f"error: {redacted(f'{type(error).__name__}: {error}')}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
