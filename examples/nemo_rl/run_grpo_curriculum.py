"""NeMo-RL's own GRPO script with the curriculum plugged in.

    python run_grpo_curriculum.py examples/run_grpo.py --config math_levels_qwen2.5_megatron.yaml [key=value …]

The first argument is NeMo-RL's script, unchanged; the rest are its own arguments.
"""

from __future__ import annotations

import runpy
import sys

from megatron_dump.integrations import nemo_rl


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit("the first argument must be NeMo-RL's script, as in: run_grpo_curriculum.py examples/run_grpo.py …")
    del sys.argv[0]
    nemo_rl.install()  # before the script imports NeMo-RL's setup
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
