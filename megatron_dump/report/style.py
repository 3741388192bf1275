"""What all pictures share: colours and matplotlib's settings."""

from __future__ import annotations

BLUE, ORANGE, RED, GREY = "#2b5c8a", "#d9773b", "#b3261e", "#dcdcdc"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
