"""What mkdocstrings needs to read this package's docstrings: their roles become links, their examples code."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites ``:class:`X``` to a link to X, and the heading ``Example:`` to ``Examples:``, before parsing."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        # A link where the API pages have such a heading (`?` makes it optional), code elsewhere.
        obj.docstring.value = re.sub(r":(?:class|meth|func|attr):`~?([\w.]+)`", r"`\1`", text)
