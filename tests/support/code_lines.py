"""How many lines of code there are, by the tokenizer: no comments, no docstrings, no blank lines.

``python tests/support/code_lines.py [CHECKOUT]`` counts those of the product and those of the tests.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Sequence
from pathlib import Path

PRODUCT = ("lightning_lip", "kernels", "bench")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Return the number of lines of a module that hold code.

    A docstring is any string that is a statement of its own: of a module, a class, a function or an attribute.
    """
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def count(checkout: Path) -> dict[str, int]:
    """Return the lines of code of a checkout, by `product` and `tests`."""
    folders = {"product": PRODUCT, "tests": ("tests",)}
    return {
        name: sum(code_lines(path.read_text()) for part in parts for path in sorted((checkout / part).rglob("*.py")))
        for name, parts in folders.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the lines of code of a checkout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(), help="a checkout, by default this folder")
    for name, number in count(parser.parse_args(arguments).checkout).items():
        print(f"{name}: {number:,}")


if __name__ == "__main__":
    main()
