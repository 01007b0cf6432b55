"""hatllm.py: plans, layouts and masks, against the definition written out token by token."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import REPO, prompt, refuses

from hatllm import KINDS, PLAN, TARGET, Layout, draw, layout, mask, parse_plan

# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, n, layers",
    [
        ("  IN:1   OR:2 CR:1", 4, "IOOC"),
        ("OR", 3, "OOO"),  # one kind without a count fills
        ("IN OR:1 CR:1", 5, "IIIOC"),  # ... wherever it stands
        ("IN:2 OR CR:2", 4, "IICC"),  # ... also with nothing
        ("IN:0 OR:2", 2, "OO"),
        ("OR:1 IN-closed:1 OR:1", 3, "OiO"),  # a kind may come back
        ("IN:1/2 CR:1/2", 4, "IICC"),
        ("IN:1/4 OR", 2, "IO"),  # halves round up, not to even
        (PLAN, 6, "IIOOCC"),
        (PLAN, 30, "I" * 8 + "O" * 14 + "C" * 8),
    ],
)
def test_plan(text, n, layers):
    letter = {"IN": "I", "OR": "O", "CR": "C", "IN-closed": "i"}
    assert "".join(letter[kind] for kind in parse_plan(text, n)) == layers


def test_default_plan_fits_every_depth():
    """Rounding must not make the default, which an error message recommends, an error itself."""
    assert all(len(parse_plan(PLAN, n)) == n for n in range(1, 200))


@pytest.mark.parametrize(
    "text, names",
    [
        ("IN:1 XX:3", "'XX'"),
        ("in:4", "'in'"),
        ("IN:1,OR:3", "'IN:1,OR:3'"),
        ("IN:-1 OR", "'IN:-1'"),
        ("IN: OR", "'IN:'"),
        ("IN:1/0 OR", "'IN:1/0'"),
        ("IN:3/2 OR", "6 layers"),
        ("IN:10**9 OR", "'IN:10**9'"),
        ("IN:1e999 OR", "'IN:1e999'"),
        ("IN:999999999999 OR", "'IN:999999999999'"),  # none of these is ever a list of so many kinds
        ("IN:999999999 OR", "999999999 layers"),
        ("IN:1/999999999999 OR", "'IN:1/999999999999'"),
        ("IN OR", "'OR'"),  # two fills
        ("", "0 layers"),
        ("OR:3", "3 layers, but the model has 4"),
        ("IN:3 OR CR:3", "6 layers"),  # the fill is not negative
    ],
)
def test_plan_that_does_not_fit(text, names):
    with refuses("plan", names):
        parse_plan(text, 4)


# --- masks ----------------------------------------------------------------------------------------------------------


def precedes(i: int, j: int, item, branch, fork) -> bool:
    """Token j comes before token i in one and the same text."""
    return item[j] >= 0 and j < i and (branch[j] == branch[i] or (branch[j] == 0 and j < fork[i]))


def may_look(kind: str, i: int, j: int, item, branch, fork) -> bool:
    """The definition, for one query i and one key j."""
    if i == j or not precedes(i, j, item, branch, fork):
        return i == j
    both_items = item[i] > 0 and item[j] > 0
    if kind == "IN":
        return not (both_items and item[i] != item[j])
    if kind in ("CR", "CR-own", "CR-last") and both_items and item[i] == item[j]:
        return kind != "CR" and item[i] == TARGET
    if kind == "CR-last" and item[j] > 0:
        return j + 1 == len(item) or item[j + 1] != item[j]
    return kind in ("OR", "CR", "CR-own", "CR-last") or item[i] == item[j]


def random_layout(seed: int):
    """Two rows of a trunk, 0 to 3 branches (one after the other, or interleaved) and padding: item, branch, fork."""
    rng, rows = random.Random(seed), []
    for _ in range(2):
        item = [rng.randint(0, 3) for _ in range(6)] if rng.random() < 0.3 else prompt(rng, rng.randint(0, 4))
        branch, fork = [0] * len(item), [rng.randint(0, 9) for _ in item]  # fork means nothing on the trunk
        ends = [n for n in range(len(item) + 1) if n in (0, len(item)) or item[n - 1] != item[n]]  # of whole items
        forks = {b: rng.choice(ends) for b in range(1, rng.randint(1, 4))}
        tails = [b for b in forks for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.5:
            rng.shuffle(tails)
        item += [rng.choice([0, TARGET]) for _ in tails]
        rows.append((item, branch + tails, fork + [forks[b] for b in tails]))
    T = max(len(item) for item, *_ in rows) + rng.randint(0, 2)
    return [[x + [filler] * (T - len(x)) for x, filler in zip(row, (-1, 0, 0), strict=True)] for row in rows]


def as_layout(rows) -> Layout:
    return layout(*(torch.tensor(x) for x in zip(*rows, strict=True)))


@pytest.mark.parametrize("seed", range(30))
def test_masks_are_the_definition(seed):
    """Every cell of every mask, with padding and branches; and with a cache the queries are the last Tq tokens."""
    rows = random_layout(seed)
    lay, T = as_layout(rows), len(rows[0][0])
    for kind in KINDS:
        want = torch.tensor([[[may_look(kind, i, j, *row) for j in range(T)] for i in range(T)] for row in rows])
        assert torch.equal(mask(kind, lay.item, lay.sees), want), kind
        for Tq in (1, T // 2):
            assert torch.equal(mask(kind, lay.item, lay.sees[:, -Tq:]), want[:, -Tq:]), kind
    for b, row in enumerate(rows):
        own = [i for i in range(T) if row[0][i] >= 0]
        assert lay.pos[b, own].tolist() == [sum(precedes(i, j, *row) for j in range(T)) for i in own]


def test_a_branch_continues_from_its_fork():
    """Positions go on from the fork, not from the end of the trunk or of the branch before: RoPE would be off."""
    item = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 3, 4, 4]])
    branch = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2]])
    fork = torch.tensor([[0, 0, 0, 0, 0, 3, 3, 3, 5, 5]])
    lay = layout(item, branch, fork)
    assert lay.pos.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 5, 6]]
    looks = ["".join(".x"[v] for v in row) for row in mask("OR", lay.item, lay.sees)[0].int().tolist()]
    assert looks[5:] == ["xxx..x....", "xxx..xx...", "xxx..xxx..", "xxxxx...x.", "xxxxx...xx"]


def test_additive_mask_is_0_or_minus_infinity_for_every_kind_heads_and_type():
    """Also when it was asked for another kind, another number of heads or another type before. None is plain causal
    attention, and means it: it is no answer for another rule under the name OR, nor for branches."""
    lay = layout(torch.tensor([[0, 1, 1, 2], [0, 1, 2, -1]]))
    plain = [lay.additive_mask(kind, 2, torch.float32) is None for kind in KINDS]
    assert plain == [kind == "OR" for kind in KINDS]
    lay = replace(lay, causal=False, masks={})
    for kind in KINDS:
        for G in (3, 1, 2):
            for dtype in (torch.float32, torch.bfloat16):
                M = lay.additive_mask(kind, G, dtype)
                assert M.stride()[:-1] == (8 * 4 * G, 8 * 4 * G, 8)  # a GPU copies rows that begin elsewhere
                assert M.dtype == dtype and M.shape == (2, 1, G * 4, 4)
                assert (
                    torch.equal(M == 0, mask(kind, lay.item, lay.sees)[:, None].repeat(1, 1, G, 1))
                    and (M[M != 0] == -torch.inf).all()
                )
    assert lay.additive_mask("IN", 3, torch.float32) is lay.additive_mask("IN", 3, torch.float32), "built once"


@pytest.mark.parametrize("kind", KINDS)
def test_block_mask_is_the_mask(kind):
    """Token by token, and blocks that are left out hold nothing; rows of several texts, that end within a block."""
    rng = random.Random(0)
    texts = [[prompt(rng, 5) for _ in range(14)] for _ in range(2)]
    rows = [sum(row, []) for row in texts]
    start = [[sum(map(len, row[:i])) for i, text in enumerate(row) for _ in text] for row in texts]
    T = max(map(len, rows))
    assert 128 < T and T % 128
    item = torch.tensor([row + [-1] * (T - len(row)) for row in rows])
    lay = layout(item, start=torch.tensor([row + [0] * (T - len(row)) for row in start]))
    found, seen = lay.block_mask(kind), mask(kind, lay.item, lay.sees)
    at = torch.arange(T)
    assert torch.equal(found.mask_mod(torch.arange(2)[:, None, None], 0, at[:, None], at), seen)
    n = -(-T // 128)
    whole = torch.zeros(2, n * 128, n * 128, dtype=torch.bool)
    whole[:, :T, :T] = seen
    assert torch.equal(found.to_dense()[:, 0].bool(), whole.view(2, n, 128, n, 128).any(4).any(2))


def test_drawing():
    """README's picture: whoever changes a rule changes it too."""
    shown = (REPO / "README.md").read_text("utf-8")
    assert all(line in shown for line in draw().splitlines())


def test_a_kind_without_lines_is_no_other_kind():
    """Catches a name that is added to KINDS, or misspelt in `mask`, and silently becomes CR."""
    with refuses("'PREV'", "hatllm.mask has no lines for it"):
        layout(torch.tensor([[0, 1]])).additive_mask("PREV", 1, torch.float32)
