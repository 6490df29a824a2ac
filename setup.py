"""What pyproject.toml cannot say: the description for package indexes, and addresses that follow from one address.

An index shows README.md without the repository around it. Links into the repository become absolute where its address
is known, and else name what they point to, which the source distribution holds.
"""

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def repository() -> str:
    """The public address of the repository, by who publishes; empty while it has none."""
    return os.environ.get("MINIFLUX_REPOSITORY", "").rstrip("/")


def version() -> str:
    text = (ROOT / "src/miniflux/version.py").read_text("utf-8")
    found = re.search(r'__version__ = "([^"]+)"', text)
    assert found is not None
    return found[1]


def description(readme: str, address: str) -> str:
    """README.md as an index can show it."""

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if "://" in target or target.startswith(("#", "mailto:")):
            return found[0]
        if address:
            kind = "raw" if found["image"] else "blob"
            return f"{found['image']}[{found['text']}]({address}/{kind}/v{version()}/{target})"
        if found["image"]:
            return f"*{found['text']}: `{target}` in the source distribution.*"
        return found["text"] if found["text"] in (target, f"`{target}`") else f"{found['text']} (`{target}`)"

    return LINK.sub(link, readme)


def urls(address: str) -> dict[str, str]:
    known = {"Original release": "https://github.com/black-forest-labs/flux"}
    if address:
        at = f"{address}/blob/v{version()}"
        known = {
            "Source": address,
            "Documentation": f"{address}/tree/v{version()}/docs",
            "Changelog": f"{at}/CHANGELOG.md",
            "Issues": f"{address}/issues",
            **known,
        }
    return known


if __name__ == "__main__":
    setup(
        long_description=description((ROOT / "README.md").read_text("utf-8"), repository()),
        long_description_content_type="text/markdown",
        project_urls=urls(repository()),
    )
