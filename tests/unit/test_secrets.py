"""Secrets of a configuration are not written into the run's folder."""

import pytest
from omegaconf import OmegaConf

from megatron_dump.config import recorded

RAW = """
base: {api_key: s3cr3t}
exp_manager:
  folder: runs
  explicit_log_dir: ${exp_manager.folder}/a
  wandb_logger_kwargs: {api_key: "${oc.env:WANDB_API_KEY}", password: s3cr3t, project: p, copy: "${base}"}
  hosts: [{token: s3cr3t}, {token: 5}]
trainer: {max_generated_tokens: 7}
"""


def test_only_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    found = recorded(OmegaConf.create(RAW))
    assert "s3cr3t" not in str(found)
    manager = found["exp_manager"]
    assert manager["wandb_logger_kwargs"] == {
        "api_key": "${oc.env:WANDB_API_KEY}",
        "password": "***",
        "project": "p",
        "copy": {"api_key": "***"},
    }
    assert manager["explicit_log_dir"] == "runs/a" and manager["hosts"] == [{"token": "***"}, {"token": 5}]
    assert found["trainer"] == {"max_generated_tokens": 7}


def test_what_is_recorded_can_be_read_again(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "other")
    again = OmegaConf.create(recorded(OmegaConf.create(RAW)))
    assert again.exp_manager.wandb_logger_kwargs.api_key == "other"


def test_a_reference_that_cannot_be_resolved_is_an_error(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(Exception, match="WANDB_API_KEY"):
        recorded(OmegaConf.create(RAW))
