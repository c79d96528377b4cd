"""One HTML page with pictures, tables and text, complete in a single file."""

import base64
import html
import io
from pathlib import Path
from typing import Any

__all__ = ["Page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fdfdfb; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p { max-width: 46rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
pre { background: #f3f3ee; padding: .6rem .9rem; overflow-x: auto; font-size: .85rem; }
"""


class Page:
    """A page, built from the top to the bottom."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def preformatted(self, text: str) -> None:
        """Text as it would be printed."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, frame: Any) -> None:
        """A pandas DataFrame."""
        self.parts.append(frame.to_html(border=0))

    def picture(self, figure: Any) -> None:
        """A matplotlib figure, kept inside the page."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        content = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(f'<img alt="" src="data:image/png;base64,{content}">')

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        body = "\n".join(self.parts)
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{body}\n</body></html>\n"
        )
        partial = path.with_suffix(".part")
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
