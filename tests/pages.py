"""Pages of docs/ whose tables and code come from the code itself: `python tests/pages.py` puts them in anew.

<!-- name -->  what blocks() has under that name  <!-- /name -->
"""

from __future__ import annotations

from collections.abc import Mapping
import os
import pathlib
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import extend_page  # noqa: E402
import one_step_page  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"docs/one_step.md": one_step_page.blocks, "docs/extend.md": extend_page.blocks}

_BLOCK = re.compile(r"(<!-- (\S+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """The page with its blocks as they are to be."""
    assert [name for _, name, _ in _BLOCK.findall(text)] == list(blocks), (
        "a page shows every block once, in their order"
    )
    return _BLOCK.sub(lambda match: match[1] + blocks[match[2]].rstrip("\n") + "\n" + match[3], text)


def main() -> None:
    for name, blocks in PAGES.items():
        path = ROOT / name
        path.write_text(filled(path.read_text(), blocks()))


if __name__ == "__main__":
    main()
