"""The curriculum in a plain PyTorch loop: REINFORCE with group baselines on sums of small and larger numbers.

    python examples/integrations/plain_pytorch.py [--steps 400] [--out results/plain]

Started again with more steps, it continues from the file in --out, with the very draws it would have made.
"""

import argparse
import os
import pathlib

import torch
from torch import nn

from megatron_dump.integrations.hosted import HostedCurriculum

PROMPTS, SAMPLES, TOP = 64, 8, 48  # of a step, of a prompt; answers lie below TOP


def sums() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Source of every row, its two numbers int64 [R, 2], and their sum int64 [R]."""
    pairs = torch.cartesian_prod(torch.arange(TOP // 2), torch.arange(TOP // 2))
    sources = [f"below_{8 * (1 + max(pair) // 8)}" for pair in pairs.tolist()]
    return sources, pairs, pairs.sum(dim=1)


def main(argv: list[str] | None = None) -> tuple[HostedCurriculum, nn.Module]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/plain"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sources, pairs, answers = sums()
    layers = (nn.Embedding(TOP // 2, 64), nn.Flatten(), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, TOP))
    policy = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)

    # The curriculum: which block, of how many rows, and a name for the data.
    block = {"sources": {"name": "dump_ucb", "window": 300, "temperature": 0.1, "floor": 0.05}}
    curriculum = HostedCurriculum(block, sources, PROMPTS, SAMPLES, seed=0, fingerprint="sums, 24 x 24")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        curriculum.load_state_dict(saved["curriculum"])

    while curriculum.step < args.steps:
        draw = curriculum.next_draw()
        rows = torch.from_numpy(draw.prompt_ids)
        torch.manual_seed(1 + draw.step)  # a run that is continued samples what it would have sampled
        answer = torch.distributions.Categorical(logits=policy(pairs[rows]))
        samples = answer.sample((SAMPLES,))  # [G, P]
        rewards = (samples == answers[rows]).float()
        curriculum.learn(rewards.T.numpy())  # [P, G]
        advantages = (rewards - rewards.mean(dim=0)) / (rewards.std(dim=0) + 1e-6)
        loss = -(advantages * answer.log_prob(samples)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if curriculum.step % 100 == 0 or curriculum.step == args.steps:
            mix = ", ".join(f"{name} {w:.2f}" for name, w in zip(curriculum.sources, draw.weights))
            print(f"step {curriculum.step}: reward {rewards.mean():.2f}; {mix}", flush=True)
            state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "curriculum": curriculum.state_dict()}, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
    return curriculum, policy


if __name__ == "__main__":
    main()
