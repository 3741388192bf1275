"""Makes `trainer.v1.trainer_mode=curriculum` known to verl: to be named in VERL_USE_EXTERNAL_MODULES.

verl imports it in each of its processes, before any trainer is looked up.
"""

from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from megatron_dump.integrations.verl import MODE, CurriculumMixin


@register_trainer(MODE)
class PPOTrainerCurriculum(CurriculumMixin, PPOTrainerSync):
    """verl's synchronous trainer, drawing by a curriculum."""
