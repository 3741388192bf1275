"""Losses, KL and advantages against what TRL and verl computed: tools/make_reference_vectors.py made the files.

Where ours differs on purpose, the test says how, and compares through the conversion it names.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch

from megatron_dump import grpo
from megatron_dump.kl_reward import KLInReward, sequence_kl
from megatron_dump.types import TrainBatch
from tests.unit.curricula import outcomes

VECTORS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((pathlib.Path(__file__).parent / "reference_vectors").glob("*.json"))
}
TRL, VERL = VECTORS["trl"], VECTORS["verl"]


def _batch(vectors: dict, name: str) -> dict[str, torch.Tensor]:
    batch = {key: torch.tensor(value, dtype=torch.float64) for key, value in vectors["batches"][name].items()}
    batch["logprobs"].requires_grad_()
    batch["entropy"].requires_grad_()
    return batch


def _weights(batch: dict[str, torch.Tensor], loss_agg_mode: str, max_length: int) -> torch.Tensor:
    lengths = batch["mask"].sum(1).numpy().astype(np.int64)
    rows = np.arange(len(lengths))
    return torch.from_numpy(grpo.loss_weights(loss_agg_mode, rows, lengths, np.ones_like(rows), max_length))


def _loss(batch: dict[str, torch.Tensor], options: grpo.LossOptions, weights: torch.Tensor):
    """Our loss, its gradients and its metrics as means over tokens."""
    n = batch["mask"].sum()
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    given = {name: batch[name] for name in ("ref_logprobs", "rollout_logprobs", "entropy")}
    loss, sums = grpo.policy_loss(*(batch[name] for name in names), n, options, weights=weights, **given)
    loss.backward()
    gradients = {f"d_{name}": batch[name].grad for name in ("logprobs", "entropy")}
    return loss.item(), gradients, {name.split("/")[1]: (value / n).item() for name, value in sums.items()}


def _same_gradients(ours: dict[str, torch.Tensor], case: dict, atol: float = 1e-14) -> None:
    for name, gradient in ours.items():
        if name in case:
            torch.testing.assert_close(gradient, torch.tensor(case[name], dtype=torch.float64), rtol=1e-11, atol=atol)
        else:
            assert gradient is None, name


def test_every_file_names_its_package_and_version():
    assert VECTORS.keys() == {"trl", "verl"}
    for name, vectors in VECTORS.items():
        assert vectors["package"] == name
        assert all(part.isdigit() for part in vectors["version"].split("."))
        assert vectors["torch"] and vectors["made_by"].startswith("python tools/make_reference_vectors.py")


def _name(case: dict) -> str:
    said = "-".join(str(v) if isinstance(v, str) else f"{k}={v}" for k, v in case["options"].items() if v)
    return f"{case['batch']}-{said}"


@pytest.mark.parametrize("case", VERL["policy_losses"], ids=_name)
def test_policy_losses_are_verl_s(case):
    """Losses, gradients and the fractions clipped.

    Differences: verl adds 1e-8 to a row's length in seq-mean-token-mean. It bounds log-ratios below as well, at -20,
    where ours go on; bounds a row's log-ratio in gspo at 10, ours at 20. In gspo it corrects each token's gradient
    by the token's own importance weight, ours (like TRL) a row's by their mean: their sums over a row are the same.
    """
    chosen = dict(case["options"])
    mode, cap = chosen.pop("loss_agg_mode"), chosen["importance_sampling_cap"]
    batch = _batch(VERL, case["batch"])
    batch["old_logprobs"] = torch.minimum(batch["old_logprobs"], batch["logprobs"].detach() + 20)
    lengths = batch["mask"].sum(1)
    weights = _weights(batch, mode, case["max_length"])
    if mode == "seq-mean-token-mean":
        weights = weights * lengths / (lengths + 1e-8)
    loss, gradients, metrics = _loss(batch, grpo.LossOptions(**chosen), weights)
    assert loss == pytest.approx(case["loss"], rel=1e-12)
    if chosen["loss_mode"] == "gspo" and cap is not None:
        gradients["d_logprobs"] = gradients["d_logprobs"].sum(1)
        case = {**case, "d_logprobs": np.sum(case["d_logprobs"], axis=1).tolist()}
    _same_gradients(gradients, case, atol=1e-9 if case["batch"] == "extreme" else 1e-14)  # 16 tokens share e^-20
    for name, value in case["metrics"].items():
        if name != "pg_clipfrac_lower" or chosen["ratio_clip_c"] is not None:
            assert metrics[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("case", VERL["kl_penalties"], ids=lambda case: case["kind"])
def test_kl_estimates_are_verl_s(case):
    """Difference: verl bounds k3 at 10; no token of the batch comes near."""
    batch = _batch(VERL, case["batch"])
    ours = grpo.kl_estimate(batch["logprobs"], batch["ref_logprobs"], case["kind"])
    ours.sum().backward()
    assert ours.max() < 10
    np.testing.assert_allclose(ours.detach().numpy(), case["kl"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(batch["logprobs"].grad.numpy(), case["d_logprobs"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", VERL["advantages"], ids=lambda case: case["name"])
def test_advantages_of_ragged_groups_are_verl_s(case):
    """Difference: for a group of one verl's grpo and rloo return the reward itself (grpo's over 1 + 1e-6); ours are 0,
    as those of its rloo_vectorized."""
    estimator = "rloo" if "rloo" in case["name"] else "grpo"
    groups = torch.tensor(case["groups"])
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)
    ours = grpo.group_advantages(rewards, groups, normalize=case["name"] == "grpo", estimator=estimator)
    alone = (groups[:, None] == groups).sum(1) == 1
    assert alone.sum() == 1 and ours[alone] == 0
    theirs = torch.tensor(case["advantages"], dtype=torch.float64)
    of_theirs = {"grpo": rewards[alone] / (1 + 1e-6), "rloo_vectorized": torch.zeros(1).double()}
    torch.testing.assert_close(theirs[alone], of_theirs.get(case["name"], rewards[alone]), rtol=1e-7, atol=0)
    torch.testing.assert_close(ours[~alone], theirs[~alone], rtol=1e-12, atol=1e-14)


def _kl_batch(policy, reference, mask) -> TrainBatch:
    policy, reference, mask = (np.array(values) for values in (policy, reference, mask))
    empty = np.zeros_like(mask)
    batch = TrainBatch(empty.astype(int), mask, np.zeros(len(mask), np.float32), empty, float(mask.sum()))
    batch.old_logprobs, batch.ref_logprobs = policy, reference
    return batch


def _told(rewards, groups, kl, options: KLInReward):
    zeros = np.zeros(len(rewards))
    return options.penalized(outcomes(0, zeros.astype(int), zeros, np.array(rewards), np.array(groups)), kl)


@pytest.mark.parametrize("case", VERL["kl_in_reward"], ids=lambda case: case["kind"])
def test_rewards_less_the_kl_are_verl_s(case):
    """verl's grow token by token: ours are their sums."""
    arrays = VERL["batches"][case["batch"]]
    batch = _kl_batch(arrays["old_logprobs"], arrays["ref_logprobs"], arrays["mask"])
    kl = sequence_kl(batch, case["kind"])
    told = _told(case["rewards"], case["groups"], kl, KLInReward(case["kl_penalty"], case["kind"], False, "rloo"))
    np.testing.assert_allclose(told.rewards, case["penalized"], rtol=1e-6)  # DataProto keeps them in float32
    np.testing.assert_allclose(told.advantages, case["advantages"], rtol=1e-6)
    assert (kl / batch.loss_mask.sum(1)).mean() == pytest.approx(case["reward_kl_penalty"], rel=1e-6)


AGGREGATIONS = {"grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}  # the others: token-mean


@pytest.mark.parametrize("case", TRL["policy_losses"], ids=_name)
def test_policy_losses_are_trl_s(case):
    """Losses, gradients and the fraction clipped.

    Differences: TRL's means over rows count empty rows too. Its cispo has no lower bound, and epsilon_high is the upper
    one itself. `delta`, INTELLECT-2's bound, is a dual clip's c as long as it is above 1 + epsilon_high. Its entropy
    bonus is a mean over tokens whatever the loss_type.
    """
    theirs, batch = case["options"], _batch(TRL, case["batch"])
    mode = AGGREGATIONS.get(theirs["loss_type"], "token-mean")
    cispo = theirs["loss_type"] == "cispo"
    options = grpo.LossOptions(
        loss_mode="cispo" if cispo else {"token": "vanilla", "sequence": "gspo"}[theirs["importance_sampling_level"]],
        ratio_eps_low=1.0 if cispo else theirs["epsilon_low"],
        ratio_eps_high=theirs["epsilon_high"] - 1 if cispo else theirs["epsilon_high"],
        ratio_clip_c=theirs["delta"],
        kl_penalty=theirs["beta"],
        entropy_bonus=theirs["entropy_coef"],
        importance_sampling_cap=theirs["cap"],
    )
    assert mode == "token-mean" or not theirs["entropy_coef"]
    weights = _weights(batch, mode, case["max_length"])
    if mode != "token-mean":
        weights = weights * (batch["mask"].sum(1) > 0).double().mean()
    loss, gradients, metrics = _loss(batch, options, weights)
    assert loss == pytest.approx(case["loss"], rel=1e-12)
    _same_gradients(gradients, case)
    if theirs["importance_sampling_level"] == "token" and not cispo:  # TRL's gspo counts rows, ours their tokens
        assert metrics["pg_clipfrac"] == pytest.approx(case["metrics"]["clip_ratio/region_mean"], rel=1e-6)


@pytest.mark.parametrize("case", TRL["advantages"], ids=lambda case: case["name"])
def test_advantages_of_whole_trl_trainers(case):
    """float32 there. Difference: TRL adds 1e-4 to the std, which `eps` says here."""
    rewards, groups = torch.tensor(case["rewards"], dtype=torch.float64), torch.tensor(case["groups"])
    estimator = "rloo" if "rloo" in case["name"] else "grpo"
    if "beta" in case:
        kl = sequence_kl(_kl_batch(case["logprobs"], case["ref_logprobs"], case["mask"]), "k1")
        assert np.ptp(kl) > 1
        ours = _told(rewards, groups, kl, KLInReward(case["beta"], "k1", False, "rloo")).advantages
    else:
        ours = grpo.group_advantages(rewards, groups, case["name"] == "grpo", eps=1e-4, estimator=estimator).numpy()
    np.testing.assert_allclose(ours, case["advantages"], rtol=2e-6, atol=2e-6)
