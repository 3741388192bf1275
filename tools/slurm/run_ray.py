"""Ray over nodes of a Slurm job: one process a node, and the wait until all are there.

    run_ray.py head ADDRESS:PORT         Ray's head, on which nothing is scheduled; ends with this process
    run_ray.py worker ADDRESS:PORT       a node that serves it
    run_ray.py wait ADDRESS:PORT --nodes N [--timeout-s 300]

A head that does not answer yet is tried again until the time is over.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time

from network import own_address

RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")


def wait_for_head(host: str, port: int, end: float) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                sys.exit(f"Ray's head does not answer at {host}:{port}: {error}")
            time.sleep(1)


def wait_for_nodes(address: str, nodes: int, end: float) -> None:
    """Until so many are registered and alive."""
    import ray

    ray.init(address=address, log_to_driver=False)
    while len(alive := [n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]]) < nodes:
        if time.monotonic() > end:
            sys.exit(f"Ray has {len(alive)} of {nodes} nodes: {', '.join(alive)}")
        time.sleep(1)
    print(f"Ray: {', '.join(sorted(alive))}", flush=True)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("head", "worker", "wait"))
    parser.add_argument("address")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--timeout-s", type=float, default=300.0)
    args = parser.parse_args()
    host, _, port = args.address.rpartition(":")
    own, end = own_address(host), time.monotonic() + args.timeout_s
    if args.what == "head":
        options = ["--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"]
        os.execv(RAY[0], [*RAY, *options, f"--node-ip-address={own}"])
    wait_for_head(host, int(port), end)
    if args.what == "worker":
        os.execv(RAY[0], [*RAY, f"--address={args.address}", f"--node-ip-address={own}"])
    wait_for_nodes(args.address, args.nodes, end)


if __name__ == "__main__":
    main()
