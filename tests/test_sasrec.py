"""extras/sasrec.py: SASRec against its definition written out item by item, and what it may learn from."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import spread

import data
import eval
from extras import sasrec
from extras.sasrec import MAX_LEN, SASRec, fit, histories, main, make_parser, pieces, ranks
from hatllm import InputError

N = 24  # items of the toy data


def model() -> SASRec:
    return spread(SASRec(N, 16, 0.5), 3).eval()


def texts(n: int, longest: int = 12) -> list[list[int]]:
    rng = random.Random(0)
    return [rng.choices(range(N), k=rng.randint(2, longest)) for _ in range(n)]


def load(place, users: list[list[int]], split: str = "loo") -> data.Dataset:
    """A data set in the prepared form; user u's k-th interaction happened at time k + u / 1000."""
    items = [f"{i}\ttitle {i}" for i in sorted({i for s in users for i in s})]
    times = [" ".join(str(k + u / 1000) for k in range(len(s))) for u, s in enumerate(users)]
    lines = [f"user{u}\t{' '.join(map(str, s))}\t{times[u]}" for u, s in enumerate(users)]
    (place / "items.tsv").write_text("\n".join(["item_id\ttitle", *items]))
    (place / "sequences.tsv").write_text("\n".join(["user_id\titem_ids\ttimes", *lines]))
    return data.load(place, split, 0)


def walks(n: int) -> list[list[int]]:
    """Users that walk one fixed cycle through all items, each from a place of its own."""
    rng, cycle = random.Random(0), random.Random(7).sample(range(N), N)
    starts = [(rng.randrange(N), rng.randint(4, 14)) for _ in range(n)]
    return [[cycle[(a + k) % N] for k in range(size)] for a, size in starts]


def test_a_state_depends_on_its_item_and_those_before():
    """By gradient: on every one of them, on none that comes later."""
    m, seen = model(), []
    m.item.register_forward_hook(lambda *call: seen.append(call[2].retain_grad() or call[2]))
    for t in range(5):
        m(torch.tensor([[3, 1, 4, 1, 5]]))[0, t, 0].backward()
        assert (seen[-1].grad[0].abs().amax(-1) > 1e-6).tolist() == [k <= t for k in range(5)]


def test_padding_does_not_matter():
    """Neither how much of it, nor which item stands for it, nor who else is in the batch."""
    m, rows = model(), texts(6)
    x = data.pad(rows, -1)
    wide = torch.nn.functional.pad(x, (0, 3), value=-1)
    for b, row in enumerate(rows):
        found = m(torch.where(wide < 0, torch.randint(N, wide.shape), wide))[b, : len(row)]
        torch.testing.assert_close(found, m(torch.tensor([row]))[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.loss(x), m.loss(wide), rtol=1e-6, atol=1e-6)


def test_loss_is_cross_entropy_over_all_items_of_every_next_item():
    m, parts = model().double(), [row[:t] for row in texts(5) for t in range(2, len(row) + 1)]
    p = [(m(torch.tensor([part[:-1]]))[0, -1] @ m.item.weight.T).softmax(0)[part[-1]] for part in parts]
    assert m.loss(data.pad(texts(5), -1)).item() == pytest.approx(-torch.stack(p).log().mean().item(), rel=1e-9)


def test_sampled_loss_has_the_right_denominator_on_average(monkeypatch):
    """Exactly, over all draws of one item, the target among them; and by hand for some items that all targets share."""
    m, drawn = model().double(), []
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(drawn))
    score = (m(torch.tensor([[3]]))[0, -1] @ m.item.weight.T).exp().tolist()
    found = 0
    for i in range(N):
        drawn[:] = [i]
        found += m.loss(torch.tensor([[3, 4]]), 1).exp().item() * score[4] / N
    assert found == pytest.approx(sum(score), rel=1e-9) and found > 1.5 * score[4]
    drawn[:], losses = [5, 0, 7, 5], []
    for part in [row[:t] for row in texts(5) for t in range(2, len(row) + 1)]:
        score = (m(torch.tensor([part[:-1]]))[0, -1] @ m.item.weight.T).exp().tolist()
        losses.append(math.log(1 + N / 4 * sum(score[i] for i in drawn if i != part[-1]) / score[part[-1]]))
    assert m.loss(data.pad(texts(5), -1), 4).item() == pytest.approx(np.mean(losses), rel=1e-9)
    assert m.loss(data.pad(texts(5), -1), N) == m.loss(data.pad(texts(5), -1))  # no more than there are: all


@pytest.mark.parametrize("size", [2, MAX_LEN, MAX_LEN + 1, MAX_LEN + 2, 2 * MAX_LEN + 1, 2 * MAX_LEN + 2, 173])
def test_pieces_have_every_next_item_as_target_once(size):
    parts = pieces([list(range(size))])
    assert sorted(i for p in parts for i in p[1:]) == list(range(1, size))
    assert all(2 <= len(p) <= MAX_LEN + 1 and p == list(range(p[0], p[-1] + 1)) for p in parts)
    assert all(len(p) == MAX_LEN + 1 for p in parts if p[0] > 0)  # only the beginning of a sequence has a short past


@pytest.mark.parametrize("split", ["time", "loo"])
def test_nothing_held_out_is_learnt_from(tmp_path, split):
    """Every item of a user is another one here, so a target that is learnt can be told from its number alone."""
    d = load(tmp_path, [list(range(20 * u, 20 * u + 3 + u % 15)) for u in range(40)], split)
    learnt, inputs = ([i for p in pieces(d.sequences) for i in p[first:]] for first in (1, 0))
    asked = {w.target for w in d.valid + d.test}
    assert learnt and asked and not asked & {*inputs} and len(learnt) == len(set(learnt))


def test_histories(tmp_path):
    """10 items are the windows' own; more are the user's last ones before the target, whoever has fewer."""
    users = [random.Random(size).choices(range(N), k=size) for size in (2, 3, 4, 1, 5, 11, 12, 13, 14, 53, 60, 3, 20)]
    d = load(tmp_path, users)
    long = [[d.ids.index(str(i)) for i in s] for s in users if len(s) >= 3]
    for longest in (3, data.HISTORY, 20, MAX_LEN):
        assert histories(d, "valid", longest) == [s[:-2][-longest:] for s in long]
        assert histories(d, "test", longest) == [s[:-1][-longest:] for s in long]


@pytest.mark.parametrize("more", [[], ["--exclude_history"]])
def test_ranks_equal_those_counted_one_by_one(more):
    m = model().train()  # what ranks must undo
    m.item.weight.data[[2, 5, 11, 17, 19, 20]] = 0  # these score 0 after any history: ties
    windows = [data.Window(h, 7 * n % N, "", 0) for n, h in enumerate(texts(40, 10))]
    before, ties = ranks(
        m, data.Dataset(Path(), [], [], [], [], [], windows, []), "test", make_parser().parse_args(more)
    )
    for n, w in enumerate(windows):
        score = (m(torch.tensor([w.history]))[0, -1] @ m.item.weight.T).tolist()
        score = [-math.inf if more and i in w.history else s for i, s in enumerate(score)]
        assert (before[n], ties[n]) == (sum(s > score[w.target] for s in score), score.count(score[w.target]))
    assert more or ties.max() == 6


def test_a_seed_repeats_and_the_best_epoch_is_kept(tmp_path, monkeypatch):
    d, args = load(tmp_path, walks(40)), make_parser().parse_args(["--epochs", "1"])
    blind = replace(d, valid=[w._replace(target=0) for w in d.valid], test=[])  # nothing is learnt from these
    a, b, c = (fit(*part)[0] for part in ((d, args, 16, 0.2, 1), (blind, args, 16, 0.2, 1), (d, args, 16, 0.2, 2)))
    assert torch.equal(a.item.weight, b.item.weight) and not torch.equal(a.position.weight[-1], c.position.weight[-1])
    curve, seen = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.2, 0.9]), []
    note = lambda m, *_: (seen.append((m.training, m.item.weight.detach().clone())), m.eval())  # noqa: E731
    monkeypatch.setattr(sasrec, "ranks", note)
    monkeypatch.setattr(sasrec, "metrics", lambda *_: {"NDCG@10": next(curve)})
    monkeypatch.setattr(sasrec, "EVERY", 2)
    m, log = fit(d, make_parser().parse_args([]), 16, 0.2, 0)
    assert (log["epoch"], log["epochs"], log["valid NDCG@10"]) == (4, 12, 0.3)
    assert torch.equal(m.item.weight, seen[1][1]) and all(training for training, _ in seen)


def test_learns_what_can_be_learnt(tmp_path, monkeypatch):
    """From files to files: users walk one cycle, so the next item is certain; popularity cannot know it."""
    monkeypatch.setattr(sasrec, "TOKENS", 128)
    d, path = load(tmp_path, walks(150)), tmp_path / f"out/baselines-{tmp_path.name}-loo-core0.json"
    more = "--split loo --core 0 --hidden 2 32 --dropout 0.1 --lr 5e-3 --epochs 3 --seeds 2".split()
    argv = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), *more]
    main(argv)
    found = json.loads(path.read_text())
    assert found["SASRec"]["HR@1"] > 0.8 and found["popularity"]["HR@1"] < 0.3 and found["digest"] == d.digest
    assert [(r["seed"], r["hidden"]) for r in found["runs"]] == [(0, 32), (1, 32)] and len(found["grid"]) == 2
    m, args = fit(d, make_parser().parse_args(argv), 32, 0.1, 0)[0], make_parser().parse_args(argv)
    valid, test = (eval.metrics(*ranks(m, d, part, args)) for part in ("valid", "test"))
    assert valid != test and test.items() <= found["runs"][0]["test"].items()
    assert found["SASRec"]["NDCG@10"] == pytest.approx(np.mean([r["test"]["NDCG@10"] for r in found["runs"]]))


def test_errors_are_sentences(tmp_path, monkeypatch):
    for argv, word in (("--history 20", "--split loo"), ("--hiden 3", "--hiden")):
        with pytest.raises(InputError, match=word):
            main(argv.split())
    monkeypatch.setattr(sasrec, "train_epoch", lambda *_: math.nan)
    with pytest.raises(InputError, match="--lr"):
        fit(load(tmp_path, walks(9)), make_parser().parse_args([]), 16, 0.2, 0)
