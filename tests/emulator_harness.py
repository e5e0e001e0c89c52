"""Runs snippets of PTX in the emulator: each lane its own operands, one kernel per snippet."""

from fractions import Fraction

import numpy as np

from deep_gemm.sm120.emulator import Buffer, Counters, Module

HEADER = ".version 9.0\n.target sm_120f\n.address_size 64\n"
REGISTERS = (
    ".reg .pred %p<16>; .reg .b16 %h<64>; .reg .b32 %r<128>; .reg .b64 %d<64>; .reg .b32 %tid; .reg .b64 %at<16>; "
    ".reg .b64 %tid64;"
)


def kernel(body: str, params: int, extra: str = "") -> str:
    """A kernel ``k`` of 64-bit parameters p0, p1, ...; %tid is the thread's number in the grid, %at<n> = p<n>."""
    declared = ", ".join(f".param .u64 p{n}" for n in range(params))
    loads = "\n".join(f"ld.param.u64 %at{n}, [p{n}];" for n in range(params))
    return f"""{HEADER}{extra}
.visible .entry k({declared})
{{
{REGISTERS}
mov.u32 %r100, %ctaid.x; mov.u32 %r101, %ntid.x; mov.u32 %r102, %tid.x;
mad.lo.u32 %tid, %r100, %r101, %r102; cvt.u64.u32 %tid64, %tid;
{loads}
{body}
ret;
}}"""


def launch(body: str, arrays: list[np.ndarray], threads=32, blocks=1, extra="", shared=0, **options) -> Counters:
    """Run ``body`` with the arrays' addresses as parameters; arrays are changed in place."""
    buffers = [Buffer.of(array, f"array{n}") for n, array in enumerate(arrays)]
    params = [array.ctypes.data for array in arrays]
    module = Module(kernel(body, len(arrays), extra))
    return module.launch("k", blocks, threads, params, buffers, shared_bytes=shared, **options)


PREFIX = {2: "%h", 4: "%r", 8: "%d"}


def evaluate(instruction: str, sources: list[np.ndarray], result) -> np.ndarray:
    """Each lane's result of one instruction (or several) on its own elements.

    In ``instruction`` {y} is the destination, {0}, {1}, ... the sources; registers are as wide as the arrays' elements,
    bool arrays are predicates.
    """
    lanes = len(sources[0])
    arrays, body, names = [np.zeros(lanes, result if result is not bool else np.uint32)], [], []
    for n, source in enumerate(sources):
        stored = source.astype(np.uint32) if source.dtype == bool else np.ascontiguousarray(source)
        arrays.append(stored)
        size = stored.dtype.itemsize
        name = f"{PREFIX.get(size, '%r')}{n + 1}"
        body.append(f"mad.lo.u64 %d60, %tid64, {size}, %at{n + 1}; ld.global.u{8 * size} {name}, [%d60];")
        if source.dtype == bool:
            body.append(f"setp.ne.u32 %p{n + 1}, {name}, 0;")
            name = f"%p{n + 1}"
        names.append(name)
    size = arrays[0].dtype.itemsize
    target = "%p0" if result is bool else f"{PREFIX.get(size, '%r')}0"
    body.append(instruction.format(*names, y=target))
    if result is bool:
        body.append("selp.u32 %r0, 1, 0, %p0;")
        target = "%r0"
    body.append(f"mad.lo.u64 %d60, %tid64, {size}, %at0; st.global.b{8 * size} [%d60], {target};")
    threads = 128
    whole = f"setp.ge.u32 %p15, %tid, {lanes}; @%p15 ret;\n" + "\n".join(body)
    launch(whole, arrays, threads, -(-lanes // threads))
    return arrays[0].astype(bool) if result is bool else arrays[0]


# --- operands --------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng()


def integers(dtype, count=400) -> np.ndarray:
    """Random bits of random magnitude, edges first."""
    info = np.iinfo(dtype)
    edges = [0, 1, 2, 31, 32, 33, 63, 64, 255, info.max, info.max - 1, info.min, info.min + 1, info.max // 2]
    bits = 8 * np.dtype(dtype).itemsize
    random = [int(v) & ((1 << bits) - 1) for v in RNG.integers(0, 2**63, count) >> RNG.integers(0, 63, count)]
    values = [v - (1 << bits) if info.min < 0 and v >> (bits - 1) else v for v in random]
    pool = np.array(edges + values, dtype)
    return np.concatenate([np.array(edges, dtype), RNG.permutation(pool)])[:count]


def floats(dtype, count=400, spread=20) -> np.ndarray:
    """Random floats with infinities, NaN, zeros, subnormals and ties among them."""
    info = np.finfo(dtype)
    tiny = float(info.smallest_subnormal)
    edges = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, tiny, -3 * tiny, float(info.tiny), -float(info.tiny)]
    edges += [
        float(info.max),
        -float(info.max),
        1 + float(info.eps),
        0.5,
        1.5,
        2.5,
        -2.5,
        3.0,
        2.0**31,
        -(2.0**31),
        1e9,
    ]
    with np.errstate(over="ignore"):
        random = (RNG.standard_normal(count) * 2.0 ** RNG.integers(-spread, spread, count)).astype(dtype)
        edges = np.array(edges, np.float64).astype(dtype)
    return np.concatenate([edges, RNG.permutation(np.concatenate([edges, random]))])[:count]


# --- rounding, by definition -----------------------------------------------------------------------------------------

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def rounded(value: Fraction, name: str, mode: str = "rn") -> float:
    """The exact value in a format of (precision, least exponent, largest exponent), as a Python float."""
    precision, least, largest = FORMATS[name]
    if value == 0:
        return 0.0
    magnitude, sign = abs(value), 1 if value > 0 else -1
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    whole, rest = divmod(magnitude / unit, 1)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rm": rest > 0 and sign < 0,
        "rp": rest > 0 and sign > 0,
    }[mode]
    result = (whole + up) * unit
    limit = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** largest
    if result > limit:
        toward_zero = mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return sign * (float(limit) if toward_zero else float("inf"))
    return sign * float(result)


def bf16_bits(values) -> np.ndarray:
    """float -> bits of bf16; the values must be bf16 numbers already."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def same(got: np.ndarray, want: np.ndarray, *context: np.ndarray) -> None:
    """Equal bit for bit (NaN: any NaN); a mismatch prints the operands."""
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype.kind == "f":
        raw = f"u{got.dtype.itemsize}"
        bad = (got.view(raw) != want.astype(got.dtype).view(raw)) & ~(np.isnan(got) & np.isnan(want))
    else:
        bad = got != want
    if bad.any():
        at = int(np.argmax(bad))
        operands = ", ".join(f"{c[at]!r}" for c in context)
        raise AssertionError(
            f"{bad.sum()} of {len(got)} differ; first: f({operands}) = {got[at]!r}, expected {want[at]!r}"
        )
