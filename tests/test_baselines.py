"""baselines.py: SASRec against its definition written out item by item, and what it may learn from."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import spread

import baselines
import data
from baselines import MAX_LEN, Flags, SASRec, fit, histories, main, pad, pieces, ranks
from data import HISTORY
from eval import metrics, popularity
from hatllm import InputError

N = 24  # items of the toy data


def model(seed: int = 0, n: int = N) -> SASRec:
    return spread(SASRec(n, 16, 0.5), seed).eval()


def rows(n: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Sequences of 2 and more items, of different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(N) for _ in range(rng.randint(2, longest))] for _ in range(n)]


def folder(place, users: list[list[int]]) -> str:
    """A data set in the prepared form; user u's k-th interaction happened at time k + u / 1000."""
    place.mkdir()
    items = [f"{i}\ttitle {i}" for i in sorted({i for s in users for i in s})]
    lines = [
        f"{u}\t{' '.join(map(str, s))}\t{' '.join(str(k + u / 1000) for k in range(len(s)))}"
        for u, s in enumerate(users)
    ]
    (place / "items.tsv").write_text("\n".join(["item_id\ttitle", *items]))
    (place / "sequences.tsv").write_text("\n".join(["user_id\titem_ids\ttimes", *lines]))
    return str(place)


def walks(n: int, longest: int = 14, seed: int = 0) -> list[list[int]]:
    """Users that walk one fixed cycle through all items, each from a place of its own."""
    rng, cycle = random.Random(seed), random.Random(7).sample(range(N), N)
    starts = [(rng.randrange(N), rng.randint(4, longest)) for _ in range(n)]
    return [[cycle[(a + k) % N] for k in range(size)] for a, size in starts]


def flags(**more) -> Flags:
    return Flags(**dict(tokens=64, epochs=3, lr=5e-3, core=0) | more)


# --- the model --------------------------------------------------------------------------------------------------------


def test_a_later_item_does_not_change_earlier_states():
    m, x = model(), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    for t in range(x.shape[1]):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % N
        before, after = m(x), m(y)
        assert torch.equal(before[:, :t], after[:, :t])
        assert ((before - after)[:, t:].abs().amax(-1) > 1e-4).all()  # and every later one, its own too, does see it


def test_order_matters():
    m, x = model(), torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(m(x)[:, -1], m(x[:, [1, 0, 2, 3]])[:, -1], atol=1e-3)


def test_padding_does_not_matter():
    """Neither how much of it, nor which item stands for it, nor who else is in the batch."""
    m, texts = model(), rows(6)
    x = pad(texts)
    wide = torch.cat((x, torch.full((6, 3), -1)), 1)
    other = torch.where(wide < 0, torch.randint(N, wide.shape), wide)
    for b, text in enumerate(texts):
        alone = m(torch.tensor([text]))[0]
        for batch in (x.clamp(min=0), wide.clamp(min=0), other):
            torch.testing.assert_close(m(batch)[b, : len(text)], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.loss(x), m.loss(wide), rtol=1e-6, atol=1e-6)


def test_pad():
    assert pad([[4, 5, 6], [7], [8, 9]]).tolist() == [[4, 5, 6], [7, -1, -1], [8, 9, -1]]


def test_loss_is_cross_entropy_over_all_items_of_every_next_item():
    m, texts, terms = model().double(), rows(5), []
    for text in texts:
        for t in range(1, len(text)):
            h = m(torch.tensor([text[:t]]))[0, -1]
            score = [(h @ m.item.weight[i]).item() for i in range(N)]
            terms.append(math.log(sum(math.exp(s) for s in score)) - score[text[t]])
    assert m.loss(pad(texts)).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_gradient_reaches_every_weight():
    m = model()
    m.loss(pad(rows(8))).backward()
    for name, p in m.named_parameters():
        # a key's bias adds the same to all scores of a query, which the softmax takes away again
        g = torch.cat((p.grad[:16], p.grad[32:])) if name.endswith("qkv.bias") else p.grad[:10]
        assert (g.flatten(1) if g.dim() > 1 else g).abs().amax() > 1e-6, name


def test_dropout_acts_in_training_only():
    m, x = model(), torch.tensor([[1, 2, 3]])
    assert torch.equal(m(x), m(x))
    assert not torch.equal(m.train()(x), m(x))


# --- what is learnt from, what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, MAX_LEN, MAX_LEN + 1, MAX_LEN + 2, 2 * MAX_LEN + 1, 2 * MAX_LEN + 2, 173])
def test_pieces_have_every_next_item_as_target_once(size):
    parts = pieces([list(range(size))])
    assert sorted(i for p in parts for i in p[1:]) == list(range(1, size))
    assert all(2 <= len(p) <= MAX_LEN + 1 and p == list(range(p[0], p[-1] + 1)) for p in parts)
    assert all(len(p) == MAX_LEN + 1 for p in parts if p[0] > 0)  # only the beginning of a sequence has a short past


@pytest.mark.parametrize("split", ["time", "loo"])
def test_nothing_held_out_is_learnt_from(tmp_path, split):
    """Every item of a user is another one here, so a target that is learnt can be told from its number alone."""
    users = [list(range(20 * u, 20 * u + 3 + u % 15)) for u in range(40)]
    d = data.load(folder(tmp_path / "toy", users), None, split, 0)
    learnt = Counter(int(d.ids[i]) for p in pieces(d.sequences) for i in p[1:])
    asked = {int(d.ids[i]) for w in (d.valid, d.test) for i in w.target}
    inputs = {int(d.ids[i]) for p in pieces(d.sequences) for i in p}
    assert learnt and asked and not inputs & asked
    assert set(learnt.values()) == {1}
    if split == "loo":  # all the rest is: a user's first item is input only
        assert set(learnt) == {i for s in users for i in s[1:-2]}


def test_training_does_not_see_the_targets_of_test(tmp_path):
    d = data.load(folder(tmp_path / "toy", walks(30)), None, "loo", 0)
    one = fit(d, flags(epochs=1), 16, 0.2, 0)[0].state_dict()
    d.test.target[:] = 0
    d.test.history[:] = 1
    two = fit(d, flags(epochs=1), 16, 0.2, 0)[0].state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_histories(tmp_path):
    """10 items are the windows' own; more are the user's last ones before the target, whoever has fewer."""
    rng = random.Random(0)
    users = [[rng.randrange(N) for _ in range(size)] for size in [2, 3, 4, 1, 5, 11, 12, 13, 14, 53, 60, 3, 20]]
    d = data.load(folder(tmp_path / "toy", users), None, "loo", 0)
    number = {int(x): i for i, x in enumerate(d.ids)}
    long = [[number[i] for i in s] for s in users if len(s) >= 3]
    for longest in (3, HISTORY, 20, MAX_LEN):
        assert histories(d, "valid", longest) == [s[:-2][-longest:] for s in long]
        assert histories(d, "test", longest) == [s[:-1][-longest:] for s in long]
    assert histories(d, "test", HISTORY) == d.test.histories()


# --- ranking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [False, True])
def test_ranks_and_metrics_equal_those_counted_one_by_one(exclude):
    m, asked = model(3), rows(40, longest=30)
    with torch.no_grad():
        m.item.weight[[2, 5, 11, 17, 19, 20]] = 0  # these score 0 after any history: ties
    target = np.array([(7 * i) % N for i in range(len(asked))])
    before, ties = ranks(m, asked, target, flags(exclude_history=exclude))
    want = {f"{x}@{k}": 0.0 for x in ("HR", "NDCG") for k in (1, 5, 10)}
    for n, (history, t) in enumerate(zip(asked, target.tolist(), strict=True)):
        h = m(torch.tensor([history]))[0, -1]
        score = [(h @ m.item.weight[i]).item() for i in range(N)]
        score = [-math.inf if exclude and i in history else s for i, s in enumerate(score)]
        above, equal = sum(s > score[t] for s in score), sum(s == score[t] for s in score)
        assert (before[n], ties[n]) == (above, equal)
        for place in range(above, above + equal):  # each place among the tied is as likely
            for k in (1, 5, 10):
                want[f"HR@{k}"] += (place < k) / equal / len(asked)
                want[f"NDCG@{k}"] += (place < k) / math.log2(2 + place) / equal / len(asked)
    assert exclude or ties.max() == 6
    assert metrics(before, ties) == pytest.approx(want)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_another_differs(tmp_path):
    d = data.load(folder(tmp_path / "toy", walks(40)), None, "loo", 0)
    (a, log_a), (b, log_b), (c, _) = (fit(d, flags(), 16, 0.2, seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert {k: v for k, v in log_a.items() if k != "seconds"} == {k: v for k, v in log_b.items() if k != "seconds"}
    assert not torch.equal(a.item.weight, c.item.weight)


def test_the_best_epoch_is_kept_and_training_stops(tmp_path, monkeypatch):
    d = data.load(folder(tmp_path / "toy", walks(20)), None, "loo", 0)
    curve, seen = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.9]), []

    def fake(model, asked, target, f):
        seen.append(model.item.weight.detach().clone())
        return np.zeros(1), np.ones(1)

    monkeypatch.setattr(baselines, "ranks", fake)
    monkeypatch.setattr(baselines, "metrics", lambda *_: {"NDCG@10": next(curve)})
    m, log = fit(d, flags(patience=3, epochs=10), 16, 0.2, 0)
    assert (log["epoch"], log["epochs"], log["valid NDCG@10"]) == (2, 5, 0.3)
    assert torch.equal(m.item.weight, seen[1]) and not torch.equal(seen[1], seen[4])


def test_learns_what_can_be_learnt(tmp_path, capsys):
    """From files to table: users walk one cycle, so the next item is certain; popularity cannot know it."""
    place = folder(tmp_path / "toy", walks(250))
    main(["--data", place, "--split", "loo", "--core", "0", "--hidden", "32", "--dropout", "0.1", "--lr", "5e-3",
          "--tokens", "128", "--epochs", "15", "--seeds", "2", "--out", str(tmp_path / "out")])  # fmt: skip
    out = json.loads((tmp_path / "out" / "baselines-toy-loo.json").read_text())
    assert out["SASRec"]["HR@1"] > 0.97 and out["popularity"]["HR@1"] < 0.3
    d = data.load(place, None, "loo", 0)
    assert out["digest"] == d.digest() and out["flags"]["seeds"] == 2 and out["seconds"] > 0
    assert [r["seed"] for r in out["runs"]] == [0, 1]
    assert out["SASRec"]["NDCG@10"] == pytest.approx(np.mean([r["test"]["NDCG@10"] for r in out["runs"]]))
    want = metrics(*popularity(d, d.test))
    assert {k: out["popularity"][k] for k in want} == want
    lines = [json.loads(x) for x in (tmp_path / "out" / "baselines-toy-loo.jsonl").read_text().splitlines()]
    assert [x["target"] for x in lines] == d.test.target.tolist()
    again = metrics(*(np.array([x[k] for x in lines]) for k in ("before", "ties")))
    assert again == {k: out["runs"][0]["test"][k] for k in again}  # the metrics follow from that file
    shown = capsys.readouterr().out
    assert "popularity" in shown and "SASRec, mean of 2 seeds" in shown and "last 10 items" in shown


def test_the_grid_is_decided_on_validation(tmp_path, monkeypatch, capsys):
    tried = []

    def fake(d, f, hidden, dropout, seed, device):
        tried.append((hidden, dropout, seed))
        value = {(64, 0.2): 0.7}.get((hidden, dropout), 0.5)
        log = {"hidden": hidden, "dropout": dropout, "seed": seed, "valid NDCG@10": value}
        return SASRec(len(d.ids), hidden, dropout), log

    monkeypatch.setattr(baselines, "fit", fake)
    argv = ["--data", folder(tmp_path / "toy", walks(10)), "--split", "loo", "--core", "0", "--out", str(tmp_path)]
    main([*argv, "--seeds", "3"])
    assert tried == [(64, 0.5, 0), (64, 0.2, 0), (128, 0.5, 0), (128, 0.2, 0), (64, 0.2, 1), (64, 0.2, 2)]
    tried.clear()
    main([*argv, "--hidden", "32"])
    assert tried == [(32, 0.5, 0), (32, 0.2, 0)]


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--split", "lo"], "loo"),
        (["--history", "20"], "--split loo"),
        (["--history", "51", "--split", "loo"], "50"),
        (["--history", "0"], "above 0"),
        (["--hidden", "31"], "multiple"),
        (["--dropout", "1"], "below 1"),
        (["--patience", "0"], "above 0"),
    ],
)
def test_wrong_flags_are_named(argv, word):
    with pytest.raises(InputError, match=word):
        main(argv)


def test_a_loss_that_is_no_number_is_said(tmp_path):
    d = data.load(folder(tmp_path / "toy", walks(10)), None, "loo", 0)
    with pytest.raises(InputError, match="--lr"):
        fit(d, flags(lr=math.inf), 16, 0.2, 0)
