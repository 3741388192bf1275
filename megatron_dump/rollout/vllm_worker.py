"""What vLLM's workers do for us: a class that vLLM adds to its own worker's bases (`worker_extension_cls`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megatron_dump.rollout.vllm_relay import relayed


class WeightLoader:
    """Methods of a vLLM worker; called through LLM.collective_rpc."""

    def scale_logits(self: Any, factor: float) -> bool:
        """Multiply all logits, before vLLM takes their log-probabilities; False: this model's class cannot."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        layers = [m for m in self.get_model().modules() if isinstance(m, LogitsProcessor)]
        for layer in layers:
            layer.scale *= factor
        return len(layers) == 1

    def forget_names(self: Any) -> None:
        """Take the names off the shared memory of a CPU's workers, which vLLM leaves behind; its users keep it."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.name.startswith("vllm_dist_"):
                path.unlink(missing_ok=True)

    def load_relayed(self: Any, path: str) -> list[str]:
        """`load_all` of what vllm_relay.relay sends."""
        return WeightLoader.load_all(self, relayed(path))

    def load_all(self: Any, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Replace the weights; the parameters, in vLLM's names, that got none."""
        model: nn.Module = self.get_model()
        missing = {name for name, _ in model.named_parameters()}
        load = type(model).load_weights

        def watched(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            loaded = load(model, weights)
            missing.difference_update(loaded)
            return loaded

        model.load_weights = watched  # type: ignore[method-assign]  vLLM only warns of what is missing
        try:
            self.reload_weights(weights_iterator=weights)
        finally:
            del model.load_weights
        return sorted(missing)
