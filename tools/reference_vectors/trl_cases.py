"""What TRL's GRPOTrainer and RLOOTrainer compute: `_compute_loss` on given tensors, advantages of whole trainers."""

from __future__ import annotations

import collections
import tempfile
import types
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from reference_vectors.batches import MAX_LENGTH, SEED, result, tensors

EPS_LOW, EPS_HIGH, BETA = 0.2, 0.28, 0.1
GROUPS, GROUP_SIZE = 3, 4


def advantages() -> list[dict]:
    """Of whole training batches; float32, as TRL computes. With beta, RLOO subtracts the KL from the rewards."""
    cases = [from_trainer(GRPOTrainer, GRPOConfig, name="grpo", scale_rewards="group", beta=0.0)]
    cases.append(from_trainer(GRPOTrainer, GRPOConfig, name="dr_grpo", scale_rewards="none", beta=0.0))
    cases.append(from_trainer(RLOOTrainer, RLOOConfig, name="rloo", beta=0.0))
    cases.append(from_trainer(RLOOTrainer, RLOOConfig, name="rloo_with_kl", beta=BETA))
    return cases


def from_trainer(trainer_type: type, config_type: type, name: str, **options: Any) -> dict:
    """Advantages of one generated batch, with the rewards and, with beta, the log-probabilities that made them."""
    torch.manual_seed(SEED)
    rewards = (torch.randn(GROUPS * GROUP_SIZE, generator=torch.Generator().manual_seed(SEED)) * 3).tolist()
    rewards[:GROUP_SIZE] = [1.5] * GROUP_SIZE
    prompts = [{"prompt": f"w{i} w{i + 1}"} for i in range(GROUPS)]
    seen: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        config = config_type(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=GROUP_SIZE,
            per_device_train_batch_size=GROUPS * GROUP_SIZE,
            max_completion_length=5,
            **options,
        )
        trainer = trainer_type(
            model=tiny_model(folder),
            reward_funcs=lambda completions, **_: rewards,
            args=config,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer(),
        )
        with torch.no_grad():
            for parameter in trainer.model.parameters():  # away from the reference
                parameter.add_(torch.randn_like(parameter) * 0.05)
        compute = trainer._get_per_token_logps_and_entropies

        def recorded(*args: Any, **kwargs: Any) -> Any:
            told = compute(*args, **kwargs)
            seen.append(told[0])
            return told

        trainer._get_per_token_logps_and_entropies = recorded
        output = trainer._generate_and_score_completions([p for p in prompts for _ in range(GROUP_SIZE)])
    case = {
        "name": name,
        "rewards": rewards,
        "groups": [g for g in range(GROUPS) for _ in range(GROUP_SIZE)],
        "advantages": output["advantages"].tolist(),
    }
    if options["beta"]:
        policy, reference = seen
        mask = output["completion_mask"].tolist()
        case |= {"beta": BETA, "logprobs": policy.tolist(), "ref_logprobs": reference.tolist(), "mask": mask}
    return case


def tiny_model(folder: str) -> str:
    """The path of a random one: the trainers load their reference from there."""
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(13))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def losses() -> dict[str, list[dict]]:
    """Section of the file -> its cases."""
    cases = []
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        for level in ("token", "sequence"):
            for batch in ("ragged", "empty_row"):
                cases.append(compute_loss(batch, loss_type, level))
    for loss_type in ("cispo", "bnpo"):
        cases.append(compute_loss("ragged", loss_type, "token", beta=BETA, cap=1.3))
    cases.append(compute_loss("ragged", "grpo", "sequence", beta=BETA, cap=1.3))
    cases.append(compute_loss("empty_row", "bnpo", "token", delta=1.6))
    cases.append(compute_loss("ragged", "dapo", "token", beta=BETA, entropy_coef=0.01))
    return {"policy_losses": cases}


def compute_loss(
    name: str,
    loss_type: str,
    level: str,
    beta: float = 0.0,
    delta: float | None = None,
    cap: float | None = None,
    entropy_coef: float = 0.0,
) -> dict:
    """GRPOTrainer._compute_loss with log-probabilities and entropies in place of a model's."""
    batch = tensors(name)
    mask = batch["mask"]
    args = types.SimpleNamespace(use_bias_correction_kl=False, delta=delta, steps_per_generation=1)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logprobs"], batch["entropy"], None),
        args=args,
        model=torch.nn.Identity(),
        accelerator=Accelerator(cpu=True),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=EPS_LOW,
        epsilon_high=1 + EPS_HIGH if loss_type == "cispo" else EPS_HIGH,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=entropy_coef > 0,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    if cap is not None:
        inputs["importance_sampling_ratio"] = torch.exp(batch["old_logprobs"] - batch["rollout_logprobs"]).clamp(
            max=cap
        )
    told = GRPOTrainer._compute_loss(trainer, None, inputs)
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items() if "region_mean" in key}
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": trainer.epsilon_low,
        "epsilon_high": trainer.epsilon_high,
        "beta": beta,
        "delta": delta,
        "cap": cap,
        "entropy_coef": entropy_coef,
    }
    return {"batch": name, "max_length": MAX_LENGTH, "options": options, **result(told, batch, **metrics)}
