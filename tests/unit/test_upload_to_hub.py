"""tools/upload_to_hub.py against a small server that speaks the Hub's API: what arrives, what is refused, no token."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file

from megatron_dump.config import Config

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "tools"))

from hub_upload.card import model_card
from hub_upload.files import check_text, checked_files

REPO = pathlib.Path(__file__).resolve().parents[2]
TINY = REPO / "examples/models/kk-tiny"
TOKEN = "hf_" + "Qx7" * 11


class Hub(http.server.BaseHTTPRequestHandler):
    """Keeps what is sent to it; `refuses`: it answers every commit with the request's own headers, as a proxy might."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        answer, status = {}, 200
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/me/{json.loads(body)['name']}"}
        elif self.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
        elif "/commit/" in self.path and self.server.refuses:
            answer, status = {"error": f"no: {dict(self.headers)}"}, 403
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/me/tiny/commit/abc", "commitOid": "abc"}
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 200:
            self.send_header("X-Error-Message", f"refused {self.headers.get('Authorization')}")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def hub(refuses: bool = False):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.refuses = [], refuses
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def run(folder: pathlib.Path, *arguments: object, token: str | None = TOKEN, endpoint: str = "http://127.0.0.1:9"):
    environment = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    environment |= {
        "PYTHONPATH": str(REPO),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DEBUG": "",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_TOKEN", None)
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "tools/upload_to_hub.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert TOKEN not in done.stdout + done.stderr
    return done


@pytest.fixture
def model(tmp_path):
    """kk-tiny without the files that are no part of a published model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.name not in ("warmstart.jsonl", "README.md"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_folder_arrives_whole_in_one_commit(model, tmp_path):
    with hub() as server:
        done = run(
            tmp_path, model, "me/tiny", "--license", "apache-2.0", "--base-model", "x/y", endpoint=server.address
        )
    assert done.returncode == 0, done.stderr
    assert "uploaded: " in done.stdout and "/me/tiny/commit/abc" in done.stdout
    assert {authorization for _, authorization, _ in server.seen if authorization} == {f"Bearer {TOKEN}"}
    [created] = [json.loads(body) for path, _, body in server.seen if path == "/api/repos/create"]
    assert created["name"] == "tiny" and (created.get("private") is True or created.get("visibility") == "private")
    [commit] = [body for path, _, body in server.seen if path.startswith("/api/models/me/tiny/commit/")]
    sent = [json.loads(line) for line in commit.splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in sent if line["key"] == "file"
    }
    card = files.pop("README.md").decode()
    assert files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert metadata(card)["license"] == "apache-2.0" and metadata(card)["base_model"] == "x/y"


def test_a_dry_run_writes_what_would_be_sent_without_token_or_network(model, tmp_path):
    out = tmp_path / "preview"
    arguments = (model, "me/tiny", "--license", "mit", "--dry-run", out)
    done = run(tmp_path, *arguments, token=None)
    assert done.returncode == 0, done.stderr
    there = {path.name: path.read_bytes() for path in out.iterdir()}
    assert metadata(there.pop("README.md").decode())["license"] == "mit"
    assert there == {path.name: path.read_bytes() for path in model.iterdir()}
    assert all(name in done.stdout for name in there) and "nothing was uploaded" in done.stdout
    again = run(tmp_path, *arguments)
    assert again.returncode == 1 and "the folder is not empty" in again.stderr


def test_the_token_is_said_in_no_error(model, tmp_path):
    """`run` looks at every output. The server gives the request back in its refusal."""
    with hub(refuses=True) as server:
        done = run(tmp_path, model, "me/tiny", "--license", "mit", endpoint=server.address)
    assert done.returncode == 1 and "***" in done.stderr and "Traceback" not in done.stderr
    assert any(f"Bearer {TOKEN}" == authorization for _, authorization, _ in server.seen)
    done = run(tmp_path, model, "me/tiny", "--license", "mit", token=None)
    assert done.returncode == 1 and "no token for the Hub: set HF_TOKEN" in done.stderr


def test_what_is_no_part_of_a_model_is_refused_by_name(model):
    assert "model.safetensors" in checked_files(model)
    (model / "training_args.bin").write_bytes(pickle.dumps({}))
    (model / "optimizer.pt").write_bytes(b"PK\x03\x04")
    (model / "global_step20").mkdir()
    (model / "vocab.txt").write_bytes(pickle.dumps({}))  # an allowed name
    (model / "merges.txt").symlink_to(model / "nowhere")
    (model / "generation_config.json").write_text("{")
    save_file({"state.exp_avg": torch.zeros(2)}, model / "model-00001-of-00002.safetensors")
    (model / "model-00002-of-00002.safetensors").write_bytes(pickle.dumps(list(range(100))))
    with pytest.raises(ValueError, match="only safetensors, config, tokenizer and licence are uploaded") as caught:
        checked_files(model)
    for name in (
        "merges.txt",
        "training_args.bin",
        "optimizer.pt",
        "global_step20",
        "vocab.txt (a pickle or an arch",
        "model-00001-of-00002.safetensors (an optimizer's states: state.exp_avg)",
        "generation_config.json (",
        "model-00002-of-00002.safetensors (no safetensors file)",
    ):
        assert name in str(caught.value)
    assert "tokenizer.json" not in str(caught.value)


def test_a_folder_without_weights_and_texts_with_keys(model):
    (model / "chat_template.jinja").write_text(f"key: {TOKEN}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja \(.*looks like an access key") as caught:
        checked_files(model)
    assert TOKEN not in str(caught.value)
    (model / "chat_template.jinja").unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it needs config\.json and model\*\.safetensors"):
        checked_files(model)
    check_text("card", "hf_short and sk-ipping")


EVALUATION = {
    "model": "/home/somebody/base",
    "checkpoint": "/home/somebody/kk/checkpoints/step_2",
    "settings": {"confidence": 0.95, "sampling": {"temperature": 0.7}},
    "files": {
        "/home/somebody/data/test.parquet": {
            "prompts": 6,
            "modes": {
                "sampled": {
                    "sources": {
                        "kk|2": {
                            "accuracy": {"value": 0.5, "low": 0.25, "high": 0.75},
                            "prompts": 6,
                            "samples": 2,
                            "pass_rates": [0.5],
                            "pass@2": {"value": 0.75, "low": None, "high": None},
                        }
                    },
                    "mean": {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}},
                }
            },
        }
    },
}


def test_the_card_has_configuration_data_and_results(model, tmp_path):
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints/step_2"
    checkpoint.mkdir(parents=True)
    config = OmegaConf.to_container(OmegaConf.structured(Config))
    config["trainer"]["grpo"]["samples_per_prompt"] = 16
    config["model"]["data"]["train_files"] = ["/home/somebody/data/train.parquet"]
    config["model"]["data"]["rewards"] = {"*": {"judge": {"token": "${oc.env:JUDGE_TOKEN}"}}}
    config["exp_manager"]["wandb_logger_kwargs"] = {"entity": "secret-team"}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    state = {"step": 2, "curriculum": {"fingerprint": "f" * 64}, "validation": {"val/accuracy": 0.25}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    make = lambda *files: model_card(model, "me/tiny", "mit", None, folder, checkpoint, files)  # noqa: E731
    card = make(tmp_path / "evaluation.json")
    assert "Weights of training step 2." in card and "f" * 64 in card and "\n# tiny\n" in card
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown == {
        "trainer.grpo.samples_per_prompt": 16,
        "model.data.train_files": ["train.parquet"],
        "model.data.rewards.*.judge.token": "${oc.env:JUDGE_TOKEN}",
    }
    assert "| kk\\|2 | 0.500 (0.250…0.750) | 0.750 (–…–) |" in card and "**test.parquet** (6 prompts, sampled" in card
    assert "Of `step_2`" in card and "somebody" not in card and "secret-team" not in card
    assert "## Validation" not in card and "| accuracy | 0.250 |" in make()
    (tmp_path / "other.json").write_text(json.dumps({**EVALUATION, "checkpoint": "kk/checkpoints/step_1"}))
    with pytest.raises(ValueError, match=r"--evaluation .*other\.json: it is of step_1, not of step_2"):
        make(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--evaluation .*other\.json: not what examples/evaluate\.py writes"):
        make(tmp_path / "other.json")


def test_a_checkpoint_needs_its_source(tmp_path):
    (tmp_path / "step_1/model").mkdir(parents=True)
    (tmp_path / "step_1/model/metadata.json").write_text("{}")
    done = run(tmp_path, tmp_path / "step_1", "me/tiny", "--license", "mit")
    assert done.returncode == 1 and "name the folder its run started from, --source" in done.stderr
    done = run(tmp_path, tmp_path / "step_1", "me/tiny", "--license", "mit", "--source", TINY)
    assert done.returncode == 1 and "could not be converted: " in done.stderr
