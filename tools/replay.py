"""Replay a run's decision log without a model, and ask what another source policy would have weighed.

    python tools/replay.py results/kk_cpu/curriculum.jsonl
    python tools/replay.py results/kk_cpu/curriculum.jsonl --policy sec alpha=0.3 --out sec.png

The other policy sees the feedback of the prompts that the run drew: its decisions are compared, not its results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kk.progress import meter
from megatron_dump.curriculum.replay import Log, Reweighed, read_log, reweigh, verify
from megatron_dump.report.figure import ORANGE, STYLE
from megatron_dump.report.run import natural_sort

ROWS_SHOWN = 20  # sources of the table: the ones on which the policies differ most
SHADES_SHOWN = 12  # sources with a colour of their own
STEPS_SHOWN = 8


def parse_options(policy: str, pairs: list[str]) -> dict[str, Any]:
    """The sources block of `--policy NAME key=value ...`; values are YAML. ValueError for what is no key=value."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"{pair!r} is not key=value: options of a policy are written as alpha=0.3")
        try:
            OmegaConf.from_dotlist([pair])
        except (OmegaConfBaseException, yaml.YAMLError):
            raise ValueError(f"{pair!r}: the value is not YAML, as in alpha=0.3 or weights={{a: 1, b: 2}}") from None
    options = OmegaConf.to_container(OmegaConf.from_dotlist(pairs))
    assert isinstance(options, dict)
    return {**{str(key): value for key, value in options.items()}, "name": policy}


def comparison(log: Log, other: Reweighed, policy: str) -> str:
    """Mean weights of both policies by source, and how far apart they are by step."""
    labels = (f"logged: {', '.join(log.policies)}", policy)
    means = other.logged.mean(axis=0), other.weights.mean(axis=0)
    widest = np.argsort(-np.abs(means[0] - means[1]), kind="stable")[:ROWS_SHOWN]
    shown = natural_sort(log.sources[k] for k in widest)
    width = max(len(name) for name in (*shown, "source"))
    lines = [f"mean weights over {len(other.steps)} steps, given the same feedback (off-policy)"]
    lines.append(f"{'source':<{width}}" + "".join(f"  {label:>9}" for label in (*labels, "change")))
    for source in shown:
        a, b = (mean[log.sources.index(source)] for mean in means)
        cells = zip((*labels, "change"), (f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}"), strict=True)
        lines.append(f"{source:<{width}}" + "".join(f"  {cell:>{max(9, len(label))}}" for label, cell in cells))
    if (hidden := len(log.sources) - len(shown)) > 0:
        lines.append(f"and {hidden} more sources, which differ less")
    picked = np.unique(np.linspace(0, len(other.steps) - 1, STEPS_SHOWN).round().astype(int))
    lines.append(f"total variation distance: mean {other.distance.mean():.3f}, at")
    lines.append("step      " + "".join(f"{other.steps[i]:>8}" for i in picked))
    lines.append("distance  " + "".join(f"{other.distance[i]:>8.3f}" for i in picked))
    return "\n".join(lines)


def draw_comparison(log: Log, other: Reweighed, policy: str) -> Figure:
    """Both policies' weights over the steps, and the distance between them."""
    order = [log.sources.index(name) for name in natural_sort(log.sources)]
    if len(order) > SHADES_SHOWN:  # the heaviest, in natural order; the others share one grey band
        peak = np.maximum(other.logged.mean(axis=0), other.weights.mean(axis=0))
        heaviest = set(np.argsort(-peak, kind="stable")[: SHADES_SHOWN - 1].tolist())
        order = [k for k in order if k in heaviest]
    rest = len(log.sources) - len(order)
    labels = [log.sources[k] for k in order] + ([f"{rest} others"] if rest else [])
    shades = [*matplotlib.colormaps["viridis"](np.linspace(0.05, 0.88, len(order))), *(["#c8c8c8"] if rest else [])]
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    titles = (f"Logged: {', '.join(log.policies)}", f"{policy}, on the same feedback")
    for axes, title, weights in zip((left, middle), titles, (other.logged, other.weights), strict=True):
        bands = [weights[:, k] for k in order] + ([1.0 - weights[:, order].sum(axis=1)] if rest else [])
        drawn = axes.stackplot(other.steps, bands, colors=shades, linewidth=0)
        axes.set(title=title, ylim=(0, 1), ylabel="weight" if axes is left else None)
    figure.legend(drawn, labels, loc="outside upper center", ncols=min(6, len(labels)), fontsize=9)
    right.plot(other.steps, other.distance, color=ORANGE, linewidth=1.9)
    right.set(title="Total variation distance", ylim=(0, 1))
    for axes in (left, middle, right):
        axes.set(xlim=(other.steps[0], max(other.steps[-1], other.steps[0] + 1)), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def run(args: argparse.Namespace) -> None:
    """Verify the log, and compare where a policy is named."""
    if args.options and args.policy is None:
        raise ValueError(f"{args.options[0]!r} is an option of a policy: name it with --policy")
    if args.out is not None and args.policy is None:
        raise ValueError(f"--out {args.out}: the picture compares two policies: name the other with --policy")
    log = read_log(args.log)
    with meter("replay") as on_progress:
        n_steps = verify(log, on_progress)
    print(f"{args.log}: {n_steps} steps reproduce bit for bit")
    if log.truncated:
        print("its last line was cut short and is left out")
    if args.policy is None:
        return
    with meter(args.policy) as on_progress:
        other = reweigh(log, parse_options(args.policy, args.options), on_progress)
    print(comparison(log, other, args.policy))
    out = args.out or args.log.with_name(f"replay_{args.policy.rpartition(':')[2]}.png")
    with matplotlib.rc_context(STYLE):
        draw_comparison(log, other, args.policy).savefig(out, dpi=130)
    print(f"picture: {out}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="curriculum.jsonl of a run")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the policy")
    parser.add_argument("--policy", help="as trainer.grpo.curriculum.sources.name: uniform, sec, own.py:Class, …")
    parser.add_argument("--out", type=Path, metavar="PNG", help="default: replay_<policy>.png beside the log")
    try:
        run(parser.parse_intermixed_args(argv))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
