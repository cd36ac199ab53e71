"""The report as one HTML file that needs nothing else: pictures are inlined."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { line-height: 1.2 } img { max-width: 100%; border: 1px solid #ddd; margin: .4em 0 1.2em }
table { border-collapse: collapse; font-size: 13px; margin: .6em 0 1.4em }
th, td { padding: .18em .6em; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) { background: #f6f6f6 }
th { border-bottom: 1px solid #999 } pre { background: #f6f6f6; padding: .7em; overflow-x: auto; font-size: 12.5px }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole document."""
    body = "\n".join(sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    heading = f"<h1>{html.escape(title)}</h1>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{heading}\n{body}\n</body></html>\n"


def section(heading: str, *parts: str) -> str:
    """A heading and what belongs to it."""
    return f"<h2>{html.escape(heading)}</h2>\n" + "\n".join(parts)


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(text)}</pre>"


def picture(path: Path, what: str) -> str:
    """A PNG, inlined."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys; the first column is the name."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    lines = ["".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) for row in rows]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
