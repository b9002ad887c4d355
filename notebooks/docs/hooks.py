"""What mkdocs does to every page of the site."""

from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings introduce code as reStructuredText does, with two colons; Markdown shows both."""
    return html.replace("<p>Example::</p>", "<p>Example:</p>")
