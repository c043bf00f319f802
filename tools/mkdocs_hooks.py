"""What MkDocs does not do by itself for the site (`hooks` of mkdocs.yml): equations, and pages from outside of docs."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

log = get_plugin_logger(__name__)
ROOT = Path(__file__).parent.parent
# The site's root is docs/ and the repository's at once.
OUTSIDE = (
    "CHANGELOG.md",
    "benchmarks/*.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "csrc/README.md",
    "python/modest_align_train/demo_data/LICENSES.md",
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that the repository has elsewhere, at their own paths."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between docs and the rest of the repository into the site's."""
    if page.file.generated_by:
        return re.sub(r"(?<=\]\()((?:\.\./)*)docs/", r"\1", markdown)
    return markdown.replace("](../", "](")


def on_page_content(content: str, **_: Any) -> str:
    """Turn TeX into MathML, which browsers draw themselves."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', _display, content, flags=re.DOTALL)


def _inline(tex: re.Match[str]) -> str:
    return _mathml(tex[1], "inline")


def _display(tex: re.Match[str]) -> str:
    return f'<div class="equation" tabindex="0">{_mathml(tex[1], "block")}</div>'


def _mathml(tex: str, display: str) -> str:
    mathml = str(convert(html.unescape(tex).strip(), display=display))
    if "\\" in mathml:  # a command that the converter does not know goes through
        log.warning("not converted to MathML: %s", tex)
    return mathml
