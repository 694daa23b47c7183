"""Feeds check_links small trees of Markdown."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "check_links.py"


def check(root: Path, markdown: str) -> subprocess.CompletedProcess[str]:
    """Check a tree of two pages, of which `markdown` is one."""
    (root / "guide.md").write_text("# Add an op\n")
    (root / "README.md").write_text(markdown)
    return subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "markdown",
    [
        "[a](guide.md) ![b](<guide.md>)",
        "[a](guide.md#add-an-op)",
        "[a](#here)\n\n## Here",
        "[a](https://example.org/x.md)",
        "`[a](gone.md)`\n\n```\n[a](gone.md)\n```",
        "[a]: guide.md",
    ],
)
def test_a_link_that_leads_somewhere_is_fine(tmp_path: Path, markdown: str) -> None:
    done = check(tmp_path, markdown)
    assert (done.returncode, done.stdout) == (0, "ok: the links of 2 Markdown files\n")


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("one\n[a](gone.md)", "README.md:2: gone.md leads to no file."),
        ("[a](guide.md#add-a-wheel)", "README.md:1: guide.md#add-a-wheel leads to no heading of guide.md."),
        ("![plot](plots/loss.png)", "README.md:1: plots/loss.png leads to no file."),
        ("[a]: gone.md", "README.md:1: gone.md leads to no file."),
    ],
)
def test_a_dead_link_is_one_readable_line(tmp_path: Path, markdown: str, expected: str) -> None:
    done = check(tmp_path, markdown)
    assert (done.returncode, done.stdout) == (1, f"{expected}\n")
