"""What instructions of machine code compute, as Python expressions over the threads of a block.

A register is an array of 32 bits for every thread, a predicate one of truth values. Here stand integer arithmetic,
comparisons, moves, and the float steps that integer divisions take: what branches and addresses are made of. An
instruction that is not here is only counted; `computed` gives None for it. Sources: "CUDA Binary Utilities" for the
names, "PTX ISA" for what the operations mean. One list of opcodes, a function for each family: it is longer than other
files, since it has one place to look.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
from assembly import Sass, plain

Assignments = list[tuple[str, str]]
MASK = (1 << 32) - 1


class Unknown(Exception):
    """An operand or a suffix that is not computed."""


def computed(one: Sass) -> Assignments | None:
    """(register, expression) of what an instruction writes, or None.

    Registers are R[i], U[i], P[i] and Q[i] (uniform predicates). The names in an expression are those of lanes.NAMES;
    k(o, b) is a word of constant bank b at o, n(i) a number, s(name) a special register.
    """
    build = _BUILD.get(plain(one.opcode))
    if build is None:
        return None
    try:
        return [(place, text) for place, text in build(one) if place]
    except Unknown:
        return None


# ---- operands -------------------------------------------------------------------------------------------------------


@functools.lru_cache(1 << 16)
def place(operand: str) -> str:
    """Where a target lies; '' for RZ and PT."""
    found = re.fullmatch(r"(UR|R|UP|P)(\d+)", operand)
    if not found:
        return ""
    return f"{ {'R': 'R', 'UR': 'U', 'P': 'P', 'UP': 'Q'}[found[1]] }[{found[2]}]".replace(" ", "")


@functools.lru_cache(1 << 16)
def predicate(operand: str) -> str:
    if operand.startswith("!"):
        return f"(~{predicate(operand[1:])})"
    if operand in ("PT", "UPT"):
        return "true"
    if not place(operand):
        raise Unknown(operand)
    return place(operand)


@functools.lru_cache(1 << 16)
def value(operand: str, next_register: int = 0) -> str:
    """32 bits of a source; ``next_register`` 1 is what lies above it."""
    if operand.startswith("-"):
        return f"(z - {value(operand[1:])})" if not operand.startswith("-0x") else f"n({int(operand, 16) & MASK})"
    if operand.startswith("~"):
        return f"(~{value(operand[1:])})"
    if found := re.fullmatch(r"(U?R)(\d+)(\.64)?", operand):
        return f"{'U' if found[1] == 'UR' else 'R'}[{int(found[2]) + next_register}]"
    if operand in ("RZ", "URZ", "SRZ"):
        return "z"
    if re.fullmatch(r"0x[0-9a-f]+", operand):
        return f"n({(int(operand, 16) >> 32 * next_register) & MASK})"
    if found := re.fullmatch(r"c\[0x([02])\]\[(0x[0-9a-f]+|RZ|URZ)\]", operand):
        first = int(found[2], 16) if found[2][0] == "0" else 0
        return f"k({first + 4 * next_register}, {found[1]})"
    raise Unknown(operand)


def wide(operand: str) -> str:
    """64 bits of a source."""
    if operand.startswith("-") and not operand.startswith("-0x"):
        return f"(z64 - {wide(operand[1:])})"
    if operand in ("RZ", "URZ"):
        return "z64"
    if operand.startswith("-0x"):
        return f"join(n({int(operand, 16) & MASK}), n({(int(operand, 16) >> 32) & MASK}))"
    return f"join({value(operand)}, {value(operand, 1)})"


def _term(operand: str) -> str:
    """A summand in 64 bits, so that carries come out: -x is ~x + 1."""
    if operand.startswith("-") and not operand.startswith("-0x"):
        return f"(up(~{value(operand[1:])}) + one)"
    return f"up({value(operand)})"


def _pair(target: str, expression: str) -> Assignments:
    """Both registers of a 64-bit result."""
    if not (low := place(target)):
        return []
    high = f"{low[0]}[{int(low[2:-1]) + 1}]"
    return [(low, f"low({expression})"), (high, f"high({expression})")]


def _split(one: Sass) -> tuple[str, list[str], list[str]]:
    """(register, predicates) that are written, and the sources. Predicates that are PT are left out."""
    written = list(one.operands[: len(one.operands) - len(one.sources)])
    target = next(operand for operand in written if re.fullmatch(r"U?R(\d+|Z)", operand))
    return target, [operand for operand in written if place(operand) and "P" in operand], list(one.sources)


def _only(one: Sass, *allowed: str) -> set[str]:
    """The suffixes, if all are among ``allowed``."""
    found = set(one.suffixes[1:])
    if found - set(allowed):
        raise Unknown(one.name)
    return found


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def _move(one: Sass) -> Assignments:
    if "64" in _only(one, "64", "U32"):
        return _pair(one.operands[0], wide(one.operands[1]))
    return [(place(one.operands[0]), value(one.operands[1]))]


def _add(one: Sass) -> Assignments:
    """IADD3, VIADD, and IADD.64."""
    suffixes = _only(one, "X", "64")
    target, carries, sources = _split(one)
    if "64" in suffixes:
        if carries:
            raise Unknown(one.name)
        return _pair(target, f"({' + '.join(wide(source) for source in sources)})")
    extra = [source for source in sources if re.fullmatch(r"!?U?P(\d|T)", source)]
    numbers = [source for source in sources if source not in extra]
    if "X" in suffixes:
        numbers_text = [_term(source) for source in numbers] + [f"up({predicate(source)})" for source in extra]
    elif extra:
        raise Unknown(one.name)
    elif not carries:
        return [(place(target), f"({' + '.join(value(source) for source in numbers)})")]
    else:
        numbers_text = [_term(source) for source in numbers]
    total = f"({' + '.join(numbers_text)})"
    # Of two carries each counts once.
    return [(place(target), f"low({total})"), *[(place(p), f"(high({total}) > {i})") for i, p in enumerate(carries)]]


def _multiply_add(one: Sass) -> Assignments:
    suffixes = _only(one, "MOV", "U32", "IADD", "SHL", "X", "WIDE", "HI", "S32")
    target, carries, sources = _split(one)
    a, b, c, *carry_in = sources
    if not suffixes & {"WIDE", "HI"}:
        if carries:
            raise Unknown("carry of a product")
        carried = f" + {' + '.join(f'cast({predicate(one)})' for one in carry_in)}" if carry_in else ""
        return [(place(target), f"({_product(a, b)} + {value(c)}{carried})")]
    extend = "up" if "U32" in suffixes else "sext"
    product = f"({extend}({value(a)}) * {extend}({value(b)}))"
    total = f"({product} + {wide(c)})"
    if carry_in or len(carries) > 1:
        raise Unknown("a carry into a wide product")
    carry = [(place(one), f"({total} < {product})") for one in carries]
    if "WIDE" in suffixes:
        return _pair(target, total) + carry
    return [(place(target), f"high({total})"), *carry]


def _product(a: str, b: str) -> str:
    if b == "0x1":
        return value(a)
    return "z" if a == b == "RZ" else f"{value(a)} * {value(b)}"


def _lea(one: Sass) -> Assignments:
    suffixes = _only(one, "HI", "X", "SX32")
    target, carries, sources = _split(one)
    carry_in = [sources.pop()] if "X" in suffixes else []
    shift = int(sources.pop(), 16)
    a, b = sources[:2]
    if "HI" not in suffixes:
        shifted = f"up({value(a)} << n({shift}))"
    elif "SX32" in suffixes:
        shifted = f"up(high(sext({value(a)}) << n64({shift})))"
    else:
        above = sources[2] if len(sources) > 2 else "RZ"
        shifted = f"up(high(join({value(a)}, {value(above)}) << n64({shift})))"
    total = f"({shifted} + {_term(b)}{''.join(f' + up({predicate(source)})' for source in carry_in)})"
    return [(place(target), f"low({total})"), *[(place(carry), f"(high({total}) != 0)") for carry in carries]]


def _shift(one: Sass) -> Assignments:
    suffixes = _only(one, "L", "R", "U32", "S32", "HI", "U64", "S64", "W")
    target, _, (a, by, c) = _split(one)
    count = f"({value(by)} & n(31))" if "W" in suffixes else f"least({value(by)}, n(63))"
    if "L" in suffixes:
        if "HI" not in suffixes:
            return [(place(target), f"low(up({value(a)}) << {count})")]
        return [(place(target), f"high(join({value(a)}, {value(c)}) << {count})")]
    if suffixes & {"S32", "S64"}:
        joined = f"(join({value(a)}, {value(c)}).view(int64) >> {count}.astype(int64)).view(uint64)"
    else:
        joined = f"(join({value(a)}, {value(c)}) >> {count})"
    return [(place(target), f"{'high' if 'HI' in suffixes else 'low'}({joined})")]


def _logic(one: Sass) -> Assignments:
    _only(one, "LUT")
    *sources, table, other = one.sources
    target, predicates, _ = _split(one)
    result = _table(int(table, 16), [value(source) for source in sources[:3]])
    found = [(place(target), result)]
    return found + [(place(p), f"(({result} != 0) | {predicate(other)})") for p in predicates]


_LOGIC = {
    0xC0: "({0} & {1})", 0x30: "({0} & ~{1})", 0xFC: "({0} | {1})", 0x3C: "({0} ^ {1})", 0x33: "(~{1})",
    0x0F: "(~{0})", 0xF8: "({0} | {1} & {2})", 0xEA: "({0} & {1} | {2})", 0xFE: "({0} | {1} | {2})",
    0x80: "({0} & {1} & {2})",
    0x96: "({0} ^ {1} ^ {2})", 0xF0: "({0})", 0xCC: "({1})", 0xAA: "({2})", 0xE2: "({1} & {0} | ~{1} & {2})",
}  # fmt: skip


def _table(table: int, sources: list[str]) -> str:
    """Bit by bit: the result for bits a, b, c is bit 4a + 2b + c of ``table``."""
    if table in _LOGIC:
        return _LOGIC[table].format(*sources)
    terms = []
    for index in range(8):
        if table >> index & 1:
            signs = ("" if index >> (2 - place_) & 1 else "~" for place_ in range(3))
            terms.append(f"({' & '.join(sign + source for sign, source in zip(signs, sources, strict=True))})")
    return f"({' | '.join(terms)})" if terms else f"({sources[0]} & ~{sources[0]})"


def _predicates(one: Sass) -> Assignments:
    _only(one, "LUT")
    *sources, first, second = one.sources
    both = zip(one.operands[:2], (int(first, 16), int(second, 16)), strict=True)
    texts = [predicate(source) for source in sources[:3]]
    return [(place(target), _table(table, texts)) for target, table in both if place(target)]


_COMPARE = {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "EQ": "==", "NE": "!="}


def _compare(one: Sass) -> Assignments:
    relation, *suffixes = one.suffixes[1:]
    if relation not in _COMPARE or set(suffixes) - {"U32", "S32", "U64", "S64", "AND", "OR", "XOR", "EX"}:
        raise Unknown(one.name)
    a, b, combined, *extended = one.sources
    whole = bool({"U64", "S64"} & set(suffixes))
    texts = [wide(x) if whole else value(x) for x in (a, b)]
    if not {"U32", "U64"} & set(suffixes):
        texts = [f"{text}.view({'int64' if whole else 'int32'})" for text in texts]
    found = f"({texts[0]} {_COMPARE[relation]} {texts[1]})"
    if "EX" in suffixes:
        # The low words decide where the high ones are equal.
        strict = {"LE": "<", "GE": ">"}.get(relation, _COMPARE[relation])
        low = predicate(extended[0])
        equal = f"({texts[0]} == {texts[1]})"
        found = f"(({texts[0]} {strict} {texts[1]}) | {equal} & {low})" if relation != "EQ" else f"({equal} & {low})"
    join = next(sign for name, sign in (("AND", "&"), ("OR", "|"), ("XOR", "^")) if name in suffixes)
    results = (f"({found} {join} {predicate(combined)})", f"(~{found} {join} {predicate(combined)})")
    return [(place(target), text) for target, text in zip(one.operands[:2], results, strict=True)]


def _select(one: Sass) -> Assignments:
    target, _, (a, b, p) = _split(one)
    if "64" in _only(one, "64"):
        return _pair(target, f"where({predicate(p)}, {wide(a)}, {wide(b)})")
    return [(place(target), f"where({predicate(p)}, {value(a)}, {value(b)})")]


def _extreme(one: Sass) -> Assignments:
    """The smaller, or with !PT the larger: IMNMX, VIMNMX, VIADDMNMX."""
    suffixes = _only(one, "U32", "S32", "S64", "U64")
    target, predicates, sources = _split(one)
    if predicates:
        raise Unknown(one.name)
    numbers = [source for source in sources if not re.fullmatch(r"!?U?P(\d|T)", source)]
    choice = next(source for source in sources if source not in numbers)
    whole, unsigned = bool(suffixes & {"S64", "U64"}), bool(suffixes & {"U32", "U64"})
    texts = [wide(x) if whole else value(x) for x in numbers]
    if len(texts) == 3 and "ADD" in one.opcode:
        texts = [f"({texts[0]} + {texts[1]})", texts[2]]
    width = 64 if whole else 32
    views = [f"{text}.view({'u' if unsigned else ''}int{width})" for text in texts]
    least, most = ("{}({}).view(uint{})".format(name, ", ".join(views), width) for name in ("least", "most"))
    if len(views) != 2:
        raise Unknown(one.name)
    text = {"PT": least, "UPT": least, "!PT": most, "!UPT": most}.get(choice)
    text = text or f"where({predicate(choice)}, {least}, {most})"
    return _pair(target, text) if whole else [(place(target), text)]


def _permute(one: Sass) -> Assignments:
    _only(one)
    a, selector, b = one.sources
    if not re.fullmatch(r"0x[0-9a-f]+", selector):
        raise Unknown(one.name)
    joined = f"join({value(a)}, {value(b)})"
    parts = []
    for byte in range(4):
        choice = int(selector, 16) >> 4 * byte & 0xF
        if choice & 8:  # eight times the sign of a byte
            found = f"(({joined} >> n64({8 * (choice & 7) + 7})) & n64(1)) * n64(255)"
        else:
            found = f"(({joined} >> n64({8 * choice})) & n64(255))"
        parts.append(f"{found} << n64({8 * byte})")
    return [(place(one.operands[0]), f"low({' | '.join(f'({part})' for part in parts)})")]


def _absolute(one: Sass) -> Assignments:
    _only(one)
    return [(place(one.operands[0]), f"abs({value(one.operands[1])}.view(int32)).view(uint32)")]


def _sign_extend(one: Sass) -> Assignments:
    suffixes = _only(one, "U32")
    target, a, size = one.operands
    drop = f"n({32 - int(size, 16)})"
    shifted = f"({value(a)} << {drop})"
    if "U32" in suffixes:
        return [(place(target), f"({shifted} >> {drop})")]
    return [(place(target), f"({shifted}.view(int32) >> {drop}.view(int32)).view(uint32)")]


def _count_ones(one: Sass) -> Assignments:
    _only(one)
    return [(place(one.operands[0]), f"popcount({value(one.operands[1])})")]


# ---- the float steps of integer divisions ---------------------------------------------------------------------------


def _to_float(one: Sass) -> Assignments:
    suffixes = _only(one, "RP", "RZ", "U16", "U32", "S32", "U64")
    if "RP" not in suffixes:
        return _nearest_float(one)
    target, source = one.operands
    number = f"{wide(source)}" if "U64" in suffixes else value(source)
    if not suffixes & {"U32", "U64"}:
        number = f"{number}.view(int32)"
    return [(place(target), f"float_up({number})")]


def _to_integer(one: Sass) -> Assignments:
    suffixes = _only(one, "FTZ", "U32", "U64", "TRUNC", "NTZ")
    target, source = one.operands
    if "U64" in suffixes:
        return _pair(target, f"truncated({value(source)}, 64)")
    return [(place(target), f"truncated({value(source)}, 32)")] if "U32" in suffixes else _refuse(one)


def _special(one: Sass) -> Assignments:
    if set(one.suffixes[1:]) != {"RCP"}:
        raise Unknown(one.name)
    return [(place(one.operands[0]), f"reciprocal({value(one.operands[1])})")]


_NUMBER = r"-?[\d.]+(e[+-]?\d+)?"


def _float(source: str) -> str:
    """A source as float32 numbers."""
    if source.startswith("-"):
        return f"(-{_float(source[1:])})"
    if source.startswith("|"):
        return f"abs({_float(source.strip('|'))})"
    if re.fullmatch(_NUMBER, source):
        return f"float32({source})"
    return f"{value(source)}.view(float32)"


_FLOAT = {"FADD": "{} + {}", "FMUL": "{} * {}", "FFMA": "({} * {} + {})"}


def _float_arithmetic(one: Sass) -> Assignments:
    """Of numbers of the launch, as 1 / (height * width); rounded once more than the hardware does."""
    if one.name == "FMUL.RZ":
        return [(place(one.operands[0]), f"product_down({', '.join(map(_float, one.sources))})")]
    _only(one, "FTZ")
    text = _FLOAT[one.opcode].format(*map(_float, one.sources))
    return [(place(one.operands[0]), f"({text}).astype(float32).view(uint32)")]


def _nearest_float(one: Sass) -> Assignments:
    suffixes = _only(one, "F32", "S32", "U32", "U16", "RZ")
    target, source = one.operands
    if "U16" in suffixes:  # exact, however it is rounded
        return [(place(target), f"({value(source)} & n(65535)).astype(float32).view(uint32)")]
    if "RZ" in suffixes:
        raise Unknown(one.name)
    signed = "" if "U32" in suffixes else ".view(int32)"
    return [(place(target), f"{value(source)}{signed}.astype(float32).view(uint32)")]


def _float_compare(one: Sass) -> Assignments:
    relation, *suffixes = one.suffixes[1:]
    relation = relation.removesuffix("U")  # no number of a launch is a NaN
    if relation not in _COMPARE or set(suffixes) - {"FTZ", "AND"}:
        raise Unknown(one.name)
    a, b, combined = one.sources
    found = f"({_float(a)} {_COMPARE[relation]} {_float(b)})"
    results = (f"({found} & {predicate(combined)})", f"(~{found} & {predicate(combined)})")
    return [(place(target), text) for target, text in zip(one.operands[:2], results, strict=True)]


def _float_select(one: Sass) -> Assignments:
    _only(one, "FTZ")
    target, a, b, choice = one.operands
    return [(place(target), f"where({predicate(choice)}, {_float(a)}, {_float(b)}).view(uint32)")]


def _half_constant(one: Sass) -> Assignments:
    """Two float16 numbers as one word: HFMA2 of zeros moves a constant."""
    target, a, b, *both = one.operands
    if len(both) != 2:
        raise Unknown(one.name)
    high, low = both
    if {a, b} - {"RZ", "-RZ"} or not all(re.fullmatch(_NUMBER, half) for half in both):
        raise Unknown(one.name)
    halves = np.array([float(low), float(high)], np.float16)
    return [(place(target), f"n({int(halves.view(np.uint32)[0])})")]


def _refuse(one: Sass) -> Assignments:
    raise Unknown(one.name)


# ---- what is read from elsewhere ------------------------------------------------------------------------------------


def _constant(one: Sass) -> Assignments:
    suffixes = _only(one, "64", "128", "U8", "U16", "32")
    found = re.fullmatch(r"c\[0x([02])\]\[(?:(U?R\d+|U?RZ)\+?)?(-?0x[0-9a-f]+)?\]", one.sources[0])
    if found is None:
        raise Unknown(one.name)
    bank, register, first = found[1], found[2], int(found[3] or "0", 16)
    count = 2 if "64" in suffixes else 4 if "128" in suffixes else 1
    target = place(one.operands[0])
    places = [f"{target[0]}[{int(target[2:-1]) + index}]" for index in range(count)]
    if register and "Z" not in register:
        texts = [f"gather({value(register)} + n({(first + 4 * index) & MASK}), {bank})" for index in range(count)]
    else:
        texts = [f"k({(first + 4 * index) & ~3}, {bank})" for index in range(count)]
    for name, mask in (("U8", 0xFF), ("U16", 0xFFFF)):
        if name in suffixes:
            if register and "Z" not in register:
                raise Unknown(one.name)
            texts = [f"(({texts[0]} >> n({8 * (first & 3)})) & n({mask}))"]
    return list(zip(places, texts, strict=True))


_SPECIAL = ("SR_TID.X", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z", "SR_LANEID", "SR_CgaCtaId")


def _special_register(one: Sass) -> Assignments:
    target, source = one.operands
    if source in ("SRZ", "URZ"):
        return (
            _pair(target, "z64")
            if plain(one.opcode) in ("CS2R", "CS2UR") and "32" not in one.suffixes
            else [(place(target), "z")]
        )
    if source not in _SPECIAL:
        raise Unknown(source)
    return [(place(target), f"s({source!r})")]


def _to_uniform(one: Sass) -> Assignments:
    if len(one.operands) != 2:
        raise Unknown(one.name)
    return [(place(one.operands[0]), f"first({value(one.operands[1])}, m)")]


def _shuffle(one: Sass) -> Assignments:
    target, predicates, (source, by, clamp) = _split(one)
    mode = one.suffixes[1]
    if predicates or clamp != ("0x0" if mode == "UP" else "0x1f"):
        raise Unknown(one.name)
    return [(place(target), f"shuffled({value(source)}, {value(by)}, {mode!r})")]


def _vote(one: Sass) -> Assignments:
    mode = (*one.suffixes[1:], "")[0]
    if mode not in ("ANY", "ALL", ""):
        raise Unknown(one.name)
    votes = predicate(one.operands[-1])
    if "R" in one.operands[0]:
        return [(place(one.operands[0]), f"ballot({votes}, m)")]
    against = f"(ballot(~{votes}, m) == 0)"
    return [(place(one.operands[0]), against if mode == "ALL" else f"(ballot({votes}, m) != 0)")]


def _elected(one: Sass) -> Assignments:
    """One thread of a warp."""
    return [(place(one.operands[0]), "elected(m)")]


def _at_once(one: Sass) -> Assignments:
    """A wait at a barrier in shared memory, or for tensor memory, is taken to end at once."""
    return [(place(one.operands[0]), "true")] if "TRYWAIT" in one.name or "FIND_AND_SET" in one.name else _refuse(one)


def _all_predicates(one: Sass) -> Assignments:
    _only(one)
    target, _, base, mask = one.operands
    bits = [f"(cast({its_place}) << n({i}))" for i, its_place in _masked_predicates(one)]
    return [(place(target), f"({value(base)} & n({~int(mask, 16) & MASK}) | {' | '.join(bits)})")]


def _into_predicates(one: Sass) -> Assignments:
    _only(one)
    source = one.operands[1]
    return [(its_place, f"(({value(source)} >> n({i})) & n(1) != 0)") for i, its_place in _masked_predicates(one)]


def _masked_predicates(one: Sass) -> list[tuple[int, str]]:
    """(number, place) of those that the last operand names by its bits."""
    kind, mask = "Q" if one.opcode.startswith("U") else "P", int(one.operands[-1], 16)
    return [(i, f"{kind}[{i}]") for i in range(7) if mask >> i & 1]


def _division_is_ordinary(one: Sass) -> Assignments:
    """FCHK: whether a float division needs the slow way, which numbers of usual size never do."""
    return [(place(one.operands[0]), "false")]


_BUILD: dict[str, Callable[[Sass], Assignments]] = {
    "MOV": _move, "IADD3": _add, "IADD": _add, "VIADD": _add, "IMAD": _multiply_add, "LEA": _lea, "SHF": _shift,
    "LOP3": _logic, "PLOP3": _predicates, "ISETP": _compare, "SEL": _select, "IMNMX": _extreme, "VIMNMX": _extreme,
    "VIADDMNMX": _extreme, "PRMT": _permute, "IABS": _absolute, "SGXT": _sign_extend, "POPC": _count_ones,
    "I2F": _to_float, "I2FP": _nearest_float, "FADD": _float_arithmetic, "FMUL": _float_arithmetic,
    "FFMA": _float_arithmetic, "F2I": _to_integer, "MUFU": _special, "HFMA2": _half_constant, "LDC": _constant,
    "LDCU": _constant, "S2R": _special_register, "S2UR": _special_register, "CS2R": _special_register,
    "CS2UR": _special_register, "R2UR": _to_uniform, "SHFL": _shuffle, "VOTE": _vote, "VOTEU": _vote,
    "ELECT": _elected, "SYNCS": _at_once, "UTCATOMSWS": _at_once, "P2R": _all_predicates, "R2P": _into_predicates,
    "P2UR": _all_predicates, "R2UP": _into_predicates,
    "FSETP": _float_compare, "FSEL": _float_select, "FCHK": _division_is_ordinary,
}  # fmt: skip
# What does not depend on its operands here.
CONSTANT = ("FCHK", "SYNCS", "UTCATOMSWS", "ELECT")
