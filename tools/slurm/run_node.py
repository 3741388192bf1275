"""Start this node's torchrun, from a task of Slurm: one a node, in the order of the nodes.

    srun python tools/slurm/run_node.py --head 10.0.0.7:23456 --ranks ATTEMPT/ranks <torchrun's options> script.py …

Tells NCCL and gloo which network interface leads to the head node, unless NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME
say so already, and becomes torchrun. SIGUSR1, with which Slurm announces the end of the time, is blocked from here on:
torchrun would die of it, and for ranks that still start it stays pending.
"""

from __future__ import annotations

import os
import signal
import sys

from network import choose_interface


def main() -> None:
    if sys.argv[1::2][:2] != ["--head", "--ranks"] or len(sys.argv) < 6:
        sys.exit(f"{__doc__}\nusage: run_node.py --head ADDRESS:PORT --ranks FOLDER …")
    endpoint, ranks, arguments = sys.argv[2], sys.argv[4], sys.argv[5:]
    choose_interface(endpoint.rpartition(":")[0])
    # The static rendezvous keeps rank 0 on the head node and ranks of a node together, in Slurm's order of nodes.
    own = ["--rdzv-backend=static", f"--rdzv-endpoint={endpoint}", f"--node-rank={os.environ['SLURM_PROCID']}"]
    own += [f"--log-dir={ranks}/{os.environ['SLURMD_NODENAME']}"]  # where first_failure.py looks
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *own, *arguments])


if __name__ == "__main__":
    main()
