"""What to train on next. Numpy only, and deterministic in (seed, step, what was observed)."""

from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.curriculum.sampler import MegatronCurriculumBatchSampler

__all__ = ["Curriculum", "MegatronCurriculumBatchSampler"]
