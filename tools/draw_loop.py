"""Draw README's picture of one step of the loop, as SVG.

python tools/draw_loop.py docs/images/loop.svg
"""

from __future__ import annotations

import pathlib
import sys
from xml.sax.saxutils import escape

WIDTH, HEIGHT, GAP, EDGE = 216, 112, 34, 12  # of a box; between boxes; around all
# Clockwise from the top left: title, what happens, where.
BOXES = [
    ("draw", "sources, prompts in them,|rollouts for each", "curriculum/"),
    ("generate", "on the training weights,|or in vLLM", "rollout/"),
    ("score", "a reward for|each completion", "rewards/"),
    ("learn", "advantages go back|to the curriculum", "curriculum/"),
    ("train", "GRPO on Megatron:|TP × PP × CP × EP × DP", "actor/"),
    ("sync", "new weights|to the engines", "weight_sync/"),
]
STYLE = """
text { font-family: -apple-system, 'Segoe UI', Roboto, sans-serif; text-anchor: middle; fill: #1f2933 }
.title { font-size: 23px; font-weight: 600 }
.what { font-size: 15px }
.where { font-size: 15px; font-family: monospace; fill: #0b5a8a }
rect { fill: #f4f8fb; stroke: #7b9fb8; stroke-width: 1.5 }
rect.ours { fill: #fff4dc; stroke: #c9962b }
rect.page { fill: #fff; stroke: none }
path { fill: none; stroke: #52606d; stroke-width: 2.5; marker-end: url(#head) }
path.head { fill: #52606d; stroke: none; marker-end: none }
"""
HEAD = (
    '<marker id="head" markerWidth="7" markerHeight="7" refX="4" refY="3.5" orient="auto">'
    '<path class="head" d="M0 0 L7 3.5 L0 7 z"/></marker>'
)


def place(i: int) -> tuple[int, int]:
    """Upper left corner of box i: the first three from left to right, the others below from right to left."""
    column, row = (i, 0) if i < 3 else (5 - i, 1)
    return EDGE + column * (WIDTH + GAP), EDGE + row * (HEIGHT + GAP)


def box(i: int) -> str:
    (x, y), (title, what, where) = place(i), BOXES[i]
    middle = x + WIDTH / 2
    kind = ' class="ours"' if where == "curriculum/" else ""
    lines = [("title", 30, title), *(("what", 54 + 19 * n, line) for n, line in enumerate(what.split("|")))]
    lines.append(("where", 99, where))
    texts = [f'<text class="{c}" x="{middle}" y="{y + dy}">{escape(t)}</text>' for c, dy, t in lines]
    return f'<rect{kind} x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="10"/>' + "".join(texts)


def arrow(i: int) -> str:
    """From box i to the next one."""
    (x, y), (to_x, to_y) = place(i), place((i + 1) % len(BOXES))
    if y == to_y:
        right = to_x > x
        ends = (x + WIDTH + 2, x + WIDTH + GAP - 5) if right else (x - 2, x - GAP + 5)
        return f'<path d="M {ends[0]} {y + HEIGHT / 2} H {ends[1]}"/>'
    down = to_y > y
    ends = (y + HEIGHT + 2, to_y - 5) if down else (y - 2, to_y + HEIGHT + 5)
    return f'<path d="M {x + WIDTH / 2} {ends[0]} V {ends[1]}"/>'


def main() -> None:
    width, height = 3 * WIDTH + 2 * GAP + 2 * EDGE, 2 * HEIGHT + GAP + 2 * EDGE
    label = "One step: " + ", ".join(title for title, _, _ in BOXES)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style><defs>{HEAD}</defs>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        *(box(i) + arrow(i) for i in range(len(BOXES))),
        "</svg>",
    ]
    pathlib.Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
