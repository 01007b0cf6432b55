"""hatllm.py: plans, layouts and masks, against the definition written out token by token."""

import random
import re

import pytest
import torch
from conftest import KINDS, prompt

from hatllm import PLAN, InputError, Layout, draw, layout, mask, parse_plan

# --- plans ----------------------------------------------------------------------------------------------------------


def runs(text: str, n: int) -> str:
    """A plan's layers, one letter each: I, O, C, and i for IN-closed."""
    return "".join({"IN": "I", "OR": "O", "CR": "C", "IN-closed": "i"}[k] for k in parse_plan(text, n))


@pytest.mark.parametrize(
    "text, n, layers",
    [
        ("IN:1 OR:2 CR:1", 4, "IOOC"),
        ("  IN:1   OR:2 ", 3, "IOO"),  # spaces mean nothing
        ("OR", 3, "OOO"),  # one kind without a count fills
        ("IN OR:1 CR:1", 5, "IIIOC"),  # ... wherever it stands
        ("OR:1 CR", 3, "OCC"),
        ("IN:2 OR CR:2", 4, "IICC"),  # ... also with nothing
        ("IN:0 OR:2", 2, "OO"),
        ("IN-closed:1 OR:1", 2, "iO"),
        ("OR:1 IN:1 OR:1", 3, "OIO"),  # a kind may come back
        ("IN:1/2 CR:1/2", 4, "IICC"),
        ("IN:0.5 OR", 4, "IIOO"),
        ("IN:1/4 OR", 2, "IO"),  # halves round up, not to even
        (PLAN, 6, "IIOOCC"),
        (PLAN, 30, "I" * 8 + "O" * 14 + "C" * 8),
    ],
)
def test_plan(text, n, layers):
    assert runs(text, n) == layers


@pytest.mark.parametrize("n", range(1, 65))
def test_default_plan_fits_every_depth(n):
    """Rounding must not make the default, which an error message recommends, an error itself."""
    assert len(parse_plan(PLAN, n)) == n


@pytest.mark.parametrize(
    "text, names",
    [
        ("IN:1 XX:3", "'XX'"),
        ("in:4", "'in'"),
        ("IN:1,OR:3", "'IN:1,OR:3' needs a count"),
        ("IN:a OR", "'IN:a'"),
        ("IN:-1 OR", "'IN:-1'"),
        ("IN: OR", "'IN:'"),
        ("IN:1/0 OR", "'IN:1/0'"),
        ("IN:3/2 OR", "'IN:3/2'"),
        ("IN:nan OR", "'IN:nan'"),
        ("IN OR", "'OR'"),  # two fills
        ("", "covers 0 layers"),
        ("OR:3", "covers 3 layers, but the model has 4"),
        ("IN:3 CR:3", "covers 6 layers, but the model has 4"),
        ("IN:3 OR CR:3", "covers 6 layers"),  # the fill is not negative
    ],
)
def test_plan_errors(text, names):
    """A plan that does not fit is one sentence that names the plan and the part, not a KeyError in a layer later."""
    with pytest.raises(InputError) as e:
        parse_plan(text, 4)
    assert names in str(e.value) and f"plan '{text}'" in str(e.value) and "\n" not in str(e.value)


# --- masks ----------------------------------------------------------------------------------------------------------


def precedes(i: int, j: int, item, branch, fork) -> bool:
    """Token j comes before token i in one and the same text."""
    if item[j] < 0 or j >= i:
        return False
    return branch[j] == branch[i] or (branch[j] == 0 and j < fork[i])


def may_look(kind: str, i: int, j: int, item, branch, fork) -> bool:
    """The definition, design.md section 1, for one query i and one key j."""
    if i == j:
        return True
    if not precedes(i, j, item, branch, fork):
        return False
    both_items = item[i] > 0 and item[j] > 0
    if kind == "IN":
        return not (both_items and item[i] != item[j])
    if kind == "CR":
        return not (both_items and item[i] == item[j])
    if kind == "IN-closed":
        return item[i] == item[j]
    return True


def random_layout(seed: int):
    """Two rows of a trunk, 0 to 3 branches (one after the other, or interleaved) and padding, as lists."""
    rng = random.Random(seed)
    rows = []
    for _ in range(2):
        item = [rng.randint(0, 3) for _ in range(6)] if rng.random() < 0.3 else prompt(rng, rng.randint(0, 4))
        branch, fork = [0] * len(item), [rng.randint(0, 9) for _ in item]  # fork means nothing on the trunk
        tails = [(b, rng.randint(0, len(item))) for b in range(1, rng.randint(1, 4)) for _ in range(rng.randint(1, 4))]
        forks = {b: f for b, f in tails}
        if rng.random() < 0.5:
            rng.shuffle(tails)
        for b, _ in tails:
            item.append(rng.choice([0, 2, 9]))
            branch.append(b)
            fork.append(forks[b])
        rows.append((item, branch, fork))
    T = max(len(r[0]) for r in rows) + rng.randint(0, 2)
    for r in rows:
        for x, filler in zip(r, (-1, 0, 0), strict=True):
            x += [filler] * (T - len(x))
    return rows


def as_layout(rows) -> Layout:
    return layout(*(torch.tensor([r[k] for r in rows]) for k in range(3)))


@pytest.mark.parametrize("seed", range(60))
def test_masks_are_the_definition(seed):
    """Every cell of every mask, with padding and branches: catches < for <=, a lost context rule, swapped i and j."""
    rows = random_layout(seed)
    lay = as_layout(rows)
    T = len(rows[0][0])
    for kind in KINDS:
        got = lay.mask(kind)
        assert got.shape == (2, 1, T, T) and got.dtype == torch.bool
        assert got.any(-1).all(), "an empty row is a NaN in the softmax"
        for b, row in enumerate(rows):
            for i in range(T):
                if row[0][i] >= 0:
                    assert got[b, 0, i].tolist() == [may_look(kind, i, j, *row) for j in range(T)], (kind, b, i)
                    assert lay.pos[b, i] == sum(precedes(i, j, *row) for j in range(T))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_new_queries_are_the_last_rows(kind):
    """With a cache the queries are the last Tq tokens; aligning them with the first keys would be wrong."""
    for seed in range(20):
        lay = as_layout(random_layout(seed))
        T = lay.item.shape[1]
        for Tq in (1, T // 2, T):
            assert torch.equal(mask(kind, lay.item, lay.sees[:, -Tq:]), lay.mask(kind)[:, 0, -Tq:])


def test_without_branches_it_is_causal():
    lay = layout(torch.tensor([[0, 1, 1, 2, -1]]))
    assert lay.pos.tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(lay.mask("OR")[0, 0, :, :4], torch.ones(5, 5).tril().bool()[:, :4])
    assert lay.mask("OR")[0, 0, :, 4].tolist() == [False] * 4 + [True]


def test_padding_is_seen_by_itself_only():
    """Not even by tokens that come after it, as they do when a padded batch is continued."""
    lay = layout(torch.tensor([[0, 1, -1, -1, 2]]))
    for kind in KINDS:
        assert torch.equal(lay.mask(kind)[0, 0, :, 2:4], torch.eye(5).bool()[:, 2:4])


def test_a_branch_continues_from_its_fork():
    """Positions go on from the fork, not from the end of the trunk or of the branch before: RoPE would be off."""
    item = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 3, 4, 4]])
    branch = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2]])
    fork = torch.tensor([[0, 0, 0, 0, 0, 3, 3, 3, 5, 5]])
    lay = layout(item, branch, fork)
    assert lay.pos.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 5, 6]]
    looks = ["".join(".x"[v] for v in row) for row in lay.mask("OR")[0, 0].int().tolist()]
    assert looks[5:] == ["xxx..x....", "xxx..xx...", "xxx..xxx..", "xxxxx...x.", "xxxxx...xx"]


def test_a_mask_is_built_once_per_kind_and_layout():
    """The layers of a kind share one mask; two kinds never do."""
    lay = layout(torch.tensor([[0, 1, 1, 2]]))
    assert lay.mask("IN") is lay.mask("IN") and lay.mask("IN") is not lay.mask("CR")
    assert layout(torch.tensor([[0, 1, 2, 2]])).masks == {}, "layouts must not share the memo"


def test_unknown_kind():
    with pytest.raises(InputError, match="'XX'"):
        layout(torch.tensor([[0, 1]])).mask("XX")


# --- the drawing ----------------------------------------------------------------------------------------------------

DRAWING = """\
        IN          OR          CR          IN-closed
Bought: o           o           o           o
red     o#          o#          o#          .#
pen     o##         o##         o.#         .##
,       oooo        oooo        oooo        o..o
ink     o..o#       o++o#       o++o#       ....#
well    o..o##      o++o##      o++o.#      ....##
.       ooooooo     ooooooo     ooooooo     o..o..o
Next:   oooooooo    oooooooo    oooooooo    o..o..oo
paper   o..o..oo#   o++o++oo#   o++o++oo#   ........#
clip    o..o..oo##  o++o++oo##  o++o++oo.#  ........##"""


def test_drawing():
    """The method at a glance: whoever changes a rule changes this picture too."""
    assert draw(KINDS) == DRAWING
    assert draw().splitlines()[0].split() == ["IN", "OR", "CR"]
    assert max(map(len, draw().splitlines())) <= 80


def test_coloured_drawing_is_the_plain_one():
    colours = draw(KINDS, colour=True)
    assert "\033[92m#" in colours and colours.count("\033[0m") == len(re.findall(r"\033\[9\dm", colours))
    assert re.sub(r"\033\[\d+m", "", colours) == draw(KINDS)
