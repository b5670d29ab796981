"""Why a network has no known bound: the operations, their modules, and the reasons, as they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REASONS = {
    "scaled_dot_product_attention": "dot-product attention, a product of activations, has no finite constant",
    "_native_multi_head_attention": "dot-product attention, a product of activations, has no finite constant",
    "_transformer_encoder_layer_fwd": "dot-product attention, a product of activations, has no finite constant",
    "glu": "a product of two activations has no finite Lipschitz constant",
    "bilinear": "a product of two activations has no finite Lipschitz constant",
    "embedding": "an embedding is a look-up, not a Lipschitz map: start at its output",
    "embedding_bag": "an embedding is a look-up, not a Lipschitz map: start at its output",
    "hardshrink": "it is discontinuous",
    "var": "a variance has no finite Lipschitz constant: it grows with the square",
    "index_put": "writing at indices has no rule: use scatter_add, torch.where or cat",
    "scatter": "writing at indices has no rule: use scatter_add, torch.where or cat",
    "item": "a value of the activations becomes a number",
}

UNKNOWN = "its Lipschitz constant is not known: compute it in a module of its own and state it with register_constant"

for _name in ("gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal", "less_equal", "not_equal"):
    REASONS[_name] = "a comparison jumps"
for _name in ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "bucketize", "floor_divide"):
    REASONS[_name] = "it is a step function"
for _name in ("argmax", "argmin", "argsort", "nonzero", "searchsorted"):
    REASONS[_name] = "an index jumps"
for _name in ("masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"):
    REASONS[_name] = "the size of its result depends on the values of the activations"


@dataclass(frozen=True)
class Refusal:
    """An operation without a known finite constant: the module's path, its type, the operation and the reason."""

    path: str
    module: str
    operation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or '(the model itself)'} ({self.module}), {self.operation}: {self.reason}"


N_REFUSALS = 10
"""How many lines of refusals a message has."""

N_PATHS = 4
"""How many modules a line of refusals names."""


def listed(refusals: Sequence[Refusal]) -> str:
    """Return the refusals, one a line: those of one kind together, with the paths of their modules."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for refusal in refusals:
        paths = kinds.setdefault((refusal.module, refusal.operation, refusal.reason), [])
        if refusal.path not in paths:
            paths.append(refusal.path)
    lines = []
    for (module, operation, reason), paths in kinds.items():
        more = f" and {len(paths) - N_PATHS} more" if len(paths) > N_PATHS else ""
        path = ", ".join(p or "(the model itself)" for p in paths[:N_PATHS]) + more
        lines.append(str(Refusal(path, module, operation, reason)))
    left_out = [f"and {len(lines) - N_REFUSALS} more"] if len(lines) > N_REFUSALS else []
    return "\n  - ".join([*lines[:N_REFUSALS], *left_out])
