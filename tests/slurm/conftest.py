"""One cluster for all tests of this folder, and the run that all are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import make_data
from tests.slurm import pyxis_stub
from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import Jobs, Run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(f"no Slurm cluster in CI: {reason}")
        pytest.skip(f"no Slurm cluster: {reason}; `make test-slurm` as root installs what is needed")
    with Cluster(nodes=3, plugstack=pyxis_stub.build(tmp_path_factory.mktemp("pyxis"))) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def jobs(cluster, data, tmp_path) -> Iterator[Jobs]:
    """Jobs of launch_slurm.sh; what still runs at the end of the test is cancelled, and every node is there again."""
    jobs = Jobs(cluster, data, tmp_path)
    yield jobs
    jobs.clear()


@pytest.fixture(scope="session")
def plain(cluster, data, tmp_path_factory) -> Run:
    """An undisturbed run on two nodes."""
    jobs = Jobs(cluster, data, tmp_path_factory.mktemp("plain"))
    run = jobs.submit()
    cluster.wait_job(run.job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=240)
    return run
