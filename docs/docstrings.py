"""How the reference reads docstrings: names that share a line (`width, height: in pixels`) are told one by one."""

from __future__ import annotations

import re
from typing import Any

try:
    from griffe import Extension
except ImportError:  # so that tests can ask for `each_alone` where no reference is built
    Extension = object  # type: ignore

SECTION = re.compile(r"( *)(Args|Attributes):$")
SHARED = re.compile(r"( *)(\w+(?:, \w+)+): ")


def each_alone(docstring: str) -> str:
    """The docstring with a line of its own for every argument and attribute."""
    written, lines, inside = list[str](), docstring.split("\n"), -1
    while lines:
        line = lines.pop(0)
        if section := SECTION.match(line):
            inside = len(section[1])
        elif line.strip() and not line.startswith(" " * (inside + 1)):
            inside = -1
        shared = SHARED.match(line) if inside >= 0 else None
        if shared is None or len(shared[1]) != inside + 4:
            written.append(line)
            continue
        more: list[str] = []
        while lines and lines[0].startswith(" " * (inside + 5)):
            more.append(lines.pop(0))
        for name in shared[2].split(", "):
            written += [f"{shared[1]}{name}: {line[shared.end() :]}", *more]
    return "\n".join(written)


class EachAlone(Extension):  # type: ignore
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = each_alone(obj.docstring.value)
