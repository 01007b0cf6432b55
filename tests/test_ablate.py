"""ablate.py: what is run and what is not run again, the table against sums written out, attention against a softmax
written out."""

import itertools
import json
import random
import re
import signal
import statistics
import sys

import numpy as np
import pytest
import torch
from conftest import PLANS, VOCAB, spread, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import ablate
import baselines
import data
import eval as evaluation
import model as llama
import train
from ablate import GROUPS, PARTS, distinct, interval, parts_of, setting, shares, slug
from hatllm import InputError, layout, parse_plan
from model import Config, Llama

SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
STEPS = "--max_steps 4 --eval_every 2 --batch 8 --core 0".split()
TWO = "OR;IN:1 CR:1"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "TINY", SMALL)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A made data set: 30 items, 40 users, some with several windows."""
    folder, rng = tmp_path_factory.mktemp("data") / "shop", random.Random(0)
    folder.mkdir()
    titles = [f"{c} {n} {s}" for c, n, s in itertools.product(("red", "blue"), ("pen", "ink", "cup"), "ABCDE")]
    lines = [f"i{i}\t{title}" for i, title in enumerate(titles)]
    (folder / "items.tsv").write_text("\n".join(["item_id\ttitle", *lines]))
    lines = []
    for u in range(40):
        n = rng.randint(3, 13)
        times = sorted(rng.sample(range(1000), n))
        lines.append(f"u{u}\t{' '.join(f'i{rng.randrange(30)}' for _ in times)}\t{' '.join(map(str, times))}")
    (folder / "sequences.tsv").write_text("\n".join(["user_id\titem_ids\ttimes", *lines]))
    return folder


@pytest.fixture(scope="module")
def runs(shop, tmp_path_factory):
    """out/ablate with two plans and two seeds."""
    out = tmp_path_factory.mktemp("out") / "ablate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TINY", SMALL)
        ablate.main(["run", "--data", str(shop), "--plans", TWO, "--seeds", "0,1", "--out", str(out), *STEPS])
    return out


def asked(monkeypatch, *argv) -> list[tuple]:
    """The runs that a command asks for, in order: data, plan, seed, all arguments."""
    calls = []
    monkeypatch.setattr(ablate, "once", lambda place, argv: calls.append((place.name, argv)))
    ablate.main(["run", *argv])
    return calls


# --- run ------------------------------------------------------------------------------------------------------------


def test_slug():
    """One folder a plan: no two plans share one, whatever the spaces, and no slash or colon is in it."""
    counts = ("", ":1", ":11", ":1/4", ":14", ":0.25")
    parts = [k + c for k in ("IN", "OR", "CR", "IN-closed") for c in counts]
    plans = {*ablate.PLANS, *parts, *(f"{a} {b}" for a in parts for b in parts)}
    assert len({slug(p) for p in plans}) == len(plans)
    assert all(re.fullmatch(r"[\w.-]+", slug(p)) for p in plans)
    assert slug("IN:1/4 OR CR:1/4") == slug("  IN:1/4   OR CR:1/4 ") == "IN1of4_OR_CR1of4"


@pytest.mark.parametrize("depth", [2, 6, 16, 30, 32])
def test_default_plans_fit(depth):
    assert all(len(parse_plan(p, depth)) == depth for p in ablate.PLANS) and ablate.PLANS[0] == "OR"


def test_plans_that_are_the_same_layers_are_run_once(monkeypatch, capsys, tmp_path):
    f = train.Flags()
    assert distinct(["OR", "IN:1/4 OR", "IN:1 OR", "OR:2"], f) == ["OR", "IN:1/4 OR"]
    assert "'OR:2' is left out: with 2 layers it is 'OR'" in capsys.readouterr().out
    with pytest.raises(InputError, match="covers 3 layers"):
        distinct(["OR:3"], f)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(tiny_config().to_json()))
    assert distinct(["IN:1 OR", "IN:1/4 OR"], train.Flags(model=str(tmp_path / "m"))) == ["IN:1 OR"]
    monkeypatch.setenv("HATLLM_WEIGHTS", str(tmp_path))
    assert distinct(["IN:1 OR", "IN:1/4 OR"], train.Flags(model="m")) == ["IN:1 OR"]
    assert distinct(["IN:1 OR", "IN:1/4 OR", "IN:1 OR"], train.Flags(model="to-be-fetched")) == ["IN:1 OR", "IN:1/4 OR"]


def test_order_and_flags(monkeypatch, tmp_path):
    """All of seed 0 first; what is not ablate's goes to train.py, values and all."""
    argv = f"--data a,b/c --lr 0.01 --seeds 0,1 --compile --out {tmp_path} --plans".split()
    calls = asked(monkeypatch, *argv, "OR; IN:1  CR:1", "--loss=lml", "--share_history", "false")
    assert [name for name, _ in calls] == [
        f"{d}-{p}-s{s}" for s in (0, 1) for d in ("a", "c") for p in ("OR", "IN1_CR1")
    ]
    f = train.parse_flags(train.Flags, calls[-1][1], "")
    assert (f.data, f.plan, f.seed) == ("b/c", "IN:1 CR:1", 1)
    assert (f.lr, f.compile, f.loss, f.share_history) == (0.01, True, "lml", False)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--max_step", "3"], "did you mean --max_steps"),  # before the first run, not in every run
        (["--plan", "OR"], "--plans"),
        (["--seed=3"], "--seeds"),
        (["--overwrite"], "chosen for every run"),
        (["--seeds", "a"], "whole numbers"),
        (["--seeds", "-1"], "whole numbers"),
        (["--plans", " ; "], "need a value"),
        (["--plans", "OR;XX"], "unknown layer kind 'XX'"),
        (["--loss"], "expected one argument"),
    ],
)
def test_wrong_commands(monkeypatch, argv, message):
    with pytest.raises(InputError, match=message):
        asked(monkeypatch, *argv)


def test_help(capsys):
    ablate.main([])
    with pytest.raises(SystemExit):
        ablate.main(["run", "--help"])
    assert "--plans" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the commands run, table"):
        ablate.main(["tables"])


def test_finished_runs_are_not_trained_again(runs, shop, monkeypatch, capsys):
    assert len([*runs.glob("*/results-test.json")]) == 4
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file() and p.parent != runs}
    argv = ["run", "--data", str(shop), "--plans", TWO, "--seeds", "0,1", "--out", str(runs), *STEPS]
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    ablate.main(argv)
    shown = capsys.readouterr().out
    assert shown.count("finished already") == 4 and "| IN:1 CR:1 | 0, 1 |" in shown
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file() and p.parent != runs} == before
    with pytest.raises(InputError, match="4 of 4 runs failed(.|\n)*--max_steps was 4, now it is 5"):
        ablate.main([*argv, "--max_steps", "5"])  # other flags are another experiment: never skipped in silence
    with pytest.raises(InputError, match="--lr was 0.001, now it is 0.1"):
        ablate.main([*argv, "--lr", "0.1"])
    ablate.main([*argv, "--lr", "0.001"])


def test_stopped_and_resumed(runs, shop, tmp_path, monkeypatch):
    """Ctrl-C ends the whole command, and the same command then ends as if nothing had been."""
    argv = ["run", "--data", str(shop), "--plans", TWO, "--seeds", "0", "--out", str(tmp_path), *STEPS]
    step = train.Trainer.step

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted)
        with pytest.raises(InputError, match="shop-OR-s0: stopped"):
            ablate.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["shop-OR-s0"]
    assert not (tmp_path / "shop-OR-s0/results-test.json").exists()
    ablate.main(argv)
    for name in ("shop-OR-s0", "shop-IN1_CR1-s0"):
        assert (tmp_path / name / "predictions-test.jsonl").read_text() == (
            runs / name / "predictions-test.jsonl"
        ).read_text()


def test_a_failed_run_does_not_stop_the_others(shop, tmp_path, monkeypatch, capsys):
    main = train.main

    def broken(argv):
        if "IN:1 CR:1" in argv:
            raise RuntimeError("a bug")
        main(argv)

    monkeypatch.setattr(train, "main", broken)
    with pytest.raises(InputError) as e:
        argv = ["--data", f"nowhere,{shop}", "--plans", "IN:1 CR:1;OR", "--out", str(tmp_path), *STEPS]
        ablate.main(["run", *argv])
    assert "3 of 4 runs failed" in str(e.value) and "nowhere-OR-s0: --data nowhere" in str(e.value)
    assert "shop-IN1_CR1-s0: a bug" in str(e.value)
    assert [p.parent.name for p in tmp_path.glob("*/results-test.json")] == ["shop-OR-s0"]
    shown = capsys.readouterr()
    assert "| OR | 0 |" in shown.out and "RuntimeError: a bug" in shown.err


# --- table ----------------------------------------------------------------------------------------------------------


def made_run(out, plan: str, seed: int, windows: list[tuple[int, int]], **more) -> list[dict]:
    """A run's folder with random predictions: groups of items that share a title, and equal scores."""
    rng = random.Random(f"{plan}{seed}")
    place = out / f"shop-{slug(plan)}-s{seed}"
    place.mkdir(parents=True)
    config = {"data": "x/shop", "plan": plan, "seed": seed, "max_steps": 7, "digest": "d", "base": ""} | more
    asked = {k: v for k, v in config.items() if k in train.Flags.__dataclass_fields__}
    config |= vars(train.resolve(train.Flags(**asked)))  # as train.py writes it
    predictions = []
    for user, target in windows:
        items = rng.sample(range(25), 20)
        groups = [items[i : i + 2] if i % 5 == 0 else items[i : i + 1] for i in range(0, 20, 2)]
        scores = sorted((round(-3 * rng.random(), 0) for _ in groups), reverse=True)
        own = {"user": user, "target": target, "nll": 9 * rng.random()}
        predictions.append(own | {"items": groups, "scores": scores, "exact": True})
    at = evaluation.positions(predictions)
    flags = vars(evaluation.Flags())
    popular = dict.fromkeys(ablate.NAMES, 0.125)
    result = {"model": evaluation.metrics(*at), "popularity": popular, "flags": flags}
    (place / "config.json").write_text(json.dumps(config))
    (place / "results-test.json").write_text(json.dumps(result))
    (place / "predictions-test.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
    log = [{"step": s, "loss": 1.0, "valid_nll": 5.0 + (s - 2) ** 2 + seed, "valid_NDCG@10": 0.1} for s in (1, 2, 3)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in log))
    return predictions


def by_hand(p: dict, k: int) -> tuple[float, float]:
    """HR@k and NDCG@k of one prediction, the mean over all places that ties allow."""
    pairs = [(s, i) for group, s in zip(p["items"], p["scores"], strict=True) for i in group]
    own = [s for s, i in pairs if i == p["target"]]
    if not own:
        return 0.0, 0.0
    above, equal = sum(s > own[0] for s, _ in pairs), sum(s == own[0] for s, _ in pairs)
    ranks = range(above + 1, above + equal + 1)
    hit = [float(r <= k) for r in ranks]
    return statistics.mean(hit), statistics.mean(h / np.log2(1 + r) for h, r in zip(hit, ranks, strict=True))


def test_table_by_hand(tmp_path, capsys):
    out, rng = tmp_path / "ablate", random.Random(1)
    windows = [(u, rng.randrange(25)) for u in range(30) for _ in range(1 + u % 3)]
    found = {(p, s): made_run(out, p, s, windows) for p, s in [("OR", 0), ("OR", 1), ("IN OR:1", 0), ("IN OR:1", 1)]}
    found |= {("CR", 5): made_run(out, "CR", 5, windows)}  # no seed in common with OR
    (out / "shop-OR-s9").mkdir()
    (out / "shop-OR-s9/config.json").write_text("{}")  # still running
    digests = {"shop-time": "d", "shop-loo": "other", "shopping-time": "d"}
    for name, digest in digests.items():
        tests = [{"test": dict.fromkeys(ablate.NAMES, v) | {"n": 60}} for v in (0.2, 0.4)]
        (tmp_path / f"baselines-{name}.json").write_text(
            json.dumps({"digest": digest, "popularity": {"n": 60}, "runs": tests})
        )
    ablate.main(["table", "--out", str(out)])
    (made,) = json.loads((out / "table.json").read_text())["tables"]
    assert made["setting"] == "shop, tiny --max_steps 7" and made["n"] == len(windows) == 60
    rows = {r["name"]: r for r in made["rows"]}
    names = ["popularity", "SASRec", "OR", "CR", "IN OR:1"]  # without the baseline of another split
    assert [r["name"] for r in made["rows"]] == names
    for plan in ("OR", "IN OR:1"):
        for k in (1, 5, 10):
            for at, name in enumerate(("HR", "NDCG")):
                means = [statistics.mean(by_hand(p, k)[at] for p in found[plan, s]) for s in (0, 1)]
                got = rows[plan]["metrics"][f"{name}@{k}"]
                assert got["mean"] == pytest.approx(statistics.mean(means), abs=1e-12)
                assert got["std"] == pytest.approx(statistics.stdev(means), abs=1e-12)
        assert rows[plan]["metrics"]["valid nll"] == {"mean": 5.5, "std": pytest.approx(0.5**0.5)}
        assert rows[plan]["metrics"]["valid NDCG@10"]["mean"] == pytest.approx(0.1)
    assert rows["CR"]["metrics"]["HR@1"]["std"] is None
    assert rows["CR"]["difference"] == rows["OR"]["difference"] == {"NDCG@10": None, "nll": None}
    for name, value in (("NDCG@10", lambda p: by_hand(p, 10)[1]), ("nll", lambda p: p["nll"])):
        own = [statistics.mean(value(found["IN OR:1", s][i]) for s in (0, 1)) for i in range(60)]
        plain = [statistics.mean(value(found["OR", s][i]) for s in (0, 1)) for i in range(60)]
        assert rows["OR"]["metrics"][name]["mean"] == pytest.approx(statistics.mean(plain))
        x = rows["IN OR:1"]["difference"][name]
        assert x["mean"] == pytest.approx(statistics.mean(own) - statistics.mean(plain), abs=1e-12)
        want = interval(np.array(own) - np.array(plain), np.array([u for u, _ in windows]))
        assert [x["low"], x["high"]] == pytest.approx(want, abs=1e-12) and x["low"] < x["mean"] < x["high"]
        assert x["seeds"] == [0, 1]
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    m = rows["OR"]["metrics"]["NDCG@10"]
    assert f"| {m['mean']:.4f} ± {m['std']:.4f} |" in lines["OR"]
    cells = [f"{x['mean']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]" for x in rows["IN OR:1"]["difference"].values()]
    assert lines["IN OR:1"].endswith(f"| {' | '.join(cells)} |")
    assert "| 0.3000 ± 0.1414 |" in lines["SASRec"] and "| 0.1250 |" in lines["popularity"]
    assert len({line.count("|") for line in lines.values()}) == 1
    assert "not finished: shop-OR-s9" in text


def test_runs_of_other_settings_get_a_table_of_their_own(tmp_path):
    windows = [(u, u) for u in range(10)]
    made_run(tmp_path, "OR", 0, windows)
    made_run(tmp_path, "IN", 0, windows, model="a/b", lr=0.5)
    made_run(tmp_path, "CR", 0, windows, digest="changed")
    ablate.main(["table", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "table.json").read_text())["tables"]
    assert [t["setting"] for t in made] == [
        "shop, b --lr 0.5 --max_steps 7",
        *["shop, tiny --max_steps 7"] * 2,
    ]
    assert all(set(r.get("difference", {}).values()) <= {None} for t in made for r in t["rows"])
    used = vars(evaluation.Flags(limit=50, score="full", auc=3))
    assert setting(vars(train.resolve(train.Flags(test_limit=9))), used) == "ml-100k, tiny --score full --test_limit 50"


def test_table_refuses(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        ablate.main(["table", "--out", str(tmp_path)])
    made_run(tmp_path, "OR", 0, [(0, 1), (1, 2)])
    made_run(tmp_path, "IN", 0, [(0, 1), (1, 3)])
    with pytest.raises(InputError, match="different windows"):
        ablate.main(["table", "--out", str(tmp_path)])
    old = '{"user": 0, "target": 1, "items": [[1]], "scores": [-1.0], "exact": true}\n'
    (tmp_path / "shop-IN-s0/predictions-test.jsonl").write_text(old)
    with pytest.raises(InputError, match="without nll; `python eval.py --out .*shop-IN-s0 --dtype auto` mends"):
        ablate.main(["table", "--out", str(tmp_path)])
    (tmp_path / "shop-IN-s0/predictions-test.jsonl").write_text('{"user": 0, ')
    with pytest.raises(InputError, match="predictions-test.jsonl: cannot be read"):
        ablate.main(["table", "--out", str(tmp_path)])


def test_table_of_chosen_metrics(tmp_path):
    made_run(tmp_path, "OR", 0, [(0, 1), (1, 2)])
    ablate.main(["table", "--out", str(tmp_path), "--metrics", "NDCG@10, valid nll"])
    head = next(x for x in (tmp_path / "table.md").read_text().splitlines() if x.startswith("| plan"))
    assert head == "| plan | seeds | NDCG@10 | valid nll | NDCG@10 - all-OR | nll - all-OR |"
    with pytest.raises(InputError, match="--metrics NDCG is none of HR@1"):
        ablate.main(["table", "--out", str(tmp_path), "--metrics", "NDCG"])


def test_table_of_trained_runs(runs, shop):
    """The numbers of the table are those that train.py and baselines.py themselves reported."""
    argv = "--core 0 --hidden 4 --dropout 0 --epochs 1 --seeds 2".split()
    baselines.main(["--data", str(shop), "--out", str(runs.parent), *argv])
    ablate.main(["table", "--out", str(runs)])
    (made,) = json.loads((runs / "table.json").read_text())["tables"]
    row = made["rows"][-1]
    assert row["name"] == "IN:1 CR:1" and row["seeds"] == [0, 1]
    reported = json.loads((runs.parent / "baselines-shop-time.json").read_text())
    assert made["rows"][1]["name"] == "SASRec" and made["rows"][1]["seeds"] == [0, 1]
    results = [json.loads((runs / f"shop-IN1_CR1-s{s}/results-test.json").read_text()) for s in (0, 1)]
    for name in ablate.NAMES:
        assert row["metrics"][name]["mean"] == pytest.approx(np.mean([r["model"][name] for r in results]))
        assert made["rows"][0]["metrics"][name]["mean"] == pytest.approx(results[0]["popularity"][name])
        assert made["rows"][1]["metrics"][name]["mean"] == pytest.approx(reported["SASRec"][name])


def test_table_of_targets_seen(runs):
    """Rare and frequent targets apart: together they are all windows, each against a count by hand."""
    place = runs / "shop-OR-s0"
    d = evaluation.load_data(place, json.loads((place / "config.json").read_text()))
    predictions = [json.loads(line) for line in (place / "predictions-test.jsonl").read_text().splitlines()]
    n = [sum(s.count(i) for s in d.sequences) for i in range(len(d.ids))]
    middle = statistics.median_high(n[p["target"]] for p in predictions)
    ranges = {f"0-{middle - 1}": range(middle), f"{middle}": (middle,), f"{middle + 1}+": range(middle + 1, 999)}
    total = 0
    for seen, counts in ranges.items():
        own = [p for p in predictions if n[p["target"]] in counts]
        ablate.main(["table", "--out", str(runs), "--seen", seen])
        (made,) = json.loads((runs / "table.json").read_text())["tables"]
        total += made["n"]
        assert made["n"] == len(own) > 0
        rows = {r["name"]: {k: v["mean"] for k, v in r["metrics"].items()} for r in made["rows"]}
        one = ablate.read_run(place, seen, {})["metrics"]
        assert one["HR@10"] == pytest.approx(statistics.mean(by_hand(p, 10)[0] for p in own))
        assert one["nll"] == pytest.approx(statistics.mean(p["nll"] for p in own))
        lists = [{"target": p["target"], "items": [[i] for i in range(len(n))], "scores": n} for p in own]
        assert rows["popularity"]["HR@10"] == pytest.approx(statistics.mean(by_hand(p, 10)[0] for p in lists))
        head = f"{len(own)} test windows, of targets that occur {seen} times in training"
        assert head in (runs / "table.md").read_text()
    assert total == len(predictions)
    for seen, message in (("often", "--seen often: give a number"), ("7-", "give a number"), ("999", "no test window")):
        with pytest.raises(InputError, match=message):
            ablate.main(["table", "--out", str(runs), "--seen", seen])


def test_interval_by_hand(monkeypatch):
    """The same draws, one resample and one user after the other; in one piece or in many."""
    rng = np.random.default_rng(3)
    user = rng.permutation(np.repeat(np.arange(12), 1 + np.arange(12) % 4)) * 7 + 100
    x = rng.normal(size=len(user))
    draws, means = np.random.default_rng(0).integers(0, 12, (50, 12)), []
    for draw in draws:
        values = [v for u in draw for v in x[user == sorted(set(user))[u]]]
        means.append(sum(values) / len(values))
    assert interval(x, user, 50) == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=1e-12)


def test_interval_is_repeatable_and_of_users():
    rng = np.random.default_rng(0)
    x, user = rng.normal(size=200), np.arange(200)
    assert interval(x, user) == interval(x, user)
    assert interval(x, user) != interval(x, user, seed=1)
    # four equal windows of a user tell no more than one: windows drawn one by one would halve the interval
    assert interval(np.repeat(x, 4), np.repeat(user, 4)) == pytest.approx(interval(x, user), abs=1e-12)
    assert interval(np.full(5, 0.25), np.arange(5)) == [0.25, 0.25]


def test_interval_contains_the_truth():
    """In about 95 of 100 samples of known mean, neither always nor seldom; users of several windows that resemble."""
    rng, inside, wide = np.random.default_rng(0), 0, []
    for _ in range(200):
        user = np.repeat(np.arange(80), rng.integers(1, 4, 80))
        x = 0.3 + rng.normal(size=80)[user] + 0.5 * rng.normal(size=len(user))
        low, high = interval(x, user, 400)
        inside += low <= 0.3 <= high
        wide.append(high - low)
    assert 180 <= inside <= 198 and 0.35 < np.mean(wide) < 0.6


# --- attention ------------------------------------------------------------------------------------------------------

HISTORIES = [[0, 3], [1], [2, 0, 3]]
TITLES = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]  # token ids


def coded_texts() -> list[dict]:
    """Texts as data.encode lays them out, of different lengths: context, titles, header, the target's title."""
    out = []
    for h in HISTORIES:
        tokens, item = [1, 2], [0, 0]
        for k, i in enumerate(h, 1):
            tokens, item = tokens + TITLES[i] + [3], item + [k] * len(TITLES[i]) + [0]
        tokens, item = tokens + [4], item + [0]
        at = np.arange(len(tokens) - 1, len(tokens) + 2)
        tokens, item = tokens + TITLES[2], item + [len(h) + 1] * 2
        zero = np.zeros(len(tokens), int)
        text = {"tokens": np.array(tokens), "item": np.array(item), "branch": zero, "fork": zero}
        out.append(text | {"at": at, "next": zero[:3], "node": zero[:3]})
    return out


def allowed(kind: str, item, q: int, k: int) -> bool:
    a, b = item[q], item[k]
    hidden = {
        "OR": False,
        "IN": a > 0 and b > 0 and a != b,
        "IN-closed": a != b,
        "CR": a > 0 and a == b and q != k,
    }
    return k <= q and not hidden[kind]


@torch.no_grad()
def shares_by_hand(model: Llama, coded: list[dict]) -> torch.Tensor:
    """Query by query and head by head, text by text without padding, the softmax in float64."""
    total, n = np.zeros((len(model.layers), 3, 4)), np.zeros(3)
    for c in coded:
        item, lay = c["item"], layout(torch.tensor(c["item"])[None])
        x = model.embed_tokens(torch.tensor(c["tokens"])[None])
        target = max(item)
        groups = [0 if t == min(c["at"]) else 1 if i == target else 2 if i else None for t, i in enumerate(item)]
        for layer, block in enumerate(model.layers):
            q, k = block.self_attn.qk(block.input_layernorm(x), model.rope(lay.pos))
            q, k = q[0].double().numpy(), k[0].double().numpy()
            for t, g in enumerate(groups):
                if g is None:
                    continue
                n[g] += layer == 0
                keys = [j for j in range(len(item)) if allowed(block.kind, item, t, j)]
                for h in range(len(q)):
                    kv = k[h * len(k) // len(q)]
                    w = np.exp([q[h, t] @ kv[j] / np.sqrt(q.shape[2]) for j in keys])
                    for j, p in zip(keys, w / w.sum(), strict=True):
                        if item[j]:
                            part = 0 if item[j] == item[t] else 1
                        else:
                            part = 3 if j == 0 else 2
                        total[layer, g, part] += p / len(q)
            x = block(x, model.rope(lay.pos), lay, None)
    return torch.from_numpy(total / n[:, None])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("budget", [1, 10_000])
def test_shares_by_hand(plan, budget):
    """One text a forward, or all in one with padding."""
    model = tiny_model(plan)
    got = shares(model, coded_texts(), budget)
    assert got.shape == (4, len(GROUPS), len(PARTS))
    assert_close(got, shares_by_hand(model, coded_texts()), rtol=0, atol=1e-6)
    assert_close(got.sum(-1), torch.ones(4, 3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_looks_equals_transformers():
    """Head by key head, scale, rotation: the attention that transformers returns."""
    c = tiny_config()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, attn_implementation="eager", rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
    )  # fmt: skip
    hf, model = spread(LlamaForCausalLM(config)).eval(), Llama(c)
    tensors = {llama.hf_name(n): p for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in hf.named_parameters():
            tensors[name].copy_(p)
        tokens = torch.randint(VOCAB, (2, 12))
        want, lay = hf(tokens, output_attentions=True).attentions, layout(torch.zeros_like(tokens))
        x = model.embed_tokens(tokens)
        for block, a in zip(model.layers, want, strict=True):
            assert_close(ablate.looks(block, x, model.rope(lay.pos), lay.mask("OR")), a.mean(1), rtol=0, atol=1e-5)
            x = block(x, model.rope(lay.pos), lay, None)


def test_what_a_plan_forbids_is_exactly_zero():
    share = shares(tiny_model("IN:1 OR:1 CR:1 IN-closed:1"), coded_texts())
    within, across = share[..., 0], share[..., 1]
    assert (across[0, 1:] == 0).all() and (within[0, 1:] > 0).all() and across[0, 0] > 0  # IN; its context is open
    assert (share[1, 1:] > 0).all()  # OR
    assert (share[3, 1:, 1:] == 0).all() and (share[3, 0, :2] == 0).all()  # IN-closed
    assert (within[:, 0] == 0).all()  # nothing is the header's own item
    model = tiny_model("CR")
    c = coded_texts()[0]
    item, lay = c["item"], layout(torch.tensor(c["item"])[None])
    a = ablate.looks(model.layers[0], model.embed_tokens(torch.tensor(c["tokens"])[None]), model.rope(lay.pos),
                     lay.mask("CR"))[0]  # fmt: skip
    itself = a.diagonal()[torch.tensor((item > 0) & (item < item.max()))].mean()  # CR: of its own item only itself
    assert_close(shares(model, [c])[0, 2, 0].float(), itself, rtol=0, atol=1e-6)


def test_parts_are_a_partition():
    item = torch.tensor([[0, 1, 1, 0, 2, 3], [0, 0, 1, 2, -1, -1]])
    assert (parts_of(item).sum(0) == (item >= 0)[:, None, :]).all()


def test_attention_command(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    out = runs / "shop-IN1_CR1-s0"
    argv = ["attention", "--out", str(out), "--users", "5", "--tokens", "200"]
    ablate.main([*argv, "--plot", str(tmp_path / "deep/looks.png")])
    assert (tmp_path / "deep/looks.png").read_bytes().startswith(b"\x89PNG")
    shown, saved = capsys.readouterr().out, json.loads((out / "attention.json").read_text())
    (m,) = saved["models"]
    assert m["layers"] == ["IN", "CR"] and saved["n"] == 5
    model, cat, d, _ = evaluation.load_run(out)
    at = sorted(np.random.default_rng(0).permutation(len(d.test))[:5])
    coded = [data.encode(cat, e, False) for e in data.window_examples(d.test[at])]
    assert_close(torch.tensor(m["share"], dtype=torch.float64), shares_by_hand(model, coded), rtol=0, atol=1e-5)
    numbers = [[float(x) for x in line.split()[2:]] for line in shown.splitlines() if re.match(r" *\d+ (IN|CR)", line)]
    assert_close(torch.tensor(numbers), torch.tensor(m["share"]).flatten(1), rtol=0, atol=6e-4)
    with pytest.raises(InputError, match="trained from scratch"):
        ablate.main([*argv, "--base"])
    with pytest.raises(InputError, match="cannot be written"):
        ablate.main([*argv, "--plot", str(tmp_path / "looks.nosuch")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        ablate.main([*argv, "--plot", str(tmp_path / "looks.png")])
    with pytest.raises(InputError, match="above 0"):
        ablate.main([*argv[:-4], "--users", "0"])


def test_attention_of_the_base(shop, tmp_path, capsys):
    """A LoRA run beside its base: untuned under all-OR and under the run's plan, tuned with its adapters merged."""
    d = data.load(str(shop), k=0)
    tokenizer = data.train_tokenizer(d.titles)
    base = spread(Llama(Config(**SMALL, vocab_size=tokenizer.get_vocab_size())))
    llama.save(base, tmp_path / "base")
    tokenizer.save(str(tmp_path / "base/tokenizer.json"))
    argv = ["--data", str(shop), "--model", str(tmp_path / "base"), "--plans", "IN:1 OR", "--lr", "0.1"]
    ablate.main(["run", *argv, "--out", str(tmp_path / "out"), *STEPS])
    out = tmp_path / "out/shop-IN1_OR-s0"
    ablate.main(["attention", "--out", str(out), "--users", "4", "--base", "--dtype", "float32"])
    trained, plain, planned = json.loads((out / "attention.json").read_text())["models"]
    assert (plain["layers"], planned["layers"], trained["layers"]) == (["OR", "OR"], ["IN", "OR"], ["IN", "OR"])
    cat = data.Catalogue(d.titles, tokenizer, 0)
    at = sorted(np.random.default_rng(0).permutation(len(d.test))[:4])
    coded = [data.encode(cat, e, False) for e in data.window_examples(d.test[at])]
    for plan, found in (("OR", plain), ("IN:1 OR", planned)):
        want = shares_by_hand(llama.load(tmp_path / "base", plan), coded)
        assert_close(torch.tensor(found["share"], dtype=torch.float64), want, rtol=0, atol=1e-5)
    assert not torch.allclose(torch.tensor(trained["share"]), torch.tensor(planned["share"]), atol=1e-4)
    assert capsys.readouterr().out.count("across / within") == 3


# --- curves ---------------------------------------------------------------------------------------------------------


def test_curves(runs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(ablate, "save", lambda fig, path, save=ablate.save: (drawn.append(fig), save(fig, path)))
    one = runs / "shop-OR-s0"
    for out, n in ((f"{one},{runs / 'shop-OR-s1'}", 2), (str(runs), 4), (str(one), 1)):
        ablate.main(["curves", "--out", out, "--plot", str(tmp_path / "curves.png")])
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        loss, valid, ndcg = (ax.get_lines() for ax in drawn[-1].axes)
        assert len(loss) == len(valid) == len(ndcg) == n
    log = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert valid[0].get_xydata().tolist() == [[m["step"], m["valid_nll"]] for m in log] and len(log) == 2
    assert loss[0].get_ydata().tolist() == [m["loss"] for m in log]
    assert ndcg[0].get_ydata().tolist() == [m["valid_NDCG@10"] for m in log]
    with pytest.raises(InputError, match="no metrics.jsonl"):
        ablate.main(["curves", "--out", str(tmp_path), "--plot", str(tmp_path / "x.png")])
