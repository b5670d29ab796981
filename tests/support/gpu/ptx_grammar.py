"""Reads PTX: an opcode, its dot modifiers and its operands become an :class:`Instruction`, once, before anything runs.

A modifier is known by its meaning, not by where it stands: a state space (``shared``, or ``shared::cta``, which is the
same), a vector length, a type, a word that the opcode acts upon, or a word that changes no value, as cache hints do.
What is not known is collected, and :class:`UnknownInstructionsError` names all of it at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

SPACES = {"global": ("",), "shared": ("", "cta", "cluster"), "param": ("", "entry")}
"""State spaces with their suffixes. A cluster here has one program (`HEADER`), so its window is the program's own."""
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
HEADER = {"reqntid", "maxntid", "minnctapersm", "maxnreg"}
"""What may stand between a kernel's parameters and its body."""
SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ctaid") for axis in "xyz"}
SHARED = "global_smem"
"""The symbol where Triton's shared memory begins: address 0."""

BITS = {f"b{n}" for n in (16, 32, 64)}
SIGNS = {f"{sign}{n}" for sign in "us" for n in (16, 32, 64)}
FLOATS = {"f32", "f64"}
NUMBERS = BITS | SIGNS | FLOATS
HALVES = {"f16", "bf16", "f16x2", "bf16x2"}
TYPES = NUMBERS | HALVES | {"pred"}

# Programs run one after another and every access is done at once, so order, scope and caching change no value.
ORDER = {"weak", "relaxed", "acquire", "release", "volatile", "cta", "cluster", "gpu", "sys"}
CACHING = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"}
EVICTION = {f"L{n}::evict_{kind}" for n in (1, 2) for kind in ("normal", "unchanged", "first", "last")}
CACHE_HINT = "L2::cache_hint"
# Approximations are executed as the exactly rounded operation that they stand in for.
APPROXIMATE = {"approx", "full"}

ORDERED = {"eq", "ne", "lt", "le", "gt", "ge"}
UNSIGNED = {"lo", "ls", "hi", "hs"}
UNORDERED = {name + "u" for name in ORDERED} | {"num", "nan"}


class Form(NamedTuple):
    """What may follow an opcode.

    Attributes:
        types: The sets of types allowed, one for each type that the opcode is written with.
        operands: The number of operands, the result among them.
        words: Modifiers that the execution acts upon, or that name what it does anyway.
        ignored: Modifiers that change no value.
        choices: Of each of these sets, exactly one word is there.
        spaces: The state spaces allowed; empty for what touches no memory.
    """

    types: tuple = ()
    operands: int = 0
    words: Collection = ()
    ignored: Collection = ()
    choices: Collection = ()
    spaces: Collection = ()


def _form(*types, **fields):
    return Form(types, **fields)


_HINTS = ORDER | CACHING | EVICTION
_MATRIX = {
    "operands": 2, "words": {"trans"}, "choices": [{"sync"}, {"aligned"}, {"m8n8"}, {"x1", "x2", "x4"}],
    "spaces": {"shared"},
}  # fmt: skip
_ARITHMETIC = {"operands": 3, "words": {"rn", "ftz"}}

FORMS = {
    "ld": _form(NUMBERS, operands=2, words={CACHE_HINT}, ignored=_HINTS, spaces=SPACES),
    "st": _form(NUMBERS, operands=2, words={CACHE_HINT}, ignored=_HINTS, spaces={"global", "shared"}),
    "ldmatrix": _form({"b16"}, **_MATRIX),
    "stmatrix": _form({"b16"}, **_MATRIX),
    "createpolicy": _form({"b64"}, operands=2, ignored=EVICTION | {"fractional"}),
    "shfl": _form({"b32"}, operands=5, choices=[{"sync"}, {"bfly", "idx"}]),
    "redux": _form({"s32", "u32", "b32"}, operands=3, choices=[{"sync"}, {"max", "min", "add", "or", "and"}]),
    "mov": _form(NUMBERS | {"pred"}, operands=2),
    "cvt": _form(NUMBERS | HALVES, NUMBERS | {"f16", "bf16"}, operands=2, words={"rn", "rzi"}),
    "add": _form(SIGNS | FLOATS, **_ARITHMETIC),
    "sub": _form(SIGNS | FLOATS, **_ARITHMETIC),
    "mul": _form(SIGNS | FLOATS, operands=3, words={"rn", "ftz", "lo", "hi", "wide"}),
    "mad": _form(SIGNS, operands=4, choices=[{"lo", "wide"}]),
    "fma": _form(FLOATS, operands=4, words={"ftz"}, choices=[{"rn"}]),
    "div": _form(FLOATS, operands=3, words={"ftz"}, choices=[APPROXIMATE | {"rn"}]),
    "min": _form(SIGNS | FLOATS, operands=3, words={"ftz", "NaN"}),
    "max": _form(SIGNS | FLOATS, operands=3, words={"ftz", "NaN"}),
    "neg": _form(SIGNS | FLOATS, operands=2, words={"ftz"}),
    "abs": _form(SIGNS | FLOATS, operands=2, words={"ftz"}),
    "sqrt": _form(FLOATS, operands=2, words={"ftz"}, choices=[{"rn", "approx"}]),
    "rcp": _form(FLOATS, operands=2, words={"ftz"}, choices=[{"rn", "approx"}]),
    "ex2": _form({"f32"}, operands=2, words={"ftz"}, choices=[{"approx"}]),
    "and": _form(BITS | {"pred"}, operands=3),
    "or": _form(BITS | {"pred"}, operands=3),
    "xor": _form(BITS | {"pred"}, operands=3),
    "not": _form(BITS | {"pred"}, operands=2),
    "shl": _form(BITS, operands=3),
    "shr": _form(BITS | SIGNS, operands=3),
    "shf": _form({"b32"}, operands=4, choices=[{"l"}, {"wrap"}]),
    "bfe": _form({"u32", "s32", "u64", "s64"}, operands=4),
    "prmt": _form({"b32"}, operands=4),
    "selp": _form(NUMBERS, operands=4),
    "setp": _form(NUMBERS, operands=3, words={"ftz"}, choices=[ORDERED | UNSIGNED | UNORDERED]),
    "bar": _form(operands=1, choices=[{"sync"}], words={"warp", "cta", "aligned"}),
    "barrier": _form(operands=1, choices=[{"sync"}], words={"cta", "aligned"}),
    "bra": _form(operands=1, ignored={"uni"}),
    "ret": _form(operands=0, ignored={"uni"}),
}


class UnknownInstructionsError(NotImplementedError):
    """PTX that the grammar does not know.

    Attributes:
        found: ``(statement, what of it is unknown)``, once for each spelling.
    """

    def __init__(self, found):
        self.found = found
        super().__init__("\n".join(f"{what} in PTX statement {text!r}" for text, what in found))


class UnknownPartError(ValueError):
    """One statement is not known; its message says what of it."""


class Address(NamedTuple):
    """An address in brackets: a register, or the number 0 for the begin of shared memory, and an offset in bytes."""

    base: str | int
    offset: int


class Parameter(NamedTuple):
    """A kernel's parameter in brackets."""

    number: int


class Instruction(NamedTuple):
    """One instruction.

    Operands are register names, integers (the bits of a number), addresses, or tuples of these; `bits` are those of the
    last type, None for a predicate and where there is no type.
    """

    text: str
    guard: str | None
    negated: bool
    opcode: str
    space: str | None
    vector: int
    words: frozenset
    types: tuple
    bits: int | None
    operands: tuple


def parse(ptx):
    """Return (threads of a program, its instructions, {label: index of the instruction that follows}).

    Raises:
        UnknownInstructionsError: Names every statement that the grammar does not know.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    text = text[text.index(".entry") :]
    start = text.index("{")
    header = text[text.index(")", 0, start) + 1 : start]
    unknown = {f"directive .{d}": d for d in re.findall(r"\.(\w+)", header) if d not in HEADER}
    code, labels = [], {}
    for statement in _statements(text[start + 1 : _end(text, start)]):
        label = re.fullmatch(r"([$\w]+):", statement)
        if label:
            labels[label[1]] = len(code)
            continue
        try:
            code.append(parse_statement(statement))
        except UnknownPartError as error:
            # One example stands for all that are unknown for the same reason.
            unknown.setdefault(str(error), statement)
    for instruction in code:
        if instruction.opcode == "bra" and instruction.operands[0] not in labels:
            unknown.setdefault("label", instruction.text)
    if unknown:
        raise UnknownInstructionsError([(statement, what) for what, statement in unknown.items()])
    return int(re.search(r"\.reqntid\s+(\d+)", header)[1]), code, labels


def _end(text, start):
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise ValueError("The kernel's body does not end.")


def _statements(body):
    """Yield labels (with their colon) and instructions; the braces of inline assembly and declarations are dropped."""
    # A line's place in the source is the one directive that no semicolon ends.
    for piece in re.sub(r"^\s*\.loc\b.*$", "", body, flags=re.M).split(";"):
        rest = piece.strip()
        while True:
            rest = rest.lstrip("{} \t\r\n")
            label = re.match(r"[$\w]+:(?!:)", rest)
            if label is None:
                break
            yield label[0]
            rest = rest[label.end() :]
        if rest and not re.match(r"\.(reg|pragma)\b", rest):
            yield " ".join(rest.split())


def parse_statement(text):
    """Return the :class:`Instruction`; raises :class:`UnknownPartError`."""
    if text[0] == ".":
        raise UnknownPartError(f"directive {text.split()[0]}")
    found = re.fullmatch(r"(?:@(!?)(%p\d+) )?([\w.:]+)(?: (.*))?", text)
    if found is None:
        raise UnknownPartError("syntax")
    negated, guard, operation, rest = found.groups()
    opcode, *modifiers = operation.split(".")
    form = FORMS.get(opcode)
    if form is None:
        raise UnknownPartError(f"opcode {opcode}")
    space, vector, words, types = _modifiers(opcode, form, modifiers)
    tokens = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest or "")
    # The policy that a cache hint names and the fraction that a policy is for change no value.
    hinted, packed = CACHE_HINT in words, bool(types) and types[0].endswith("x2")
    expected = form.operands + hinted + packed
    if len(tokens) != expected:
        raise UnknownPartError(f"{len(tokens)} operands of {operation}")
    kept = 1 if opcode == "createpolicy" else form.operands + packed
    operands = tuple(_operand(token, opcode) for token in tokens[:kept])
    width = re.search(r"\d+", types[-1]) if types else None
    bits = int(width[0]) if width else None
    instruction = Instruction(text, guard, bool(negated), opcode, space, vector, words, types, bits, operands)
    _check(instruction, operation)
    return instruction


def _modifiers(opcode, form, modifiers):
    space, vector, words, types = None, None, set(), []
    for modifier in modifiers:
        name, _, suffix = modifier.partition("::")
        if name in SPACES and form.spaces:
            if name not in form.spaces or suffix not in SPACES[name] or space is not None:
                raise UnknownPartError(f"state space .{modifier} of {opcode}")
            space = name
        elif modifier in VECTORS and CACHE_HINT in form.words and vector is None:
            vector = VECTORS[modifier]
        elif modifier in TYPES and len(types) < len(form.types):
            if modifier not in form.types[len(types)]:
                raise UnknownPartError(f"type .{modifier} of {opcode}")
            types.append(modifier)
        elif (modifier in form.words or any(modifier in choice for choice in form.choices)) and modifier not in words:
            words.add(modifier)
        elif modifier not in form.ignored:
            raise UnknownPartError(f"modifier .{modifier} of {opcode}")
    if len(types) != len(form.types) or any(len(words & choice) != 1 for choice in form.choices):
        raise UnknownPartError(f"form {'.'.join([opcode, *modifiers])}")
    if form.spaces and space is None:
        # A generic address: of the tensors, or the memory's books refuse it.
        space = "global"
    return space, vector or 1, frozenset(words), tuple(types)


def _operand(token, opcode):
    if opcode == "bra":
        return token
    if token[0] == "{":
        parts = tuple(_operand(part.strip(), opcode) for part in token[1:-1].split(","))
        return parts[0] if len(parts) == 1 and not opcode.endswith("matrix") else parts
    if token[0] == "[":
        inside = token[1:-1].strip()
        parameter = re.fullmatch(r"\w+_param_(\d+)", inside)
        if parameter:
            return Parameter(int(parameter[1]))
        found = re.fullmatch(r"(%\w+|\w+)(?:\s*\+\s*(-?\d+))?", inside)
        if found is None or not (found[1][0] == "%" or found[1] == SHARED):
            raise UnknownPartError(f"address {token}")
        return Address(0 if found[1] == SHARED else found[1], int(found[2] or 0))
    if (re.fullmatch(r"%[a-z]+\d+|[A-Za-z_]\w*", token) and token != SHARED) or token in SPECIAL:
        # Names without a percent sign are registers that inline assembly declares in braces; `_` drops a result.
        return token
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", token):
        return int(token[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", token):
        return int(token.rstrip("U"), 0)
    symbol = re.fullmatch(SHARED + r"(?:\+(\d+))?", token)
    if symbol:
        return int(symbol[1] or 0)
    raise UnknownPartError(f"operand {token}")


def _check(instruction, operation):
    """Refuse what single modifiers or operands allow and the execution does not do."""
    opcode, words, types, operands = (getattr(instruction, n) for n in ("opcode", "words", "types", "operands"))
    known = True
    if opcode in ("ld", "st") and instruction.space == "param":
        known = isinstance(operands[1], Parameter) and instruction.vector == 1
    elif opcode in ("ld", "st"):
        address, data = operands[:: 1 if opcode == "st" else -1]
        known = isinstance(address, Address)
        known &= (len(data) if isinstance(data, tuple) else 1) == instruction.vector
    elif opcode.endswith("matrix"):
        address, data = operands[:: 1 if opcode == "stmatrix" else -1]
        known = isinstance(address, Address) and isinstance(data, tuple) and f"x{len(data)}" in words
    elif opcode == "mov":
        lists = [operand for operand in operands if isinstance(operand, tuple)]
        known = len(lists) <= 1 and all(len(parts) == 2 for parts in lists)
    elif opcode == "mul":
        known = len(words & {"lo", "hi", "wide"}) == (types[0] not in FLOATS)
    elif opcode in ("add", "sub", "min", "max", "neg", "abs"):
        known = types[0] in FLOATS or not words
    elif opcode == "cvt":
        known = _is_known_conversion(*types, words)
    elif opcode == "setp":
        (comparison,) = words - {"ftz"}
        known = comparison in (ORDERED | UNORDERED if types[0] in FLOATS else ORDERED | UNSIGNED)
    elif opcode == "shfl":
        # Lanes of the whole warp, all of which take part.
        known = operands[3:] == (31, -1)
    elif opcode == "bfe":
        known = all(isinstance(operand, int) for operand in operands[2:])
    if not known:
        raise UnknownPartError(f"form {operation}")


def _is_known_conversion(target, source, words):
    if target in HALVES:
        return source == "f32" and words == {"rn"}
    if source == "bf16":
        return target == "f32" and not words
    if target in FLOATS:
        widens = source == "f16" or (source, target) in (("f32", "f64"), ("f32", "f32"), ("f64", "f64"))
        return words == (set() if widens else {"rn"})
    return words == ({"rzi"} if source in FLOATS else set())
