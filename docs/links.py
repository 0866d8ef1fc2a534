"""For mkdocs: links to files of the repository that are no pages become their names, since a site does not have them.

A link to a file that is not there warns, which ends a strict build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
DOCS = Path(__file__).parent
log = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page as the site shows it."""
    return LINK.sub(lambda link: _named(link[1], link[2], page.file.src_uri), markdown)


def _named(text: str, target: str, page: str) -> str:
    path = (DOCS / page).parent.joinpath(target).resolve()
    if not path.exists():
        log.warning("%s links to %s, which is not there", page, target)
    name = str(path.relative_to(DOCS.parent)) if path.is_relative_to(DOCS.parent) else target
    return f"`{name}`" if text.strip("`") in name else f"{text} (`{name}`)"
