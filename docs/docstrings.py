"""What mkdocstrings needs to read this package's docstrings: their roles become links, their examples code."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed.

    ``:class:`X``` becomes a link where X is public, code elsewhere; the heading ``Example:`` becomes ``Examples:``,
    whose prompts are shown as code.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is None:
            return
        public = {str(name) for name in obj.package.exports or ()}

        def link(role: re.Match[str]) -> str:
            name = role[1].rpartition(".")[2]
            return f"[`{name}`][lightning_lip.{name}]" if name in public else f"`{role[1]}`"

        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r":(?:class|meth|func|attr|data):`~?([\w.]+)`", link, text)
