"""Checks that every relative link and picture in the tree's Markdown files leads to a file, and to a heading in it.

python tools/check_links.py [ROOT]    prints one line for each dead link and exits with 1, or prints one line with ok
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def find_anchors(markdown: str) -> set[str]:
    """Return the anchors of a file's headings as Git hosts write them: "Add an op" is #add-an-op."""
    without_blocks = re.sub(r"^(`{3,}).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(without_blocks)}


def check_file(file: Path) -> Iterator[str]:
    """Find the dead links of one Markdown file."""
    text = CODE.sub(lambda code: "\n" * code[0].count("\n"), file.read_text())
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"[a-z][a-z0-9+.-]*:|//", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = file.parent / path if path else file
        place = f"{file}:{text.count(chr(10), 0, match.start()) + 1}"
        if not target.exists():
            yield f"{place}: {link} leads to no file."
        elif anchor and target.suffix == ".md" and anchor not in find_anchors(target.read_text()):
            yield f"{place}: {link} leads to no heading of {target.name}."


def find_files(root: Path) -> list[Path]:
    """List the Markdown files under `root`, less those in hidden folders."""
    files = (file for file in root.rglob("*.md") if not re.search(r"(^|/)\.", file.relative_to(root).as_posix()))
    return sorted(files)


def main() -> int:
    """Check the tree named on the command line, or else the one this file lies in."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    files = find_files(root)
    findings = [finding.replace(f"{root}/", "") for file in files for finding in check_file(file)]
    print("\n".join(findings) or f"ok: the links of {len(files)} Markdown files")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
