"""The documentation's links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/*/README.md")]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_names_a_file_that_exists(text: Path) -> None:
    links = [link for link in LINK.findall(text.read_text()) if "://" not in link]
    assert [link for link in links if not (text.parent / link).exists()] == []
