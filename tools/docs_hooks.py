"""What mkdocs runs at build time (``hooks`` in mkdocs.yml): comments stay out of the site, and messages wrap."""

from __future__ import annotations

import re
from typing import Any

_COMMENT = re.compile(r"^<!--.*?-->\n?", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """*markdown* without its comments (hidden set-up, marks around tables), and with a class for what code prints."""
    return _COMMENT.sub("", markdown).replace("\n```text\n", "\n``` { .text .message }\n")
