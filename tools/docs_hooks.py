"""What mkdocs runs at build time (``hooks`` in mkdocs.yml): comments of the pages stay out of the site."""

from __future__ import annotations

import re
from typing import Any

_COMMENT = re.compile(r"^<!--.*?-->\n?", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """*markdown* without its comments: hidden set-up, and marks around tables that a tool writes."""
    return _COMMENT.sub("", markdown)
