# SPDX-License-Identifier: Apache-2.0
"""What the documentation site adds to MkDocs: pages from the repository's root, the API page, and links to the
repository's files.

Pages link to files of the repository, such as ../examples/train.py. If mkdocs.yml has a repo_url, such a link points
there. Otherwise its text stays without a link. A link to a file that does not exist is not changed, and `mkdocs build
--strict` stops at it.
"""

from __future__ import annotations

import os.path
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import api_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
CODE_OR_LINK = re.compile(r"^```.*?^```|\[((?:[^\[\]]|!\[[^\]]*\])*)\]\(([^)\s]+)\)", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "api.md", content=api_page.page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    if page.file.abs_src_path is None:  # the API page, which has no such links
        return markdown
    source = Path(page.file.abs_src_path)
    folder = os.path.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        text, target = match.groups()
        if text is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        destination = (source.parent / path).resolve()
        if not destination.exists() or not destination.is_relative_to(ROOT):
            return match[0]
        name = destination.relative_to(ROOT).as_posix()
        page_name = PAGES.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if page_name is not None:
            return f"[{text}]({os.path.relpath(page_name, folder or '.')}{hash_sign}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name}{hash_sign}{anchor})"
        return text

    return CODE_OR_LINK.sub(rewritten, markdown)
