"""Random networks against `certify`: ``python tests/support/fuzz.py --graphs 2000``.

Each network is written from a seed, certified, and its certificate attacked; a failing one is printed as source text.
``--family state`` goes through one class of `fuzz_hazards.HAZARDS` only, ``--show SEED`` prints a network and what
becomes of it, ``--convolutions 3000`` compares configurations of convolutions with their dense matrices.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from support import fuzz_convolutions
from support.fuzz_cases import FAMILIES, write
from support.fuzz_grammar import Case
from support.fuzz_oracle import Outcome, check


@dataclass
class Summary:
    """What became of many networks.

    Attributes:
        outcomes: How many of each kind of outcome.
        failures: The networks that failed, with their outcomes.
        seconds: Of the processor.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[tuple[Case, Outcome]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def graphs(self) -> int:
        return self.outcomes.total()

    def add(self, case: Case, outcome: Outcome) -> None:
        """Count one network."""
        self.outcomes[outcome.kind, outcome.what] += 1
        if outcome.kind == "failed":
            self.failures.append((case, outcome))

    def failed(self) -> Counter[str]:
        """Return how many failures there are of each class."""
        return Counter(outcome.what for _, outcome in self.failures)

    def report(self) -> str:
        """Return the failing networks as source text."""
        return "\n\n".join(f"FAILED, {outcome.what}: {outcome.detail}\n{case}" for case, outcome in self.failures)

    def __str__(self) -> str:
        rows = [f"{self.graphs} networks in {self.seconds:.1f} s of one core"]
        for kind in ("certified", "refused", "failed"):
            found = {what: n for (k, what), n in self.outcomes.items() if k == kind}
            rows.append(f"{kind:10} {sum(found.values()):5}  {sum(found.values()) / max(1, self.graphs):6.1%}")
            rows += [f"  {n:5}  {what}" for what, n in sorted(found.items(), key=lambda item: -item[1]) if what]
        return "\n".join(rows)


def run(seeds: Iterable[int], family: str | None = None) -> Summary:
    """Write, certify and attack the networks of some seeds."""
    summary = Summary()
    start = time.process_time()
    for seed in seeds:
        case = write(seed, family)
        summary.add(case, check(case))
    summary.seconds = time.process_time() - start
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer and print its failures and its summary; return 1 if there is a failure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--graphs", type=int, default=0, help="how many networks")
    parser.add_argument("--convolutions", type=int, default=0, help="how many convolutions")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--family", choices=FAMILIES, help="only this class")
    parser.add_argument("--show", type=int, help="print the network of this seed, and what becomes of it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.show is not None:
        case = write(options.show, options.family)
        print(case, check(case), sep="\n")
        return 0
    failed = False
    if options.graphs:
        summary = run(range(options.seed, options.seed + options.graphs), options.family)
        print(summary.report(), summary, sep="\n\n")
        failed = bool(summary.failures)
    if options.convolutions:
        summary = fuzz_convolutions.run(range(options.seed, options.seed + options.convolutions))
        print(summary)
        failed = failed or bool(summary.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
