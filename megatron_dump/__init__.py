"""GRPO post-training on megatron-core with a data sampler that learns what to draw (DUMP, CurES)."""

__version__ = "0.1.0"
