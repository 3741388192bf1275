"""The block `evaluate:` of examples/evaluate.py; examples/conf/evaluate/default.yaml documents every key."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dump.config.reading import load
from megatron_dump.config.schema import Config, ConfigError

MODES = ("greedy", "sampled")


@dataclasses.dataclass
class EvaluateConfig:
    checkpoint: str | None = None
    files: list[str] | None = None
    num_prompts: int | None = None
    modes: list[str] = dataclasses.field(default_factory=lambda: list(MODES))
    samples_per_prompt: int = 8
    k: list[int] | None = None
    confidence: float = 0.95
    bootstrap_samples: int = 1000
    bootstrap_seed: int = 1234
    out: str | None = None

    @property
    def ks(self) -> list[int]:
        """Those of pass@k and maj@k: by default the powers of two, and all samples."""
        n = self.samples_per_prompt
        return sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n} if self.k is None else {*self.k})


def load_evaluation(raw: DictConfig) -> tuple[Config, EvaluateConfig]:
    """A recipe of training with the block `evaluate`, checked. What only training needs may be missing.

    ConfigError in one line for what cannot be used.
    """
    whole = OmegaConf.to_container(raw)
    assert isinstance(whole, dict)
    given: dict[str, Any] = {str(key): value for key, value in whole.items()}
    block = given.pop("evaluate", {})
    known = [field.name for field in dataclasses.fields(EvaluateConfig)]
    for key in block:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean evaluate.{near[0]}?" if near else ""
            raise ConfigError(f"unknown key evaluate.{key}{hint} (examples/conf/evaluate/default.yaml lists every key)")
    try:
        wanted = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EvaluateConfig), block))
    except OmegaConfBaseException as error:
        hint = "; give a list: [file.parquet]" if "ListConfig" in str(error) else ""
        raise ConfigError(f"evaluate.{error.full_key}: {str(error).splitlines()[0]}{hint}") from None
    assert isinstance(wanted, EvaluateConfig)
    for path, value in (("model.data.train_files", ["none"]), ("exp_manager.explicit_log_dir", "results/evaluation")):
        *parents, leaf = path.split(".")
        node = given
        for name in parents:
            node = node.setdefault(name, {})
        if node.get(leaf, "???") == "???":
            node[leaf] = value
    config = load(OmegaConf.create(given))
    _check(config, wanted)
    return config, wanted


def _check(config: Config, wanted: EvaluateConfig) -> None:
    for key in ("num_prompts", "samples_per_prompt", "bootstrap_samples"):
        value = getattr(wanted, key)
        if value is not None and value < 1:
            raise ConfigError(f"evaluate.{key}={value}: must be at least 1")
    if not wanted.modes or set(wanted.modes) - {*MODES} or len(set(wanted.modes)) < len(wanted.modes):
        raise ConfigError(f"evaluate.modes={wanted.modes}: name greedy, sampled or both, each once")
    if "sampled" in wanted.modes and config.model.grpo.sampling_params.use_greedy:
        raise ConfigError(
            f"evaluate.modes={wanted.modes}: model.grpo.sampling_params.use_greedy=true leaves nothing to sample: set "
            "it to false, or evaluate.modes=[greedy]"
        )
    if not 0 < wanted.confidence < 1:
        raise ConfigError(f"evaluate.confidence={wanted.confidence}: must be between 0 and 1")
    if wanted.samples_per_prompt > 1000:
        raise ConfigError(f"evaluate.samples_per_prompt={wanted.samples_per_prompt}: must be at most 1000")
    for k in wanted.k or []:
        if not 1 <= k <= wanted.samples_per_prompt:
            raise ConfigError(
                f"evaluate.k={wanted.k}: {k} of evaluate.samples_per_prompt={wanted.samples_per_prompt} samples cannot "
                "be chosen; lower it, or draw more samples"
            )
    if wanted.k == []:
        raise ConfigError("evaluate.k=[]: name at least one number, or null for powers of two")
    if not (wanted.files if wanted.files is not None else config.model.data.validation_files):
        raise ConfigError(f"evaluate.files={wanted.files}: no files, nor any in model.data.validation_files; name some")
