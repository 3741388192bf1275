"""How fast Knights and Knaves puzzles are made and judged, beside the plain way to do it.

    python tools/benchmark_kk.py --people 2-14 --seconds 5     puzzles a second, and the reward's time
    python tools/benchmark_kk.py --rewards                     the reward's time alone
    python tools/benchmark_kk.py --agree 100000                two solvers on as many random puzzles of all sizes

Puzzles with one solution a second of CPU time, in one process, as JSON lines with their texts: ours with and without
the reasoning (the cot_… fields), and a baseline that draws statements and evaluates all 2^n assignments recursively, as
the published generator does. Then the kk reward's time against the length of hostile responses, and what judging in
processes costs. --agree compares the generator's solver with that of kk.verify.
"""

from __future__ import annotations

import argparse
import sys

from kk_bench import generation, reward
from kk_bench.tables import machine

from kk.generate import parse_people


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", default="2-14", help="sizes, such as 2-5 or 3,5,8 (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU time of each figure (default: %(default)s)")
    parser.add_argument("--rewards", action="store_true", help="only the reward's time")
    parser.add_argument("--agree", type=int, metavar="N", help="only this: solve N random puzzles with two solvers")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sizes = parse_people(args.people)
    print(f"{machine()}\n")
    if args.agree is not None:
        return generation.agreement(sizes, args.agree, args.seed)
    if not args.rewards:
        generation.generation(sizes, args.seconds, args.seed)
    reward.lengths(args.seconds)
    reward.pool(args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
