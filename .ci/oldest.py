"""Print pip constraints that hold each package of pyproject.toml at the oldest version that it declares."""

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def floor(requirement: Requirement) -> str:
    """Return the version after `>=`; a requirement without one is an error, so that none slips through."""
    versions = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(versions) != 1:
        raise SystemExit(f"pyproject.toml: '{requirement}' needs one lower bound")
    return versions[0]


def main() -> None:
    """Print one `name==floor` a line, of the dependencies and of all extras."""
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {(r.name, floor(r)) for group in groups for r in map(Requirement, group)}
    print("\n".join(sorted(f"{name}=={version}" for name, version in found)))


if __name__ == "__main__":
    main()
