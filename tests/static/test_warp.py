"""The machine that runs a kernel's machine code: arithmetic, divergence, requests for memory, and what it refuses.

Texts are written by hand as nvdisasm prints them. A result is seen by the address that it is stored to.
"""

import pytest
from assembly import code_of
from instruction_counts import Kernel
from machine_code import Chain, latency
from warp import Launch, Machine

HEAD = "//--------------------- .text.kernel --------------------------\n"


def machine(body, arch=90):
    lines, address = [], 0
    for line in body.strip().splitlines():
        text = line.strip()
        if text.endswith(":"):
            lines.append(text)
        else:
            lines.append(f"        /*{address:04x}*/                   {text} ;")
            address += 16
    return HEAD + "\n".join(lines)


def executed(body, threads):
    return Kernel(machine(body), 90).executed(Launch(bytes(8), (1, 1, 1), threads), [(0, 0, 0)])[0]


def sectors_of(body, *numbers, threads=32):
    """Sectors that the stores of a body ask for; ``numbers``: its parameters."""
    parameters = b"".join((number & 0xFFFFFFFF).to_bytes(4, "little") for number in numbers)
    (run,) = Machine(code_of(machine(body)), 90).run([(Launch(parameters, (1, 1, 1), threads), (0, 0, 0))])
    return run.asked.tolist()


def result_of(body, *numbers):
    """R9:R8 of a body, which must be uniform."""
    (sector,) = sectors_of(f"{body}\nSTG.E desc[UR4][R8.64], R0\nEXIT", *numbers)
    return sector


DIVISION = """
LDC R6, c[0x0][0x210]
LDC R4, c[0x0][0x214]
I2F.U32.RP R0, R4
MUFU.RCP R0, R0
IADD3 R2, R0, 0xffffffe, RZ
F2I.FTZ.U32.TRUNC.NTZ R3, R2
MOV R2, RZ
IADD3 R5, RZ, -R3, RZ
IMAD R5, R5, R4, RZ
IMAD.HI.U32 R3, R3, R5, R2
IMAD.HI.U32 R8, R3, R6, RZ
IADD3 R5, -R8, RZ, RZ
IMAD R5, R4, R5, R6
ISETP.GE.U32.AND P0, PT, R5, R4, PT
@P0 IMAD.IADD R5, R5, 0x1, -R4
@P0 VIADD R8, R8, 0x1
ISETP.GE.U32.AND P1, PT, R5, R4, PT
@P1 IADD3 R8, R8, 0x1, RZ
MOV R9, RZ
SHF.L.U64.HI R9, R8, 0x5, R9
SHF.L.U32 R8, R8, 0x5, RZ
"""


@pytest.mark.parametrize("a", [0, 1, 99, 3136, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("b", [1, 3, 7, 96, 3136, 2**16 + 1, 2**31, 2**32 - 1])
def test_a_division_as_nvcc_writes_it_gives_the_quotient(a, b):
    assert result_of(DIVISION, a, b) == a // b


# Of 16 bits, as the assembler writes it for sm_100: by the reciprocal of a float, scaled where it would be subnormal.
SHORT_DIVISION = """
LDC R7, c[0x0][0x210]
LDC R16, c[0x0][0x214]
IABS R14, R16
IMAD.MOV.U32 R2, RZ, RZ, 0x3f800000
IABS R13, R7
I2F.U16 R0, R14
FSETP.GEU.AND P1, PT, |R0|, 1.175494350822287508e-38, PT
FSETP.GT.AND P0, PT, |R0|, 8.50705917302346158658e+37, PT
FSEL R2, R2, 16777216, P1
FSEL R11, R2, 0.25, !P0
ISETP.NE.AND P0, PT, R16, RZ, PT
FMUL R2, R0, R11
I2F.U16.RZ R0, R13
MUFU.RCP R2, R2
FMUL R11, R11, R2
IADD3 R11, R11, 0x2, RZ
FMUL.RZ R0, R0, R11
LOP3.LUT R11, R16, R7, RZ, 0x3c, !PT
SHF.R.U32.HI R11, RZ, 0x1f, R11
F2I.U32.TRUNC.NTZ R0, R0
IMAD.MOV R15, RZ, RZ, -R11
LOP3.LUT R2, R15, 0xffff, R0, 0x78, !PT
IMAD.IADD R14, R11, 0x1, R2
@!P0 MOV R14, 0xffffffff
LOP3.LUT R14, R14, 0xffff, RZ, 0xc0, !PT
SHF.L.U32 R8, R14, 0x5, RZ
MOV R9, RZ
"""


@pytest.mark.parametrize("a", [0, 1, 31, 1000, 2**15 - 1, -1, -31, -1000])
@pytest.mark.parametrize("b", [0, 1, 2, 3, 7, 31, 100, 2**15 - 1, -3, -100])
def test_a_division_of_16_bits_gives_the_quotient_towards_zero(a, b):
    quotient = -1 if b == 0 else abs(a) // abs(b) * (1 if a * b >= 0 else -1)
    assert result_of(SHORT_DIVISION, a, b) == quotient % 2**16


@pytest.mark.parametrize("a, b", [(2**40 + 5, 2**39 + 2**33 + 7), (2**45 - 1, 1), (2**32 - 1, 2**32 - 1)])
def test_a_carry_goes_from_the_low_word_to_the_high_one(a, b):
    both = [a % 2**32, a >> 32, b % 2**32, b >> 32]
    load = "\n".join(f"LDC R{i}, c[0x0][{0x210 + 4 * i:#x}]" for i in range(4))
    total = f"{load}\nIADD3 R8, P0, R0, R2, RZ\nIADD3.X R9, R1, R3, RZ, P0, !PT"
    assert result_of(total, *both) == (a + b) // 32
    difference = f"{load}\nIADD3 R8, P0, R0, -R2, RZ\nIADD3.X R9, ~R3, R1, RZ, P0, !PT"
    assert result_of(difference, *both) == (a - b) % 2**64 // 32


@pytest.mark.parametrize("number", [-1, -(2**31), 5, 2**31 - 1])
@pytest.mark.parametrize("scale", [1, 4, 31])
def test_an_index_is_scaled_into_64_bits_with_its_sign(number, scale):
    body = f"LDC R2, c[0x0][0x210]\nLEA R8, P0, R2, RZ, {scale:#x}\nLEA.HI.X.SX32 R9, R2, RZ, {scale:#x}, P0"
    assert result_of(body, number) == (number << scale) % 2**64 // 32


@pytest.mark.parametrize("table", range(0, 256, 7))
def test_a_table_of_three_bits_is_read_bit_by_bit(table):
    a, b, c = 0xF0F0_1234, 0xCCCC_5678, 0xAAAA_9ABC
    body = "\n".join(f"LDC R{i}, c[0x0][{0x210 + 4 * i:#x}]" for i in range(3))
    body += f"\nLOP3.LUT R8, R0, R1, R2, {table:#x}, !PT\nMOV R9, RZ"
    bits = [table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)]
    assert result_of(body, a, b, c) == sum(bit << i for i, bit in enumerate(bits)) // 32


def test_bytes_are_permuted_from_two_words():
    body = "LDC R0, c[0x0][0x210]\nLDC R1, c[0x0][0x214]\nPRMT R8, R0, 0x5410, R1\nMOV R9, RZ"
    assert result_of(body, 0x11223344, 0xAABBCCDD) == 0xCCDD3344 // 32


def test_two_halves_of_a_float16_pair_move_a_number():
    assert result_of("HFMA2.MMA R8, -RZ, RZ, 0, 3.814697265625e-06\nMOV R9, RZ") == 64 // 32


DIVERGENT = """
S2R R0, SR_TID.X
BSSY B0, `(.L_end)
.L_loop:
ISETP.NE.AND P0, PT, R0, RZ, PT
@!P0 BRA `(.L_out)
IADD3 R0, R0, -0x1, RZ
FFMA R3, R3, R3, R3
BRA `(.L_loop)
.L_out:
BSYNC B0
.L_end:
FADD R3, R3, R3
EXIT
"""


def test_a_warp_goes_round_a_loop_as_often_as_its_slowest_thread():
    """Thread t trips t times; behind the loop all threads of a warp are together again."""
    found = executed(DIVERGENT, 96)
    assert found.opcodes["FFMA"] == 31 + 63 + 95
    assert found.opcodes["FADD"] == 3


@pytest.mark.parametrize("threads, warps", [(32, 1), (40, 2), (512, 16)])
def test_both_sides_of_a_branch_count_where_a_warp_parts(threads, warps):
    body = """
S2R R0, SR_TID.X
ISETP.GE.AND P0, PT, R0, 0x8, PT
BSSY B0, `(.L_1)
@P0 BRA `(.L_0)
FMUL R3, R3, R3
.L_0:
BSYNC B0
.L_1:
FADD R3, R3, R3
EXIT
"""
    found = executed(body, threads)
    assert found.opcodes.get("FMUL") == 1
    assert found.opcodes["FADD"] == warps


def test_a_loop_counter_comes_from_the_parameters_of_the_architecture():
    body = """
LDC R0, c[0x0][{at}]
.L_0:
IADD3 R0, R0, -0x1, RZ
ISETP.NE.AND P0, PT, R0, RZ, PT
FFMA R3, R3, R3, R3
@P0 BRA `(.L_0)
EXIT
"""
    for arch, at in ((80, "0x160"), (90, "0x210"), (100, "0x380")):
        text = machine(body.format(at=at))
        found = Kernel(text, arch).executed(Launch((37).to_bytes(4, "little"), (1, 1, 1), 64), [(0, 0, 0)])[0]
        assert found.opcodes["FFMA"] == 2 * 37


def test_a_branch_on_what_memory_holds_is_refused_by_name():
    body = """
LDC.64 R2, c[0x0][0x210]
LDG.E R0, desc[UR4][R2.64]
ISETP.NE.AND P3, PT, R0, RZ, PT
@P3 BRA `(.L_0)
FADD R3, R3, R3
.L_0:
EXIT
"""
    with pytest.raises(ValueError, match=r"@P3 BRA"):
        Machine(code_of(machine(body)), 90).run([(Launch(bytes(8), (1, 1, 1), 32), (0, 0, 0))])


def test_a_predicate_kept_in_a_register_with_loaded_bits_is_known():
    body = """
LDC.64 R2, c[0x0][0x210]
LDG.E R0, desc[UR4][R2.64]
S2R R4, SR_TID.X
ISETP.GE.AND P0, PT, R4, 0x20, PT
LOP3.LUT R0, R0, 0xfffffffb, RZ, 0xc0, !PT
@P0 LOP3.LUT R0, R0, 0x4, RZ, 0xfc, !PT
LOP3.LUT P1, RZ, R0, 0x4, RZ, 0xc0, !PT
@P1 BRA `(.L_0)
FADD R3, R3, R3
.L_0:
EXIT
"""
    found = executed(body, 96)
    assert found.opcodes["FADD"] == 1


@pytest.mark.parametrize("number", [3, 40])
def test_uniform_predicates_keep_their_places_in_a_register(number):
    """UP2UR and UR2UP, at bits 1 and 2: they are lost in between and come back."""
    body = """
LDC R0, c[0x0][0x210]
R2UR UR0, R0
UISETP.GE.AND UP2, UPT, UR0, 0x20, UPT
UISETP.LT.AND UP1, UPT, UR0, 0x20, UPT
UP2UR UR3, UPR, URZ, 0x6
UISETP.NE.AND UP2, UPT, UR0, UR0, UPT
UISETP.NE.AND UP1, UPT, UR0, UR0, UPT
UR2UP UPR, UR3, 0x6
USEL UR8, URZ, 0x40, !UP2
@!UP1 UIADD3 UR8, UR8, 0x80, URZ
MOV R8, UR8
MOV R9, RZ
"""
    assert result_of(body, number) == (0x40 + 0x80 if number >= 32 else 0) // 32


STORE = """
S2R R0, SR_TID.X
IMAD R2, R0, {stride:#x}, RZ
{store}
EXIT
"""


@pytest.mark.parametrize(
    "stride, store, wavefronts",
    [
        (4, "STS [R2], R4", 1),
        (8, "STS [R2], R4", 2),
        (128, "STS [R2], R4", 32),
        (132, "STS [R2], R4", 1),
        (0, "STS [R2], R4", 1),
        (2, "STS.U16 [R2], R4", 1),
        (8, "STS.64 [R2], R4", 2),
        (16, "STS.128 [R2], R4", 4),
        (32, "STS.128 [R2], R4", 8),
        (16, "LDSM.16.M88.4 R4, [R2]", 4),
        (144, "LDSM.16.M88.4 R4, [R2]", 4),
        (128, "LDSM.16.M88.4 R4, [R2]", 32),
        (144, "LDSM.16.M88.2 R4, [R2]", 2),
    ],
)
def test_bank_conflicts_come_from_the_addresses(stride, store, wavefronts):
    kernel = Kernel(machine(STORE.format(stride=stride, store=store)), 90)
    (found,) = kernel.executed(Launch(b"", (1, 1, 1), 64), [(0, 0, 0)])
    assert found.wavefronts == 2 * wavefronts


@pytest.mark.parametrize("stride, sectors", [(2, 2), (4, 4), (16, 16), (32, 32), (392, 32)])
def test_sectors_come_from_the_addresses_and_four_take_a_wavefront(stride, sectors):
    body = STORE.format(stride=stride, store="MOV R3, RZ\nSTG.E.U16 desc[UR4][R2.64], R4")
    found = executed(body, 32)
    assert found.sectors == sectors
    assert found.wavefronts == -(-sectors // 4)


def test_between_two_barriers_the_slowest_warp_decides():
    """One warp works before the barrier, the other behind it: the program takes as long as both."""
    work = "\n".join(["MUFU.EX2 R3, R3"] * 20)
    body = f"""
S2R R0, SR_TID.X
ISETP.GE.AND P0, PT, R0, 0x20, PT
@P0 BRA `(.L_0)
{work}
.L_0:
BAR.SYNC.DEFER_BLOCKING 0x0
@!P0 BRA `(.L_1)
{work}
.L_1:
EXIT
"""
    both = executed(body, 64)
    one = executed(body, 32)
    assert both.chain - one.chain == pytest.approx(20 * 20, abs=25)


# Program p of a launch with number n: warp w goes round n + p + w times, and its threads ask n bytes apart.
WALK = """
S2R R0, SR_TID.X
S2R R1, SR_CTAID.X
LDC R2, c[0x0][0x210]
SHF.R.U32.HI R3, RZ, 0x5, R0
IADD3 R4, R1, R2, R3
IMAD R6, R0, R2, RZ
LDS R5, [R6]
MOV R7, RZ
.L_loop:
ISETP.EQ.AND P0, PT, R4, RZ, PT
@P0 BRA `(.L_out)
STG.E desc[UR4][R6.64], R5
IADD3 R6, R6, 0x80, RZ
IADD3 R4, R4, -0x1, RZ
FFMA R5, R5, R5, R5
BRA `(.L_loop)
.L_out:
@P0 BAR.SYNC 0x0
FADD R5, R5, R5
EXIT
"""


def test_programs_side_by_side_execute_what_each_executes_alone():
    """Of several launches, with other trips, conflicts and sectors."""
    launches = [Launch(n.to_bytes(4, "little") + bytes(4), (9, 1, 1), 96) for n in (2, 4, 36)]
    programs = ((0, 0, 0), (1, 0, 0), (8, 0, 0))
    together, asked = Kernel(machine(WALK), 90), [(launch, programs, 150) for launch in launches]
    together.prepare(asked)
    alone = [Kernel(machine(WALK), 90).executed(one, [place], 150)[0] for one in launches for place in programs]
    assert [found for one in asked for found in together.executed(*one)] == alone
    assert len({found.sectors for found in alone}) == len(alone)


def test_a_loop_takes_as_long_as_its_instructions_one_by_one():
    """What is pending at the end of a block is waited for in the next, however often it comes."""
    body = (
        "LDG.E R1, desc[UR4][R8.64]\nFFMA R2, R1, R3, R2\nMUFU.RCP R3, R2\nBRA `(.L_0)\n.L_0:\nFADD R4, R3, R4\nEXIT"
    )
    blocks = code_of(machine(body)).blocks
    passed = [0, 0, 1, 0, 1, 1, *[0] * 50, 1]
    ready, now = {}, 0
    for one in (one for block in passed for one in blocks[block].instructions):
        now = max(now + 1, *(ready.get(register, 0) for register in range(1024) if one.reads >> register & 1), 0)
        ready |= {register: now + latency(one, 270) for register in range(1024) if one.writes >> register & 1}
    assert Chain(blocks, 270).cycles(passed) == (now,)
