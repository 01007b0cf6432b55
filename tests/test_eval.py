"""eval.py: metrics against enumeration, predictions, report, AUC, flags, the command line; on tiny models."""

import itertools
import json
import math
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model

import common
import data
import eval as ev
import model as llama
from common import parse_flags
from data import Catalogue, Dataset, Windows
from decode import Decoder
from hatllm import InputError

TITLES = ["red pen", "red pencil", "red", "blue ink", "ink well", "paper", "paper clip", "glue", "red pen", "tape",
          "paper cut", "scissors", "stapler", "blue pen"]  # fmt: skip
SEQUENCES = [[0, 3, 5, 0], [8, 1, 2, 0, 5], [5, 5, 3], [13, 0]]
WINDOWS = [
    ([0, 3], 5, 0, 1.0),
    ([8, 1, 2], 0, 1, 2.0),
    ([5], 5, 2, 3.0),
    ([4, 6, 7, 9, 10, 11, 12, 13, 1, 2], 8, 3, 4.0),
]


@cache
def world():
    """A catalogue in which two items bear one title, a tiny model, windows."""
    w = Windows.of(WINDOWS)
    d = Dataset("mine", [f"i{i}" for i in range(len(TITLES))], TITLES, w, w, w, SEQUENCES)
    cat = Catalogue(TITLES, data.train_tokenizer(TITLES, 300), 0)
    return d, cat, Decoder(tiny_model("IN:1 OR:2 CR:1", vocab_size=300), cat.trie)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Ranks 1, 3, 11 and not listed. A discount of log2(rank) in place of log2(rank + 1), or a rank that is one off,
    shows at once."""
    m = ev.metrics(np.array([0, 2, 10, np.inf]), np.ones(4))
    assert m == pytest.approx({"HR@1": 1 / 4, "HR@5": 2 / 4, "HR@10": 2 / 4, "NDCG@1": 1 / 4,
                               "NDCG@5": (1 + 0.5) / 4, "NDCG@10": (1 + 0.5) / 4})  # fmt: skip
    assert ev.metrics(np.array([9]), np.array([1]))["NDCG@10"] == pytest.approx(1 / math.log2(11))


@pytest.mark.parametrize("before, ties", [(b, t) for b in (0, 1, 3, 9, 10) for t in (1, 2, 4, 6)])
def test_ties_are_the_mean_over_their_orders(before, ties):
    """Where equal scores stand is chance: counting the target first (or last) flatters (or wrongs) a model that
    scores all alike."""
    ranks = [before + 1 + order.index(0) for order in itertools.permutations(range(ties))]
    one = np.array([before]), np.array([ties])
    for k in (1, 2, 5, 10):
        assert ev.hits(*one, k)[0] == pytest.approx(np.mean([r <= k for r in ranks]))
        gains = [1 / math.log2(1 + r) if r <= k else 0.0 for r in ranks]
        assert ev.gains(*one, k)[0] == pytest.approx(np.mean(gains))


def test_no_windows_are_zero_not_nan():
    assert set(ev.metrics(np.array([]), np.array([])).values()) == {0.0}


def test_place_by_brute_force():
    rng = np.random.default_rng(0)
    score, target = rng.integers(0, 4, (20, 9)), rng.integers(0, 9, 20)
    before, ties = ev.place(score, target)
    for n, t in enumerate(target):
        assert before[n] == sum(s > score[n, t] for s in score[n])
        assert ties[n] == sum(s == score[n, t] for s in score[n]) >= 1


def test_popularity_by_brute_force():
    """Counts of the training part, ranked against the whole catalogue, items of equal count tied."""
    d, *_ = world()
    flat = [i for s in SEQUENCES for i in s]
    before, ties = ev.popularity(d, d.test)
    for n, (_, target, *_) in enumerate(WINDOWS):
        assert before[n] == sum(flat.count(i) > flat.count(target) for i in range(len(TITLES)))
        assert ties[n] == sum(flat.count(i) == flat.count(target) for i in range(len(TITLES)))


def test_positions():
    """From the file alone: items of one title are tied, so are titles of one score; a group counts with all its
    items; a target that is not listed is nowhere."""
    items, scores = [[4], [7, 8], [1], [2, 3], [5]], [-1.0, -2.0, -3.0, -3.0, -4.0]
    found = {t: tuple(float(x[0]) for x in ev.positions([{"items": items, "scores": scores, "target": t}]))
             for t in (4, 7, 8, 1, 2, 3, 5, 9)}  # fmt: skip
    assert found == {4: (0, 1), 7: (1, 2), 8: (1, 2), 1: (3, 3), 2: (3, 3), 3: (3, 3), 5: (6, 1), 9: (math.inf, 1)}
    before, ties = ev.positions([{"items": items, "scores": scores, "target": t} for t in (5, 9, 4)])
    assert before.tolist() == [6, math.inf, 0] and ties.tolist() == [1, 1, 1]


# --- a split through the decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_batches(seed):
    """Every index once, no batch above the budget with its padding but a text that alone is, longest first."""
    rng = random.Random(seed)
    lengths, budget = [rng.randint(1, 60) for _ in range(rng.randint(1, 80))], rng.choice([1, 50, 200, 10**6])
    parts = ev.batches(lengths, budget)
    assert sorted(i for p in parts for i in p) == list(range(len(lengths)))
    assert all(len(p) == 1 or len(p) * max(lengths[i] for i in p) <= budget for p in parts)
    longest = [lengths[i] for p in parts for i in p]
    assert longest == sorted(longest, reverse=True)
    full = [p for p in parts[:-1] if (len(p) + 1) * lengths[p[0]] <= budget]
    assert not full and ev.batches([], budget) == []


def truth(history: list[int]) -> list[float]:
    """Score of every item after a history, by the decoder's exact scores."""
    _, cat, decoder = world()
    tokens, item, _ = data.collate_prompts(cat, [history])
    score = decoder.score(tokens, item, torch.arange(cat.trie.n_leaves)[None])[0]
    return score[cat.trie.leaf_of_item].tolist()


@pytest.mark.parametrize("exclude", [False, True])
def test_recommend(exclude):
    """The k best titles by brute force, with all items that bear them. exclude leaves out the history's items, and
    these alone: not another item of the same title, nor any of the k places."""
    _, cat, decoder = world()
    histories = [h for h, *_ in WINDOWS]
    for k in (1, 4, 10, 30):
        found = ev.recommend(decoder, cat, histories, ev.Flags(k=k, beam=3, exclude_history=exclude))
        for history, p in zip(histories, found, strict=True):
            score, gone = truth(history), set(history) if exclude else set()
            groups = {}
            for i in sorted(set(range(len(TITLES))) - gone):
                groups.setdefault(TITLES[i], []).append(i)
            best = sorted(groups.values(), key=lambda g: -score[g[0]])[:k]
            assert p["items"] == best and p["exact"]
            assert p["scores"] == pytest.approx([score[g[0]] for g in best], abs=1e-4)
    both = [
        g
        for p in ev.recommend(decoder, cat, [[0]], ev.Flags(k=30, beam=3, exclude_history=exclude))
        for g in p["items"]
        if 8 in g
    ]
    assert both == [[8] if exclude else [0, 8]]


def flags(**more) -> ev.Flags:
    return ev.Flags(beam=3, tokens=300, **more)


def test_evaluate_keeps_the_order_of_the_windows():
    """Batches are by length; a prediction at another window's place would be another user's."""
    d, cat, decoder = world()
    found = ev.evaluate(decoder, cat, d.test, flags())
    assert [(p["history"], p["target"], p["user"]) for p in found] == [(h, t, u) for h, t, u, _ in WINDOWS]
    for p in found:
        (one,) = ev.recommend(decoder, cat, [p["history"]], ev.Flags())
        assert p["items"] == one["items"] and p["scores"] == pytest.approx(one["scores"], abs=1e-4)
    assert json.loads(json.dumps(found)) == found  # no numpy numbers: they cannot be written
    before, ties = ev.positions(found)
    for n, p in enumerate(found):
        score = truth(p["history"])
        others = sum(s > score[p["target"]] + 1e-4 for s in score)
        assert before[n] == others if p["target"] in sum(p["items"], []) else others >= 10
        assert p["nll"] == pytest.approx(-score[p["target"]], abs=1e-4)


def test_too_large_a_batch_is_halved(monkeypatch):
    """Out of memory: the same predictions in smaller batches; for one user alone, a sentence."""
    _, cat, decoder = world()
    histories, targets, real, sizes = [h for h, *_ in WINDOWS], [t for _, t, *_ in WINDOWS], Decoder.search, []

    def search(self, tokens, *rest, **more):
        sizes.append(len(tokens))
        if len(tokens) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, *rest, **more)

    room, expected = 1, ev.recommend(decoder, cat, histories, ev.Flags(k=5, beam=3))
    monkeypatch.setattr(Decoder, "search", search)
    found = ev.recommend(decoder, cat, histories, ev.Flags(k=5, beam=3), targets)
    assert [p["items"] for p in found] == [p["items"] for p in expected] and sizes == [4, 2, 1, 1, 2, 1, 1]
    assert [p["nll"] for p in found] == pytest.approx([-truth(h)[t] for h, t in zip(histories, targets, strict=True)])
    assert "nll" not in expected[0]
    room = 0
    with pytest.raises(InputError, match="one user alone .*--beam"):
        ev.recommend(decoder, cat, histories, ev.Flags(k=5, beam=3))


def test_report_slices_add_up():
    """Every window is in one slice by popularity and in one by length, and their means make the whole's."""
    d, cat, decoder = world()
    at = ev.positions(ev.evaluate(decoder, cat, d.test, flags()))
    r = ev.report(d, d.test, *at)
    assert r["n"] == 4
    for kind in ("target seen", "history of"):
        parts = [s for name, s in r["slices"].items() if name.startswith(kind)]
        assert sum(s["n"] for s in parts) == 4
        for m in ("HR@10", "NDCG@5"):
            assert sum(s["n"] * s[m] for s in parts) / 4 == pytest.approx(r[m])
    assert {name: s["n"] for name, s in r["slices"].items()} == {
        "target seen 0-4 times": 4, "history of 1-4 items": 3, "history of 5+ items": 1}  # fmt: skip
    many = Dataset("x", d.ids, TITLES, d.train, d.valid, d.test, [[5] * 20 + [0] * 19 + [8] * 4])
    names = {n: s["n"] for n, s in ev.report(many, d.test, *at)["slices"].items() if "seen" in n}
    assert names == {"target seen 0-4 times": 1, "target seen 5-19 times": 1, "target seen 20+ times": 2}
    five = Windows.of([([0, 1, 2, 3, 4], 5, 0, 1.0)])  # item 0 counts
    assert "history of 5+ items" in ev.report(d, five, np.zeros(1), np.ones(1))["slices"]
    assert all(f"{r['HR@10']:.4f}" in line for line in ev.table({"model": r}).splitlines()[1:])


# --- AUC ------------------------------------------------------------------------------------------------------------


def test_auc_by_brute_force():
    """Over the negatives that the seed draws: the share below the target, a tie half; the target is never its own
    negative; batches do not matter."""
    d, cat, decoder = world()
    n, leaves = 7, cat.trie.n_leaves
    got = ev.against(decoder, cat, d.test, n, 10**6)[:, 0]
    assert got == pytest.approx(ev.against(decoder, cat, d.test, n, 1)[:, 0])
    assert ev.against(decoder, cat, d.test[2:], n, 10**6)[:, 0] == pytest.approx(got[2:])  # as for a process's share
    for (history, target, user, _), value in zip(WINDOWS, got, strict=True):
        own = int(cat.trie.leaf_of_item[target])
        score = dict(zip(cat.trie.leaf_of_item.tolist(), truth(history), strict=True))
        others = [x for x in range(leaves) if x != own]
        drawn = np.random.default_rng((user, target)).choice(leaves - 1, n, replace=False)
        won = [(score[own] > score[others[x]]) + (score[own] == score[others[x]]) / 2 for x in drawn]
        assert value == pytest.approx(np.mean(won))


def test_all_negatives_are_the_full_ranking():
    """Ranks among all items, by brute force: a title that two items bear counts twice, and ties with its own twin."""
    d, cat, decoder = world()
    for (history, target, *_), (won, before, ties) in zip(
        WINDOWS, ev.against(decoder, cat, d.test, 10**6, 10**6), strict=True
    ):
        score = truth(history)
        assert before == sum(s > score[target] for s in score) and ties == sum(s == score[target] for s in score)
        other = {cat.trie.leaf_of_item[i].item(): s for i, s in enumerate(score)}
        own = other.pop(cat.trie.leaf_of_item[target].item())
        assert won == pytest.approx(np.mean([own > s for s in other.values()]))


def test_auc_of_known_scores():
    """A decoder that scores by leaf number: AUC must be near the share of leaves below the target's, so neither a
    flipped comparison nor a biased draw; equal scores give a half; the target's own column does not count."""
    d, cat, _ = world()
    leaves, seen = cat.trie.n_leaves, []

    def score(tokens, item, x):
        seen.append(x)
        return x.float() * slope

    fake = SimpleNamespace(model=SimpleNamespace(head=torch.zeros(1)), score=score)
    for slope in (1, -1, 0):
        windows = d.test[np.tile(np.arange(len(d.test)), 800)]
        windows.user = np.arange(len(windows))  # each draws its own five
        value = ev.against(fake, cat, windows, 5, 10**9)[:, 0]
        below = cat.trie.leaf_of_item[torch.from_numpy(windows.target)].numpy() / (leaves - 1)
        for target in np.unique(windows.target):
            at = windows.target == target
            assert abs(value[at].mean() - {1: below, -1: 1 - below, 0: 0 * below + 0.5}[slope][at][0]) < 0.04
    lists = torch.cat(seen)
    assert (lists[:, 1:] != lists[:, :1]).all() and lists.min() == 0 and lists.max() == leaves - 1
    assert all(len(set(x)) == 6 for x in lists.tolist())  # none is drawn twice


def test_order_of_a_list_has_no_influence():
    """A score that depended on the place in the list would leak which one is the target."""
    _, cat, decoder = world()
    tokens, item, _ = data.collate_prompts(cat, [WINDOWS[1][0]])
    leaves = torch.randint(cat.trie.n_leaves, (1, 12))
    order = torch.randperm(12)
    assert torch.equal(decoder.score(tokens, item, leaves)[:, order], decoder.score(tokens, item, leaves[:, order]))


# --- flags and names ------------------------------------------------------------------------------------------------


def test_flags_have_their_types():
    f = parse_flags(ev.Flags, "--out a --k 5 --exact false --exclude_history --recommend x y".split(), "doc")
    assert (f.out, f.k, f.exact, f.exclude_history, f.recommend) == ("a", 5, False, True, ["x", "y"])
    assert parse_flags(ev.Flags, [], "") == ev.Flags()
    for text, value in {"--exact": True, "--exact true": True, "--exact=False": False, "--exact TRUE": True}.items():
        assert parse_flags(ev.Flags, text.split(), "").exact is value
    assert parse_flags(ev.Flags, "--exact --k 3".split(), "").k == 3  # a bare flag must not eat the next


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("--bem 3", "--bem; did you mean --beam"),
        ("--exclude-history", "did you mean --exclude_history"),
        ("--qqqqqq 3", "--qqqqqq; see --help"),
        ("--limi 3", "did you mean --limit"),  # not taken as an abbreviation
        ("--k five", "--k.*five"),
        ("--exact maybe", "'maybe' is neither true nor false"),
        ("--k", "--k.*expected"),
        ("stray", "unknown argument stray"),
        ("--split tset", "--split tset .*did you mean test"),
        ("--score ful", "--score ful .*did you mean full"),
        ("--dtype float16", "--dtype float16 is none of auto"),
        ("--beam 0", "--beam must be above 0"),  # found nothing, and called that exact
        ("--k 5", "--k 5: HR@10 needs 10"),  # printed HR@5 as HR@10
    ],
)
def test_wrong_flags_are_a_sentence(text, sentence):
    with pytest.raises(InputError, match=sentence):
        ev.main(text.split())


def test_help_mentions_every_comment(capsys, monkeypatch):
    """The comments of the fields are the help; a percent sign in one is not a format."""
    import train

    monkeypatch.setenv("COLUMNS", "300")  # no line is wrapped
    for cls in (ev.Flags, train.Flags):
        with pytest.raises(SystemExit) as e:
            parse_flags(cls, ["--help"], "what it does")
        shown = " ".join(capsys.readouterr().out.split())
        assert e.value.code == 0 and "what it does" in shown
        source = Path(__import__(cls.__module__).__file__).read_text()
        lines = source[source.index("class Flags") :].splitlines()
        comments = {}
        for name in cls.__dataclass_fields__:
            line = next(x for x in lines if x.startswith(f"    {name}: "))
            comments[name] = line.partition("  # ")[2]
        assert all(comments.values())
        for name, comment in comments.items():
            assert f"--{name}" in shown and comment in shown


def test_look_up():
    """Whatever the case, the first item of a title; the last HISTORY of them; else the nearest titles are named."""
    d, *_ = world()
    assert ev.look_up(("RED PEN", "Glue"), d) == [0, 7]
    assert ev.look_up(("tape",) * 3 + ("glue",) * 10, d) == [7] * 10
    with pytest.raises(InputError, match='no item is called "papr clip"; near: "paper clip"'):
        ev.look_up(("glue", "papr clip"), d)
    with pytest.raises(InputError, match='"zzzz"; none is near'):
        ev.look_up(("zzzz",), d)
    long = Dataset("x", ["a"], ["The whole of the long title of a thing"], d.train, d.valid, d.test, [])
    with pytest.raises(InputError, match='near: "The whole of the long title of a thing"'):
        ev.look_up(("THING",), long)  # a word of it


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """What train.py leaves: config.json, best-STEP; and its data."""
    source = tmp_path / "mine"
    source.mkdir()
    (source / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"i{n}\t{t}\n" for n, t in enumerate(TITLES)))
    rng = random.Random(0)
    rows = [f"u{u}\t{' '.join(f'i{rng.randrange(14)}' for _ in range(6))}\t1 2 3 4 5 {u + 5}\n" for u in range(30)]
    (source / "sequences.tsv").write_text("user_id\ti\tt\n" + "".join(rows))
    d = data.load(str(source), k=0)
    out = tmp_path / "out"
    for step, seed in ((5, 1), (10, 0)):
        llama.save(tiny_model("IN-closed:1 OR:2 CR:1", seed, vocab_size=300), out / f"best-{step:06d}")
        data.train_tokenizer(TITLES, 300).save(str(out / f"best-{step:06d}" / "tokenizer.json"))
    config = dict(data=str(source), data_dir="", split="time", core=0, digest=d.digest(), base="", loss="msl", tau=0.5)
    config["model"] = "tiny"
    (out / "config.json").write_text(json.dumps(config | {"plan": "IN-closed:1 OR:2 CR:1"}))
    return out, d


@pytest.mark.parametrize(
    "more", ["", "--exact false --score full", "--exclude_history", "--limit 2 --auc 3 --split valid", "--auc 999"]
)
def test_main_writes_what_it_prints(run_folder, capsys, more):
    """results-SPLIT.json, the table, and the metrics of predictions-SPLIT.jsonl are the same numbers."""
    out, d = run_folder
    ev.main(["--out", str(out), *more.split()])
    split = "valid" if "valid" in more else "test"
    windows, shown = getattr(d, split)[: 2 if "limit" in more else None], capsys.readouterr().out
    found = [json.loads(x) for x in (out / f"predictions-{split}.jsonl").read_text().splitlines()]
    result = json.loads((out / f"results-{split}.json").read_text())
    assert [(p["history"], p["target"]) for p in found] == list(zip(windows.histories(), windows.target, strict=True))
    assert {m: result["model"][m] for m in ("HR@5", "NDCG@10")} == {
        m: ev.metrics(*ev.positions(found))[m] for m in ("HR@5", "NDCG@10")}  # fmt: skip
    assert result["popularity"] == ev.metrics(*ev.popularity(d, windows))
    line = next(x for x in shown.splitlines() if x.startswith("model"))
    assert line.split()[1:] == [f"{result['model'][f'{m}@{k}']:.4f}" for m in ("HR", "NDCG") for k in ev.KS]
    assert 0 < result["model"]["nll"] == pytest.approx(np.mean([p["nll"] for p in found]))
    assert f"{result['model']['nll']:.4f} nats per item" in shown
    assert ("auc" in result["model"]) == ("AUC against " in shown) == ("--auc" in more)
    if "999" in more:  # all titles: ranks that agree with the exact top 10, and metrics from them
        ranks = np.array([(p["before"], p["ties"]) for p in found]).T
        assert result["model"]["full ranking"] == ev.metrics(*ranks)
        assert result["model"]["full ranking"]["NDCG@10"] == pytest.approx(result["model"]["NDCG@10"])
    inside = [i for p in found for g in p["items"] for i in g if i in p["history"]]
    assert not inside if "exclude" in more else inside
    assert result["flags"]["exclude_history"] == ("exclude" in more)


def test_main_tells_how_many_lists_are_exact(run_folder, monkeypatch, capsys):
    (out, d), real = run_folder, ev.evaluate
    monkeypatch.setattr(ev, "evaluate", lambda *a: [dict(p, exact=n > 0) for n, p in enumerate(real(*a))])
    ev.main(["--out", str(out)])
    share = json.loads((out / "results-test.json").read_text())["model"]["exact"]
    assert share == pytest.approx(1 - 1 / len(d.test))
    assert f"exact for {share:.1%} of the users" in capsys.readouterr().out


def test_main_takes_the_newest_model_and_its_temperature(run_folder):
    """Not the checkpoint before it, nor the plan OR, nor tau 1."""
    out, d = run_folder
    m, cat, *_ = ev.load_run(out)
    assert torch.equal(m.head, tiny_model("OR", 0, vocab_size=300).head) and m.plan == ["IN-closed", "OR", "OR", "CR"]
    ev.main(["--out", str(out)])
    (first, *_) = map(json.loads, (out / "predictions-test.jsonl").read_text().splitlines())
    (p,) = ev.recommend(Decoder(m, cat.trie, tau=0.5), cat, [first["history"]], ev.Flags())
    assert p["items"] == first["items"] and p["scores"] == pytest.approx(first["scores"], abs=1e-4)


def test_main_recommends(run_folder, capsys):
    out, _ = run_folder
    ev.main(["--out", str(out), "--k", "3", "--recommend", "Glue", "tape"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "after glue | tape" and len(lines) == 5
    scores = [float(x.split()[0]) for x in lines[2:]]
    assert scores == sorted(scores, reverse=True) and all(x.split(maxsplit=2)[2] in TITLES for x in lines[2:])


def test_main_on_what_is_no_run(run_folder, tmp_path, monkeypatch):
    """No folder, data that changed since, no checkpoint: each a sentence; and run() prints it without a traceback."""
    out, _ = run_folder
    with pytest.raises(InputError, match="no run of train.py"):
        ev.main(["--out", str(tmp_path / "nowhere")])
    items = tmp_path / "mine" / "items.tsv"
    text = items.read_text()
    items.write_text(text.replace("glue", "GLUE"))
    with pytest.raises(InputError, match="changed since"):
        ev.main(["--out", str(out)])
    items.write_text(text)
    for p in list(out.glob("best-*")):
        p.rename(tmp_path / p.name)
    monkeypatch.setattr("sys.argv", ["eval.py", "--out", str(out)])
    with pytest.raises(SystemExit, match="error: .*no checkpoint yet"):
        common.run(ev.main)
