"""Durations as NeMo and Lightning write them."""

from __future__ import annotations

import re

from megatron_dump.config.schema import ConfigError


def seconds_of(key: str, text: str | None) -> float | None:
    """Of "DD:HH:MM:SS", above 0; None of None. ConfigError that names the key otherwise."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):([01]\d|2[0-3]):([0-5]\d):([0-5]\d)", text, re.ASCII)
    days, hours, minutes, seconds = map(int, found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(
            f'{key}={text}: must be "DD:HH:MM:SS" above 0, as "00:03:50:00" for 3 h 50 min; in YAML within quotes'
        )
    return float(total)
