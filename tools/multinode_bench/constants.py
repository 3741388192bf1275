"""What a simulation takes as given: rates, latencies and sizes of a machine, each with where it comes from."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from multinode_bench.files import read_json, write_json
from multinode_bench.network import Link, Network


@dataclasses.dataclass(frozen=True)
class Constants:
    """Of one rank unless it says otherwise. In a file a number may also stand as {"peak": …, "efficiency": …}."""

    name: str
    ranks_per_node: int
    cores_per_node: int | None  # that the ranks of a node compute on; None: each has a device of its own
    memory_bytes: float | None  # of a rank's device; None: not checked
    train_flops: float  # per second, forward and backward passes
    train_layer_s: float  # beside them, a layer and micro-batch
    forward_flops: float  # per second, forward passes alone
    forward_layer_s: float
    decode_flops: float  # per second, generation
    decode_layer_s: float  # beside them, a layer and token position
    memory_bytes_per_s: float  # read or written
    host_bytes_per_s: float  # between the device and the host's memory
    reward_s: float  # a completion
    other_s: float  # a step: draws, advantages, packing
    links: dict[str, dict[str, Link]]  # intra, inter (between nodes) -> all_reduce, p2p
    measured_ranks: int  # the most ranks that the constants were measured on; 0: none
    measured_nodes: int
    sources: dict[str, str]  # of each number, or group of numbers: measured how, or published where

    @property
    def network(self) -> Network:
        intra, inter = self.links["intra"], self.links.get("inter", {})
        return Network(intra["all_reduce"], inter.get("all_reduce"), intra["p2p"], inter.get("p2p"))

    def crowding(self, world_size: int) -> float:
        """How many times slower a rank computes because several share a core."""
        if self.cores_per_node is None:
            return 1.0
        return max(1.0, min(world_size, self.ranks_per_node) / self.cores_per_node)


_NUMBERS = (
    "train_flops",
    "train_layer_s",
    "forward_flops",
    "forward_layer_s",
    "decode_flops",
    "decode_layer_s",
    "memory_bytes_per_s",
    "host_bytes_per_s",
    "reward_s",
    "other_s",
)


def read_constants(path: pathlib.Path) -> Constants:
    """ValueError, one line, for a file that does not hold all of them."""
    raw = read_json(path, "--constants")
    known = {field.name for field in dataclasses.fields(Constants)}
    if not isinstance(raw, dict) or raw.keys() != known:
        found = set(raw) if isinstance(raw, dict) else set()
        wrong = [f"lacks {', '.join(sorted(known - found))}"] * bool(known - found)
        wrong += [f"has unknown {', '.join(sorted(found - known))}"] * bool(found - known)
        raise ValueError(f"--constants: {path} {' and '.join(wrong)}; see tools/multinode_bench/h100_sxm.json")
    try:
        numbers = {name: _number(raw[name]) for name in _NUMBERS}
        links = {
            place: {kind: Link(_number(link["alpha_s"]), _number(link["beta_s_per_byte"])) for kind, link in of.items()}
            for place, of in raw["links"].items()
        }
        if not {"all_reduce", "p2p"} <= links["intra"].keys():
            raise KeyError("links.intra")
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"--constants: {path}: what stands at {error} cannot be used; compare h100_sxm.json") from None
    if bad := [name for name in _NUMBERS if numbers[name] < 0 or (not name.endswith("_s") and numbers[name] == 0)]:
        raise ValueError(f"--constants: {path}: {bad[0]}={numbers[bad[0]]}: must be positive")
    return Constants(**{**raw, **numbers, "links": links})


def save_constants(constants: Constants, path: pathlib.Path) -> None:
    content = dataclasses.asdict(constants)
    content["links"] = {
        place: {kind: {"alpha_s": link.alpha, "beta_s_per_byte": link.beta} for kind, link in of.items()}
        for place, of in constants.links.items()
    }
    write_json(path, content)


def _number(value: Any) -> float:
    """A number, or a peak rate times an efficiency; a bandwidth as `1/bytes_per_s` gives an inverse one."""
    if isinstance(value, dict):
        if "bytes_per_s" in value:
            return 1.0 / (float(value["bytes_per_s"]) * float(value.get("efficiency", 1.0)))
        return float(value["peak"]) * float(value["efficiency"])
    return float(value)
