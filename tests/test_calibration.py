"""The emulator runs NVIDIA's own SM120 kernels to the right answer: they were validated on cards, so its MMA fragments,
scale selectors, ldmatrix, swizzles, TMA and barriers mean what the silicon means by them.

Ours run beside them, on the same inputs, to the same logits.
"""

import peer
import pytest
import torch
from problems import Paged, Ragged
from sidebyside import PEER_SLOTS, compare, our_paged, our_ragged, their_paged, their_ragged, their_schedule


@pytest.fixture(scope="module", autouse=True)
def fetched() -> None:
    try:
        peer.fetch()
    except peer.PeerUnavailable as problem:
        pytest.skip(f"the peer's wheel cannot be fetched: {str(problem).splitlines()[0]}")


pytestmark = pytest.mark.peer
FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
HEADS = pytest.mark.parametrize("heads", [32, 64])


def agree(logits: torch.Tensor, expected: torch.Tensor, window: torch.Tensor) -> None:
    """Within 1e-6 of each other in the window, by norm."""
    got, want = logits[window].double(), expected[window].double()
    assert got.numel() and (got - want).norm() < 1e-6 * want.norm()


def both(theirs: torch.Tensor, ours: torch.Tensor, expected: torch.Tensor) -> None:
    window = expected != -torch.inf
    agree(theirs, expected, window)
    agree(ours, expected, window)
    agree(ours, theirs, window)


@FORMATS
@HEADS
@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
def test_paged(next_n: int, heads: int, fp4: bool) -> None:
    last = torch.randint(1, 300, (3,)).tolist()
    problem = Paged([[end + i for i in range(next_n)] for end in last], next_n=next_n, heads=heads, fp4=fp4)
    both(their_paged(problem)[0], our_paged(problem)[0], problem.expected())


@FORMATS
def test_paged_one_length_a_row(fp4: bool) -> None:
    problem = Paged(torch.randint(1, 700, (4,)).tolist(), heads=32, fp4=fp4)
    both(their_paged(problem)[0], our_paged(problem)[0], problem.expected())


@FORMATS
@HEADS
def test_varlen(heads: int, fp4: bool) -> None:
    """Rows, of which neighbours with the same index belong to one sequence and share their pages."""
    lengths, indices = [130, 131, 132, 77, 200, 201], [0, 0, 0, 1, 2, 2]
    problem = Paged(lengths, heads=heads, fp4=fp4)
    problem.block_table[:, :4] = torch.randint(0, len(problem.kv_cache), (3, 4), dtype=torch.int32)[indices]
    theirs, _ = their_paged(problem, torch.tensor(indices, dtype=torch.int32))
    both(theirs, our_paged(problem)[0], problem.expected())


@FORMATS
@HEADS
def test_ragged(heads: int, fp4: bool) -> None:
    keys = int(torch.randint(150, 300, ()))
    rows = 7
    starts = torch.randint(0, keys - 1, (rows,)).tolist()
    ends = [int(torch.randint(start + 1, keys + 1, ())) for start in starts]
    problem = Ragged(starts, ends, keys, heads=heads, fp4=fp4)
    both(their_ragged(problem)[0], our_ragged(problem)[0], problem.expected())


def shares(splits: list[tuple[int, int]], slots: int, end: tuple[int, int]) -> list[tuple[int, int]]:
    """The list of all splits in equal shares, the last slots with one more; then the end."""
    share, longer = divmod(len(splits), slots)
    starts = [slot * share + max(0, slot - (slots - longer)) for slot in range(slots)]
    return [*(splits[start] for start in starts), end]


@pytest.mark.parametrize("batch, next_n", [(1, 1), (5, 1), (32, 2), (7, 4), (20, 3)])
def test_schedule(batch: int, next_n: int) -> None:
    """Rows have an atom for every two tokens, atoms splits of 128 keys, as many as the row's last token needs."""
    lengths = torch.randint(1, 2000, (batch, next_n), dtype=torch.int32)
    atoms = -(-next_n // 2)
    splits = [
        (row * atoms + atom, split)
        for row in range(batch)
        for atom in range(atoms)
        for split in range(-(-int(lengths[row, -1]) // peer.SPLIT))
    ]
    schedule = [tuple(entry) for entry in their_schedule(lengths).tolist()]
    assert schedule == shares(splits, PEER_SLOTS, (batch * atoms, 0))


def test_schedule_varlen() -> None:
    """Two neighbouring rows of one sequence are an atom, named by its first and as long as its second."""
    indices = torch.sort(torch.randint(0, 6, (19,), dtype=torch.int32)).values
    lengths = torch.randint(1, 900, (19, 1), dtype=torch.int32)
    splits, row = [], 0
    while row < 19:
        rows = 2 if row + 1 < 19 and indices[row] == indices[row + 1] else 1
        splits += [(row, split) for split in range(-(-int(lengths[row + rows - 1]) // peer.SPLIT))]
        row += rows
    schedule = [tuple(entry) for entry in their_schedule(lengths, indices=indices).tolist()]
    assert schedule == shares(splits, PEER_SLOTS, (19, 0))


@FORMATS
def test_side_by_side(fp4: bool) -> None:
    """What the table counts, where it can be told beforehand: 8 keys x 16 heads x 32 or 64 elements an MMA."""
    ours, theirs = compare(Ragged([0] * 4, [512] * 4, 512, heads=64, fp4=fp4))
    assert float(ours["- mma"]) == float(theirs["- mma"]) == (1 if fp4 else 2)
    assert ours["wavefronts"] == "0.000 (0.000)" and float(ours["- barrier"]) == 0 and ours["bytes written"] == "4.00"
    # Every key, at least once, for all four rows: its values and its scale.
    assert float(theirs["- from L2"]) >= (68 if fp4 else 132) / 4 and float(theirs["- barrier"]) > 0
    copied = float(theirs["wavefronts"].split("(")[1].rstrip(")"))
    assert copied >= (64 if fp4 else 128) / 128 / 4 and float(theirs["wavefronts"].split()[0]) > copied
