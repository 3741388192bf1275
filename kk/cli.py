"""How the commands of this package end."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0, or 1 and one line on stderr when it raises OSError or ValueError."""
    try:
        command()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
