"""Generation outside the training processes: a run's engines, where they run, and the weights they get."""

from __future__ import annotations

from megatron_dump.engines.cluster import connect
from megatron_dump.engines.engines import RunEngines
from megatron_dump.engines.start import start_engines

__all__ = ["RunEngines", "connect", "start_engines"]
