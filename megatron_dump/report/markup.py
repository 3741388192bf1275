"""What pages share: their looks, tables, and pictures inside them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1160px; margin: 2em auto;
  padding: 0 1em }
h1, h2, h3 { font-weight: 600 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd } img { width: 100% }
h3 { margin: 1em 0 .2em; font-size: 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
td, th { padding: .3em .9em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.text td, .text th { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere }
.text th, .text td:first-child, .events td:nth-child(-n+3) { white-space: nowrap }
.wide:has(.tall) { max-height: 40em; overflow-y: auto } .tall th { position: sticky; top: 0; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f9; padding: .8em; margin: .3em 0 .6em }
summary { cursor: pointer; padding: .2em 0 } .good { color: #1a7f37 } .bad { color: #b3261e } .quiet { color: #666 }
"""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    """Cells are text, never markup. style: CSS classes."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in columns)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table class="{style}">{"".join(lines)}</table></div>'


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
