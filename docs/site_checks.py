"""Hooks of MkDocs, which `mkdocs build --strict` turns into errors where something is missing.

Links to files of the repository outside docs/, such as `[recipe](../litevae/configs/imagenet-b.yaml)`, work on a code
host. The site has no such pages, so it shows the link's text and the file's path.

mkdocstrings leaves out a member that it does not find; here that is a warning.
"""

import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

log = logging.getLogger("mkdocs.hooks")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")
DIRECTIVE = re.compile(r"^::: (\S+)\n((?: {4}.*\n)*)", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replaces links that leave docs/ by their text and the path in the repository."""
    docs = Path(config["docs_dir"])
    folder = docs / PurePosixPath(page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(docs):
            return match.group()
        if not path.exists():
            log.warning(f"{page.file.src_uri} links to {target}, which does not exist")
            return text
        name = path.relative_to(docs.parent).as_posix()
        return f"`{name}`" if text.strip("`") in (name, path.name) else f"{text} (`{name}`)"

    return LINK.sub(replace, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> None:
    """Warns of members that the page asks for and that its API reference lacks."""
    for name, options in DIRECTIVE.findall(page.markdown + "\n"):
        members = ((yaml.safe_load(options) or {}).get("options") or {}).get("members") or []
        for member in members:
            if f'id="{name}.{member}"' not in html:
                log.warning(f"{page.file.src_uri} asks for {name}.{member}, which was not found")
