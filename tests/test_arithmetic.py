"""What the width of the tensor core's adders does to the logits: docs/arithmetic.md, simulated.

The model is that of MMA-Sim (arXiv 2511.10909): the products of one MMA and the accumulator are shifted to the largest
exponent among them, cut to so many fractional bits, added exactly, and the sum is cut to the output's.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from problems import Ragged, generator

from deep_gemm.sm120.reference import dequantize

DOCUMENT = Path(__file__).parent.parent / "docs" / "arithmetic.md"


def exponent(x: np.ndarray) -> np.ndarray:
    """floor(log2 |x|); of zero that of the smallest normal float32."""
    return np.where(x == 0, -126, np.frexp(x)[1] - 1)


def cut(x: np.ndarray, bits: int, top: np.ndarray) -> np.ndarray:
    """Towards zero, to multiples of 2^(top - bits)."""
    return np.trunc(np.ldexp(x, bits - top)) * np.ldexp(1.0, top - bits)


def accumulate(terms: np.ndarray, exponents: np.ndarray, sums: np.ndarray, bits: int, output_bits: int) -> np.ndarray:
    """sums + the terms [..., n], as one MMA adds them."""
    top = np.maximum(exponents.max(axis=-1), exponent(sums))
    total = cut(terms, bits, top[..., None]).sum(axis=-1) + cut(sums, bits, top)
    return cut(total, output_bits, exponent(total))


def scores(query: np.ndarray, keys: np.ndarray, step: int, piece: int, bits: int, output_bits: int) -> np.ndarray:
    """[tokens, heads, keys] of query [tokens, heads, dim] and keys [keys, dim], ``step`` elements an MMA; sums over
    ``piece`` elements are exact."""
    sums = np.zeros((*query.shape[:2], len(keys)))
    for start in range(0, keys.shape[1], step):
        q, k = (x[..., start : start + step] for x in (query, keys))
        products = q[:, :, None] * k
        if piece == 1:  # an element's exponent counts, not its product's
            exponents = exponent(q)[:, :, None] + exponent(k)
            exponents = np.where(products == 0, -126, exponents)
        else:
            products = products.reshape(*products.shape[:-1], -1, piece).sum(axis=-1)
            exponents = exponent(products)
        sums = accumulate(products, exponents, sums, bits, output_bits)
    return sums


def norm_error(fp4: bool, bits: int, output_bits: int = 23) -> float:
    """Of the logits, when all but the MMA is float64."""
    problem = Ragged([0] * 8, [48] * 8, 48, fp4=fp4, rng=generator())
    query = dequantize(*problem.q) if fp4 else dequantize(problem.q)
    keys = dequantize(*problem.kv) if fp4 else problem.kv[0].double()
    step, piece = (64, 16) if fp4 else (32, 1)
    weights = problem.weights.double().numpy()[:, None]
    exact = np.maximum(query.numpy() @ keys.numpy().T, 0)
    cut_short = np.maximum(scores(query.numpy(), keys.numpy(), step, piece, bits, output_bits), 0)
    want, got = (weights @ exact)[:, 0], (weights @ cut_short)[:, 0]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def documented(row: str) -> float:
    """The norm error that the document's table gives for a kind of MMA."""
    found = re.search(rf"^\| {re.escape(row)} \|.*\| ([\d.e-]+) \|$", DOCUMENT.read_text(), re.M)
    assert found, row
    return float(found.group(1))


@pytest.mark.parametrize(
    "row, fp4, bits, output_bits",
    [
        ("FP8, SM120, plain or block-scaled", False, 25, 23),
        ("FP4, SM120", True, 35, 23),
        ("FP8, Ada; Hopper's wgmma", False, 13, 13),
    ],
)
def test_the_documented_error(row: str, fp4: bool, bits: int, output_bits: int) -> None:
    """Of fresh data, within a factor of 2."""
    figure = documented(row)
    assert figure / 2 < norm_error(fp4, bits, output_bits) < 2 * figure


@pytest.mark.parametrize("fp4", [False, True])
def test_each_bit_counts_until_the_output_is_narrower(fp4: bool) -> None:
    errors = [norm_error(fp4, bits, 60) for bits in (8, 11, 14)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("bits", [13, 25])
def test_the_bound(bits: int) -> None:
    """docs/arithmetic.md's bound on each score holds."""
    problem = Ragged([0], [64], 64, heads=8, rng=generator())
    query, keys = problem.q.double().numpy(), problem.kv[0].double().numpy()
    got = scores(query, keys, 32, 1, bits, min(bits, 23))
    largest = np.abs(query[:, :, None] * keys).max(axis=-1)
    partial = np.abs(query[:, :, None] * keys).sum(axis=-1)
    bound = 4 * (33 * 2.0**-bits * np.maximum(largest, partial) + 2.0 ** -min(bits, 23) * partial)
    assert (np.abs(got - query @ keys.T) <= bound).all() and got.any()


def test_the_model_by_hand() -> None:
    """448 and 2^-9 share no 13 bits, but 25: the textbook case of Hopper's adders."""
    terms = np.array([448.0, 2.0**-6])
    assert accumulate(terms, exponent(terms), np.zeros(()), 13, 13) == 448
    assert accumulate(terms, exponent(terms), np.zeros(()), 25, 23) == 448 + 2.0**-6
    assert accumulate(-terms, exponent(terms), np.array(1.0), 13, 13) == -447


if __name__ == "__main__":
    for label, arguments in {"FP8 25": (False, 25), "FP4 35": (True, 35), "FP8 13": (False, 13, 13)}.items():
        print(label, [f"{norm_error(*arguments):.2g}" for _ in range(5)])
