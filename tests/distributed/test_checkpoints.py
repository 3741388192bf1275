"""Checkpoints: every bit over every layout, written in the background, damaged, kept and chosen."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import threading

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing, tensor_parallel

from megatron_dump.actor.checkpoint import Checkpoints
from megatron_dump.actor.offload import optimizer_parts
from megatron_dump.config import CheckpointCallbackParams
from tests.distributed.launch import RankFailed, run_ranks
from tests.distributed.runs import make_data, rows, train
from tests.distributed.tiny import make_actor, share_of, write_model

LAYOUTS = {"one": (1, 1, 1), "DP2": (1, 1, 2), "TP2": (2, 1, 2), "PP4": (1, 4, 4), "TP2xPP2xDP2": (2, 2, 8)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    write_model(path)
    return path


def step(actor, seed: int) -> dict[str, float]:
    batch = share_of(actor, seed)
    batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
    return actor.train_step(batch)


def digest(actor) -> str:
    """SHA-256 of this rank's weights, optimizer and schedule."""
    found = hashlib.sha256(json.dumps(actor.scheduler.state_dict()).encode())
    tensors = [p.data for module in actor.modules for p in module.parameters()]
    for part in optimizer_parts(actor.optimizer):
        for group in part.optimizer.param_groups:
            found.update(str(group["step"]).encode())
            for p in group["params"]:
                state = part.optimizer.state[p]
                tensors += [p.data, state["exp_avg"], state["exp_avg_sq"]]
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def whole(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in its full shape, read without a model."""
    found = dist_checkpointing.load_plain_tensors(str(folder / "model"))
    return {key: tensor for key, tensor in found.items() if torch.is_tensor(tensor)}


def test_a_run_continues_on_other_layouts(model, tmp_path):
    """Saved after step 2 at TP2 x PP2 x DP2, continued on other layouts: step 3 is the uninterrupted one."""

    def save():
        actor = make_actor(model, 2, 2)
        for seed in range(2):
            step(actor, seed)
        Checkpoints(tmp_path, actor).save(2, {"note": "kept"})
        return step(actor, 2)

    def load(tensor: int, pipeline: int):
        actor = make_actor(model, tensor, pipeline)
        store = Checkpoints(tmp_path, actor)
        state = store.load(store.latest())
        assert (state["note"], state["step"], actor.version) == ("kept", 2, 2)
        assert {group["step"] for group in actor.optimizer.param_groups if group["params"]} == {2}
        return step(actor, 2)

    uninterrupted = run_ranks(save, 8)[0]
    for tensor, pipeline, world in ((1, 1, 1), (2, 1, 2), (1, 2, 4)):
        for metrics in run_ranks(load, world, tensor, pipeline):
            assert metrics["actor/grad_norm"] == pytest.approx(uninterrupted["actor/grad_norm"], rel=1e-4)
            assert metrics["actor/loss"] == pytest.approx(uninterrupted["actor/loss"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_every_bit_survives_every_layout(model, tmp_path, precision):
    """Weights, moments and master weights wander from layout to layout; in the last file they are what they were.

    The tied embeddings make a bucket of their own on PP4, with padding before it that megatron-core miscounts.
    """

    def hop(layout: str, load: int | None):
        tensor, pipeline, _ = LAYOUTS[layout]
        actor = make_actor(model, tensor, pipeline, trainer={"precision": precision})
        store = Checkpoints(tmp_path, actor)
        if load is None:
            step(actor, 0)
        else:
            store.load(load)
        store.save((load or 0) + 1, {})

    hops = ("TP2xPP2xDP2", "PP4", "DP2") if precision == "32" else ("PP4", "TP2", "one")
    for i, layout in enumerate(hops):
        run_ranks(hop, LAYOUTS[layout][2], layout, i or None)
    first, last = run_ranks(lambda: [whole(tmp_path / f"step_{n}") for n in (1, len(hops))], 1)[0]
    assert first.keys() == last.keys()
    assert {key.split(".")[2] for key in first if key.startswith("optimizer.state.")} >= {"exp_avg", "exp_avg_sq"}
    for key in first:
        assert torch.equal(first[key], last[key]), key


PP2, EP2 = {"pipeline_model_parallel_size": 2}, {"expert_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2, "micro_batch_size": 2}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
HOPS = {  # model family; ranks and keys of `model:` of each hop
    "interleaved": ("qwen2", [(2, VPP2), (1, {}), (4, {**VPP2, "overlap_grad_reduce": True})]),
    "sequence and context": ("llama", [(2, SP2), (2, {"context_parallel_size": 2}), (2, VPP2)]),
    "experts": ("qwen3_moe", [(2, EP2), (1, {}), (4, {**EP2, **PP2})]),
}


@pytest.mark.parametrize("name", HOPS)
def test_every_bit_survives_chunks_sequences_and_experts(tmp_path, name):
    family, hops = HOPS[name]
    write_model(str(tmp_path / "model"), family=family)

    def hop(keys: dict, load: int):
        actor = make_actor(str(tmp_path / "model"), model=keys)
        store = Checkpoints(tmp_path, actor)
        if load:
            store.load(load)
        else:
            step(actor, 0)
        store.save(load + 1, {})

    for i, (world, keys) in enumerate(hops):
        run_ranks(hop, world, keys, i)
    first, last = run_ranks(lambda: [whole(tmp_path / f"step_{n}") for n in (1, len(hops))], 1)[0]
    assert first.keys() == last.keys()
    for key in first:
        assert torch.equal(first[key], last[key]), key


def test_saved_before_the_first_update(model, tmp_path):
    def save_and_train():
        actor = make_actor(model, 2)
        Checkpoints(tmp_path, actor).save(0, {})
        step(actor, 0)
        return digest(actor)

    def load_and_train():
        actor = make_actor(model, 2)
        store = Checkpoints(tmp_path, actor)
        step(actor, 5)  # moments and weights that the load must replace
        store.load(store.latest())
        step(actor, 0)
        return digest(actor)

    assert run_ranks(save_and_train, 2) == run_ranks(load_and_train, 2)


def test_generator_states_return_under_the_same_layout(model, tmp_path):
    def draws() -> list:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = torch.rand(3).tolist()
        return [random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), tracked]  # noqa: NPY002

    def rank(load: bool, tensor: int = 2):
        actor = make_actor(model, tensor)
        seed = 7 * load + actor.parallel.rank
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        draws()
        store = Checkpoints(tmp_path, actor)
        store.load(1) if load else store.save(1, {})
        return draws()

    saved = run_ranks(rank, 2, False)
    assert saved[0] != saved[1]
    assert run_ranks(rank, 2, True) == saved
    assert run_ranks(rank, 1, True, 1)[0] not in saved  # another layout: other ranks, their own states


# ----------------------------------------------------------------------------------------------- in the background
def test_training_goes_on_while_files_are_written(model, tmp_path):
    """A disk that does not answer: training goes on, nothing is complete; then the file holds the weights of the save.

    The restored weights are those at the save, although both ranks have trained on in the meantime.
    """
    background = CheckpointCallbackParams(async_save=True)

    def save():
        disk, synchronise = threading.Event(), os.fsync
        os.fsync = lambda file: (disk.wait(), synchronise(file))
        actor = make_actor(model)
        store = Checkpoints(tmp_path, actor, background)
        step(actor, 0)
        saved = digest(actor)
        state = {"learnt": [1]}
        store.save(1, state)
        for seed in range(1, 4):
            step(actor, seed)
            state["learnt"].append(seed)
            assert not store.poll() and store.latest() is None
        disk.set()
        store.wait()
        assert store.poll() and store.latest() == 1 and digest(actor) != saved
        return saved

    def load():
        actor = make_actor(model)
        assert Checkpoints(tmp_path, actor).load(1)["learnt"] == [1]
        return digest(actor)

    assert run_ranks(save, 2) == run_ranks(load, 2)


def test_a_save_waits_for_the_one_before(model, tmp_path):
    def save():
        actor = make_actor(model)
        store = Checkpoints(tmp_path, actor, CheckpointCallbackParams(async_save=True))
        for seed in range(3):
            step(actor, seed)
            store.save(seed + 1, {})
        store.wait()
        return store.latest()

    assert run_ranks(save, 2) == [3, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2", "step_3"]


@pytest.mark.parametrize("background", [False, True], ids=["synchronous", "async"])
def test_a_failed_write_is_an_error_on_every_rank(model, tmp_path, background):
    """Rank 1's disk takes no more than 4 kB a file."""

    def rank():
        actor = make_actor(model)
        store = Checkpoints(tmp_path, actor, CheckpointCallbackParams(async_save=background))
        store.save(1, {})
        store.wait()
        if actor.parallel.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(RuntimeError, match=r"checkpoint of step 2: rank 1 failed: OSError: .*File too large"):
            store.save(2, {})
            store.wait()
        return store.latest()

    assert run_ranks(rank, 2) == [1, 1]
    assert not (tmp_path / "step_2").exists()


def test_no_process_is_started_for_a_save(model, tmp_path):
    def children() -> tuple[int, list[str]]:
        return len(os.listdir(f"/proc/{os.getpid()}/task")), [
            pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()
        ]

    def _parent(pid: str) -> int:
        try:
            return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
        except FileNotFoundError:
            return 0

    def rank():
        actor = make_actor(model)
        disk, synchronise = threading.Event(), os.fsync
        os.fsync = lambda file: (disk.wait(), synchronise(file))
        store = Checkpoints(tmp_path, actor, CheckpointCallbackParams(async_save=True))
        before = children()
        store.save(1, {})
        during = children()
        disk.set()
        store.wait()
        return during[0] - before[0], during[1]

    assert run_ranks(rank, 1) == [(1, [])]


# --------------------------------------------------------------------------------------------- damaged, kept, chosen
def _truncate(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": ("model/__1_0.distcp", _truncate, r"model/__1_0.distcp has \d+ bytes instead of \d+"),
    "missing": ("model/__0_0.distcp", lambda p: p.unlink(), r"model/__0_0.distcp is missing"),
    "one bit": ("model/__1_0.distcp", _flip, r"model/__1_0.distcp is damaged: its checksum differs"),
    "state": ("state.json", _truncate, r"state.json has \d+ bytes instead of \d+"),
    "manifest": ("manifest.json", lambda p: p.unlink(), r"manifest.json is missing or not readable"),
}


def test_damage_is_one_line_that_names_the_file_and_the_way_back(model, tmp_path):
    def save():
        store = Checkpoints(tmp_path / "whole", make_actor(model))
        for n in (1, 2):
            store.save(n, {})

    def load():
        actor = make_actor(model)
        for case, (_, _, line) in DAMAGES.items():
            folder = tmp_path / case
            way_back = rf"step 1 is complete: .* exp_manager.resume_from_checkpoint={folder}/step_1$"
            store = Checkpoints(folder, actor)
            assert store.latest() == 2
            with pytest.raises(ValueError, match=rf"^{folder}/step_2/{line}.*; {way_back}"):
                store.load(2)
            assert (folder / "step_2").is_dir()
        folder = tmp_path / "manifest"
        store = Checkpoints(folder, actor, resume_from=str(folder / "step_1"))
        assert store.latest() == 1 and store.load(1)["step"] == 1
        return sorted(path.name for path in folder.iterdir())

    run_ranks(save, 2)
    for case, (name, damage, _) in DAMAGES.items():
        shutil.copytree(tmp_path / "whole", tmp_path / case)
        damage(tmp_path / case / "step_2" / name)
    assert run_ranks(load, 2)[0] == ["step_1", "step_2.superseded"]


def test_what_a_kill_leaves_is_ignored_and_cleaned(model, tmp_path):
    def save(n: int):
        store = Checkpoints(tmp_path, make_actor(model))
        assert store.latest() == (n - 1 or None)
        store.save(n, {})

    run_ranks(save, 1, 1)
    for name in ("step_2.partial", "step_9.partial", "step_0.deleted"):
        (tmp_path / name / "model").mkdir(parents=True)
    run_ranks(save, 1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_a_checkpoint_is_never_overwritten(model, tmp_path):
    def save():
        actor = make_actor(model)
        for n in (1, 1):
            Checkpoints(tmp_path, actor).save(n, {"n": n})

    with pytest.raises(RankFailed, match="step_1 is there already: move it away"):
        run_ranks(save, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_the_best_and_the_newest_are_kept(model, tmp_path):
    accuracies = [0.2, 0.5, 0.3, 0.5, 0.1]

    def save():
        actor = make_actor(model)
        keep = CheckpointCallbackParams(async_save=True, save_top_k=2, monitor="val/accuracy")
        kept = []
        for n, accuracy in enumerate(accuracies):
            store = Checkpoints(tmp_path, actor, keep)  # a new one: what is kept does not depend on a run's memory
            store.save(n, {"validation": {"val/accuracy": accuracy}})
            store.wait()
            kept.append(sorted(p.name for p in tmp_path.iterdir()))
        return kept

    expected = [[0], [0, 1], [1, 2], [1, 3], [1, 3, 4]]
    assert run_ranks(save, 1)[0] == [["best", *(f"step_{n}" for n in kept)] for kept in expected]
    assert (tmp_path / "best").resolve() == tmp_path.resolve() / "step_3"


def test_a_chosen_step_is_continued_and_a_restart_goes_on(model, tmp_path):
    chosen = str(tmp_path / "a" / "step_1")

    def rank():
        actor = make_actor(model)
        step(actor, 0)

        def run(folder: str, resume_from: str | None) -> int | None:
            store = Checkpoints(tmp_path / folder, actor, resume_from=resume_from)
            begun = store.latest()
            if begun is not None:
                store.load(begun)
            store.save((begun or 0) + 1, {})
            return begun

        assert [run("a", None) for _ in range(3)] == [None, 1, 2]
        assert run("a", chosen) == 1  # 2 and 3 are set aside
        assert [run("a", chosen) for _ in range(2)] == [2, 3]  # the same command, restarted by a scheduler
        names = sorted(p.name for p in (tmp_path / "a").iterdir())
        assert names == ["step_1", "step_2", "step_2.superseded", "step_3", "step_3.superseded", "step_4"]
        assert [run("b", chosen) for _ in range(2)] == [1, 2]  # another run from there
        for folder, source, message in (
            ("c", str(tmp_path / "nowhere"), "not the folder of a checkpoint"),
            ("a", str(tmp_path / "b" / "step_2"), "holds checkpoints of another run"),
        ):
            with pytest.raises(ValueError, match=rf"^exp_manager.resume_from_checkpoint={source}: .*{message}"):
                run(folder, source)

    run_ranks(rank, 1)


# ---------------------------------------------------------------------------------------------------------- whole runs
def test_a_run_in_the_background_is_the_run_in_the_foreground(tmp_path_factory, tmp_path):
    """async_save, retention and offloading change no bit of a run, nor do they over a resume on fewer ranks."""
    data = make_data(tmp_path_factory.mktemp("data"))
    common = {
        "model.data.validation_files": f"[{data / 'test.parquet'}]",
        "trainer.grpo.val_check_interval": 1,
        "trainer.grpo.val_samples_per_prompt": 1,
        "trainer.grpo.save_interval": 1,
        "trainer.grpo.run_validation_step_0": "false",
    }
    params = "exp_manager.checkpoint_callback_params"
    background = {
        **common,
        f"{params}.async_save": "true",
        f"{params}.save_top_k": 1,
        f"{params}.monitor": "val/accuracy",
        "model.grpo.offload_adam_states": "true",
    }
    train(2, data, tmp_path / "plain", **common)
    train(2, data, tmp_path / "background", **{**background, "trainer.grpo.max_steps": 2})
    train(2, data, tmp_path / "background", **background)
    plain, other = rows(tmp_path / "plain"), rows(tmp_path / "background")
    assert [row["step"] for row in plain] == [1, 1, 2, 2, 3, 3]
    for ours, theirs in zip(other, plain, strict=True):
        assert ours.keys() == theirs.keys()
        assert {k for k in ours if ours[k] != theirs[k] and not k.startswith(("timing_s/", "perf/"))} == set()
        assert "critic/score/mean" not in ours or ours["perf/memory_rss_gb"] > 0
    saved = run_ranks(lambda: [whole(tmp_path / n / "checkpoints/step_3") for n in ("plain", "background")], 1)[0]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    accuracy = {}
    for n in (1, 2, 3):
        state = json.loads((tmp_path / f"plain/checkpoints/step_{n}/state.json").read_text())
        accuracy[n] = state["validation"]["val/accuracy"]
        logged = [v for k, v in plain[2 * n - 1].items() if k.startswith("val/") and k.endswith("/accuracy")]
        assert accuracy[n] == pytest.approx(np.mean(logged))
    best = max(accuracy, key=lambda n: (accuracy[n], n))
    assert {p.name for p in (tmp_path / "background/checkpoints").iterdir()} == {"best", f"step_{best}", "step_3"}
    assert rows(tmp_path / "plain", "events.jsonl")[0]["message"].startswith("memory of rank")
