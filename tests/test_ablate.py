"""extras/ablate.py: what is run, and what is not run again; the table and attention against what they mean."""

import base64
import bz2
import itertools
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLANS, REPO, refuses, spread, tiny_model
from test_hatllm import may_look
from torch.testing import assert_close

import data
import train
from eval import NAMES, Recommender, load_run, newest
from extras import ablate
from extras.ablate import read_lines
from hatllm import TARGET, InputError, layout
from model import Config, Llama, load, read_json, rope, save, write_json

SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
TINY = train.TINY
STEPS = "--max_steps 4 --eval_every 2 --batch 8 --core 0 --dtype float32".split()


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TINY", SMALL)
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A made data set: 30 items, 40 users, some with several windows."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    letters = [chr(65 + i % 26) for i in range(30)]  # four titles are borne by two items
    lines = ["item_id\ttitle", *(f"i{i}\t{'red' if i % 2 else 'blue'} {x}" for i, x in enumerate(letters))]
    (folder / "items.tsv").write_text("\n".join(lines))
    lines = ["user_id\titem_ids\ttimes"]
    for u in range(40):
        times = sorted(rng.sample(range(1000), rng.randint(3, 13)))
        lines.append(f"u{u}\t{' '.join(f'i{rng.randrange(30)}' for _ in times)}\t{' '.join(map(str, times))}")
    (folder / "sequences.tsv").write_text("\n".join(lines))
    return folder.rename(folder.with_name("shop"))


@pytest.fixture(scope="module")
def runs(shop, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert ablate.main(["run", "--data", str(shop), "--plans", "OR;IN:1 CR:1", "--out", str(out), *STEPS])
    return out


def tables(out, *argv) -> list[dict]:
    assert ablate.main(["table", "--out", str(out), *argv])
    return read_json(Path(out) / f"{'-'.join(['table', *argv]).replace('--', '')}.json")["tables"]


def test_what_is_run(monkeypatch, tmp_path):
    """All of seed 0 first; what is not ablate's goes to train.py, values and all."""
    calls = []
    monkeypatch.setattr(ablate, "once", lambda place, argv: calls.append((place, argv)) or len(calls) < 8)
    for argv, message in (
        ("--max_stepss=3", "--max_stepss"),
        ("--resume", "--resume"),
        ("--plans=OR;XX:1", "'XX'"),
        ("--plan=OR", "--plans"),
        ("--seed=1", "--seeds"),
    ):
        with refuses(message):  # before the first run, not in every run
            ablate.main(["run", argv])
    argv = ["--data", "a,b/c", "--lr", "0.01", "--seeds", "0,1", "--compile", "--plans", "OR; IN:1  CR:1 ;"]
    assert not ablate.main(["run", *argv, "--out", str(tmp_path)])
    names = [f"{d}-{p}-s{s}" for s in (0, 1) for d in ("a", "c") for p in ("OR", "IN1_CR1")]
    assert [place for place, _ in calls] == [tmp_path / name for name in names]
    args = train.resolve(train.make_parser().parse_args(calls[-1][1]))
    assert (args.data, args.plan, args.seed, args.lr, args.compile) == ("b/c", "IN:1 CR:1", 1, 0.01, True)


def test_finished_runs_are_not_trained_again(runs, shop, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs / "shop-OR-s0", tmp_path / "shop-OR-s0")
    argv = ["run", "--data", str(shop), "--plans", "OR", "--out", str(tmp_path), *STEPS]
    other = shutil.copytree(shop, tmp_path / "other/shop")
    (other / "items.tsv").write_text((other / "items.tsv").read_text().replace("red", "green"))
    monkeypatch.setattr(train, "train_and_test", lambda args: pytest.fail("trained again"))
    assert ablate.main(argv) and "finished already" in capsys.readouterr().out
    for more, message in (("--lr=0.1", "lr was 0.001, now it is 0.1"), (f"--data={other}", "digest was")):
        with pytest.raises(InputError, match=f"1 of 1 runs failed(.|\n)*{message}"):  # another experiment
            ablate.main([*argv, more])


def test_stopped_and_resumed(runs, shop, tmp_path, monkeypatch):
    """Ctrl-C ends the whole command, and the next one ends as if nothing had been."""
    argv, update = ["run", "--data", str(shop), "--out", str(tmp_path), *STEPS, "--plans"], train.update
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", lambda *args: (signal.raise_signal(signal.SIGTERM), update(*args))[1])
        assert not ablate.main([*argv, "OR;CR"])
    assert [p.name for p in tmp_path.iterdir()] == ["shop-OR-s0"]
    with pytest.raises(InputError, match="lr was 0.001, now it is 0.1"):
        ablate.main([*argv, "OR", "--lr=0.1"])
    assert ablate.main([*argv, "OR"])
    assert len({(out / "shop-OR-s0/predictions-test.jsonl").read_text() for out in (tmp_path, runs)}) == 1


def test_a_failed_run_does_not_stop_the_others(shop, tmp_path):
    argv = ["--data", f"nowhere,{shop}", "--plans", "OR", "--out", str(tmp_path), "--eval_limit", "5", *STEPS]
    with pytest.raises(InputError, match="1 of 2 runs failed(.|\n)*nowhere-OR-s0: --data nowhere"):
        ablate.main(["run", *argv])
    assert "5 test windows" in (tmp_path / "table.md").read_text()


def made_run(out, plan: str, seed: int, windows: list[tuple[str, str]], flags="", **more) -> np.ndarray:
    """A run's folder with random predictions -> (2, N) NDCG@10 and nll."""
    rng, place = np.random.default_rng(seed + len(plan)), out / f"{train.slug(plan)}-s{seed}"
    argv = ["--data", "x/shop", "--plan", plan, "--seed", str(seed), "--max_steps", "7", *flags.split()]
    config = vars(train.resolve(train.make_parser().parse_args(argv))) | {"base": "", "base_source": "", "steps": 7}
    config |= {"digest": "d", "base_digest": "", "constants": {"TAU": train.TAU, "PROMPT": [*data.PROMPT]}} | more
    items, nll = [[f"i{i}" for i in rng.permutation(25)[:12]] for _ in windows], rng.random(len(windows)) * 9
    seen = [n % 7 for n in range(25)]  # how often i0, i1 ... occur in training
    popular = {f"i{i}": (n, sum(m > n for m in seen), seen.count(n)) for i, n in enumerate(seen)}
    lines = zip(windows, items, nll, strict=True)
    lines = [{"user": u, "target": t, "items": [[i] for i in x], "nll": v} for (u, t), x, v in lines]
    lines = [x | {"seen": popular[x["target"]][0], "popularity": popular[x["target"]][1:]} for x in lines]
    place.mkdir(parents=True)
    write_json(place / "predictions-test.jsonl", [x | {"scores": [*range(12, 0, -1)]} for x in lines])
    log = [{"step": 5 + i, "loss": 1.0, "valid_nll": 5.0 + x + seed} for i, x in enumerate((1, 0, 2))]
    write_json(place / "metrics.jsonl", [line | {"valid_NDCG@10": 0.1} for line in log])
    write_json(place / "config.json", config)
    write_json(place / "results-test.json", {"model": {}})
    ndcg = [1 / np.log2(2 + x.index(t)) if t in x[:10] else 0 for (_, t), x in zip(windows, items, strict=True)]
    return np.array([ndcg, nll.round(3)])


def test_table_by_hand(tmp_path, monkeypatch):
    """The baseline is known by its data, whatever they were called, and stands once."""
    out, rng = tmp_path / "ablate", random.Random(1)
    windows = [(f"u{u}", f"i{rng.randrange(25)}") for u in range(30) for _ in range(1 + u % 3)]
    plain, other = (np.stack([made_run(out, p, s, windows) for s in (0, 1)]) for p in ("OR", "IN OR:1"))  # (2, 2, N)
    made_run(out, "CR", 5, windows)  # no seed in common with OR
    b = {
        "flags": {"history": 10, "exclude_history": False},
        "popularity": {"n": 70},
        "runs": [{"test": dict.fromkeys(NAMES, v)} for v in (0.2, 0.4)],
    }
    for folder, split, digest in (
        (tmp_path, "time", "d"),
        (tmp_path, "loo", "another split"),
        (out, "time", "other data"),
    ):
        write_json(folder / f"baselines-store-{split}.json", b | {"digest": digest})
    monkeypatch.chdir(out)
    (made,) = tables(".")
    assert made["n"] == len(windows) == 60
    assert [r["name"] for r in made["rows"]] == ["popularity", "SASRec (on 70 windows)", "OR", "CR", "IN OR:1"]
    rows, text = {r["name"]: r for r in made["rows"]}, (out / "table.md").read_text()
    assert rows["OR"]["metrics"]["valid_nll"] == {"mean": 5.5, "std": pytest.approx(0.5**0.5)}  # of the best step
    assert rows["CR"]["metrics"]["HR@1"]["std"] is None and "| 0.3000 ± 0.1414 |" in text
    assert rows["CR"]["difference"] == rows["OR"]["difference"] == {"NDCG@10": None, "nll": None}
    for at, name in enumerate(("NDCG@10", "nll")):
        (a, b), difference = plain[:, at].mean(1), (other - plain)[:, at].mean(0)
        assert rows["OR"]["metrics"][name] == pytest.approx({"mean": (a + b) / 2, "std": abs(a - b) / 2**0.5})
        low, high = ablate.interval(difference, [u for u, _ in windows])
        found = rows["IN OR:1"]["difference"][name]
        assert [found["mean"], found["low"], found["high"]] == pytest.approx([difference.mean(), low, high])
        c, d = (other - plain)[:, at].mean(1)
        assert found["seeds"] == [0, 1] and found["std"] == pytest.approx(abs(c - d) / 2**0.5)
        assert f"| {difference.mean():+.4f} ± {found['std']:.4f} [{low:+.4f}, {high:+.4f}] |" in text
    own = [{6: 1, 5: 2 / 3}.get(int(t[1:]) % 7, 0) for _, t in windows]  # 3 items occur 6 times, 3 occur 5 times
    assert rows["popularity"]["metrics"]["HR@5"]["mean"] == pytest.approx(np.mean(own))


def test_other_settings_get_a_table_of_their_own(tmp_path):
    windows = [("u0", "i1"), ("u1", "i2")]
    made_run(tmp_path, "OR", 0, windows)
    made_run(tmp_path, "IN", 0, windows, "--model a/b --lr 0.5 --tokens 7", base="w/b", base_source="another model")
    made_run(tmp_path, "CR", 0, [("u0", "i3")], digest="changed")
    made_run(tmp_path, "CR OR:1", 0, windows, constants={"TAU": 2.5})
    own = {"base": "w/b", "base_source": "w/b"}
    made_run(tmp_path, "OR:1 IN", 0, windows, f"--model a/b --lora 0 --lr {train.RATES['lora']}", **own)
    made_run(tmp_path, "OR:2 IN", 0, windows, "--model a/b --lora 0", **own)  # its rate is the usual one
    tiny, b = "shop, tiny --max_steps 7", "shop, b --lora 0"
    titles = ["shop, b (another model) --lr 0.5 --max_steps 7", f"{b} --lr 0.0003 --max_steps 7", f"{b} --max_steps 7"]
    titles += [tiny, tiny, f"{tiny} TAU = 2.5"]
    assert [t["setting"] for t in tables(tmp_path)] == titles and titles[0] in (tmp_path / "table.md").read_text()
    (made,) = tables(tmp_path, "--seen", "3", "3")  # the others have no such targets
    assert [r["name"] for r in made["rows"]] == ["popularity", "CR"]
    made_run(tmp_path, "IN OR:1", 0, [("u0", "i1"), ("u1", "i3")])
    with refuses("different windows"):
        tables(tmp_path)
    (tmp_path / "IN-s0/predictions-test.jsonl").write_text('{"user": 0, ')
    with refuses("predictions-test.jsonl: cannot be read"):
        tables(tmp_path)


def test_a_run_that_is_not_at_its_end_is_left_out(tmp_path):
    """Catches a half-trained model in the table, and a run that is counted twice."""
    for plan in ("OR", "IN", "CR"):
        made_run(tmp_path, plan, 0, [("u0", "i1")])
    log = (tmp_path / "CR-s0/metrics.jsonl").read_text().splitlines()[:2]  # of three
    (tmp_path / "CR-s0/metrics.jsonl").write_text("\n".join(log))
    assert [row["name"] for row in tables(tmp_path)[0]["rows"]] == ["popularity", "OR", "IN"]
    shutil.copytree(tmp_path / "IN-s0", tmp_path / "copy")
    with refuses("IN-s0 and", "copy have one plan"):
        tables(tmp_path)


def test_table_of_trained_runs(runs):
    """The numbers are those that train.py reported; rare and frequent targets apart, against a count by hand."""
    popular, _, masked = tables(runs)[0]["rows"]
    result, place = read_json(runs / "shop-IN1_CR1-s0/results-test.json"), runs / "shop-OR-s0"
    for row, want in ((popular, result["popularity"]), (masked, result["model"])):
        assert [row["metrics"][name]["mean"] for name in NAMES] == pytest.approx([want[name] for name in NAMES])
    d, predictions = load_run(place)[2], read_lines(place / "predictions-test.jsonl")
    n = {x: sum(s.count(i) for s in d.sequences) for i, x in enumerate(d.ids)}
    for low, high in ((0, least := min(n[p["target"]] for p in predictions)), (least + 1, 999)):
        own = [p for p in predictions if low <= n[p["target"]] <= high]
        (made,) = tables(runs, "--seen", str(low), str(high))
        assert made["n"] == len(own) > 0 and f"targets that occur {low} to {high} times" in made["setting"]
        assert made["rows"][1]["metrics"]["nll"]["mean"] == pytest.approx(np.mean([p["nll"] for p in own]), abs=5e-4)
        more, same = (np.array([f([*n.values()], n[p["target"]]).sum() for p in own]) for f in (np.greater, np.equal))
        want = np.clip((10 - more) / same, 0, 1).mean()
        assert made["rows"][0]["metrics"]["HR@10"]["mean"] == pytest.approx(want)
    with refuses("no finished run", "such targets"):
        tables(runs, "--seen", "999", "999")


def test_what_is_kept_makes_the_same_table(runs, shop, tmp_path):
    """Each digit, where runs and data are out of reach; nothing of the machine, of users and of items is in it."""
    kept, places = tmp_path / "kept", [runs / f"shop-{name}-s0" for name in ("OR", "IN1_CR1")]
    kept.mkdir()
    argv = ["keep", *map(str, places), "--to", str(kept), "--note", "commit 1a2b3c4, a laptop"]
    assert ablate.main(argv)
    *files, common = sorted(kept.iterdir())
    assert [file.name for file in files] == ["shop-IN1_CR1-s0.run.json", "shop-OR-s0.run.json"]
    assert common.match("windows-*.bz2")  # of both, since they were tested on the same
    least = min(p["seen"] for p in read_lines(places[0] / "predictions-test.jsonl"))
    for more in ([], ["--seen", "0", str(least)], ["--seen", str(least + 1), "99"]):
        made = tables(kept, *more)
        assert made[0].pop("notes") == ["commit 1a2b3c4, a laptop"]
        want = tables(runs, *more)
        assert want[0].pop("notes") == [] and made == want
    made, want = ({p.name: p.read_text() for p in folder.glob("table*.md")} for folder in (kept, runs))
    assert len(made) == 3  # the whole table is still there
    assert all(text.replace("; commit 1a2b3c4, a laptop", "") == want[name] for name, text in made.items())
    for file in files:
        r, c = read_json(file), read_json(runs / file.name.removesuffix(".run.json") / "config.json")
        assert r["config"] == c | {k: Path(c[k]).name for k in ("data", "data_folder", "out")}
        columns = base64.b64decode(r.pop("by_window")), common.read_bytes()
        text = str(r) + "".join(bz2.decompress(x).decode() for x in columns)
        assert file.stat().st_size < 8000 and not re.search(rf"[ui]\d|red|blue|{shop.parent}|{runs}", text)
    with refuses("shop-OR-s0.run.json exists"):
        ablate.main(argv)
    files[1].rename(other := tmp_path / "other")
    for wrong, what in ((tmp_path, "no finished run"), (places[0], "two runs"), (places[1], "exists")):
        with refuses(what):
            ablate.main(["keep", str(places[0]), str(wrong), "--to", str(kept), "--note", ""])
        assert not files[1].exists()  # all are checked first
    other.rename(files[1])
    with refuses(f"{tmp_path}: no finished run"):
        ablate.main(["keep", str(tmp_path), "--note", ""])
    write_json(files[0], read_json(files[0]) | {"windows": "others"})
    with refuses("different windows", *files):
        tables(kept)
    common.write_bytes(common.read_bytes()[:-9])
    with refuses(files[0], common.name):
        tables(kept)
    common.unlink()
    with refuses(files[0], common.name):
        tables(kept)
    files[0].write_text("<<<<<<< " + files[0].read_text())
    with refuses(files[0], "cannot be read"):
        tables(kept)


def test_the_table_of_the_docs(tmp_path, monkeypatch):
    """It is what the kept runs give, and their windows give what eval.py reported."""
    monkeypatch.setattr(train, "TINY", TINY)  # the title names what differs from train.py
    for file in (REPO / "docs/runs").glob("windows-*.bz2"):
        shutil.copy(file, tmp_path)
    for file in (REPO / "docs/runs").glob("*.run.json"):
        shutil.copy(file, tmp_path)
        found, want = ablate.read_row(file, 0, np.inf), read_json(file)["results"]
        for name, value in found["metrics"].items():  # a record has three digits of a window's nats
            assert value == pytest.approx(want.get(name, value), abs=5e-5 if name == "nll" else 1e-6)
        assert len(found["nll"]) == want["n"]
    tables(tmp_path)
    same = (tmp_path / "table.md").read_text() == (REPO / "docs/runs/table.md").read_text()
    assert same, "python -m extras.ablate table --out docs/runs makes it anew"


def test_interval_by_hand():
    """The same draws, one resample and one user after the other."""
    rng = np.random.default_rng(3)
    user = rng.permutation(np.repeat(np.arange(12), 1 + np.arange(12) % 4)) * 7 + 100
    x, means = rng.normal(size=len(user)), []
    for draw in np.random.default_rng(0).integers(0, 12, (50, 12)):
        values = [v for u in draw for v in x[user == sorted(set(user))[u]]]
        means.append(sum(values) / len(values))
    assert ablate.interval(x, user, 50) == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=1e-12)


@torch.no_grad()
def attention_by_hand(model: Llama, c: dict) -> np.ndarray:
    """(layers, T, T) of one text, query by query and head by head."""
    item, lay, T = c["item"], layout(torch.tensor(c["item"])[None]), len(c["item"])
    x, cos_sin = model.embed_tokens(torch.tensor(c["tokens"])[None]), rope(model.config, lay.pos)
    seen = np.zeros((len(model.layers), T, T))
    for layer, block in enumerate(model.layers):
        q, k, _ = (y[0].double().numpy() for y in block.self_attn.qkv(block.input_layernorm(x), cos_sin))
        for t, h in itertools.product(range(T), range(len(q))):
            keys = [j for j in range(t + 1) if may_look(block.kind, t, j, item, c["branch"], c["fork"])]
            w = np.exp([q[h, t] @ k[h * len(k) // len(q), j] / np.sqrt(q.shape[2]) for j in keys])
            seen[layer, t, keys] += w / w.sum() / len(q)
        x = block(x, cos_sin, lay)
    return seen


def shares_by_hand(model: Llama, coded: list[dict]) -> torch.Tensor:
    """Pair by pair, text by text without padding."""
    total, n = np.zeros((len(model.layers), 4, 4)), np.zeros(4)
    for c in coded:
        item, seen = c["item"], attention_by_hand(model, c)
        groups = [0 if t == c["at"][0] else 1 if i == max(item) else 2 if i else 3 for t, i in enumerate(item)]
        for t, g in enumerate(groups):  # group 3: context
            n[g] += 1
            for j in range(t + 1):
                part = (0 if item[j] == item[t] else 1) if item[j] else 2 if j else 3
                total[:, g, part] += seen[:, t, j]
    return torch.from_numpy(total / n[:, None])[:, :3]


@pytest.mark.parametrize("plan", PLANS)
def test_shares_and_looks_by_hand(runs, plan):
    _, cat, d, _ = load_run(runs / "shop-OR-s0")
    windows = [w._replace(history=w.history[:n]) for n, w in enumerate(d.train[:2], 1)]
    windows.append(d.train[2]._replace(history=[4, 5, 4]))  # an item twice: each place has its own share
    coded, model = [data.encode(cat, e, False) for e in data.window_examples(windows)], tiny_model(plan, vocab_size=400)
    want = shares_by_hand(model, coded)
    for budget in (1, 10_000):  # one text a forward, or all in one with padding
        assert_close(ablate.shares(model, cat, coded, budget), want, rtol=0, atol=1e-6)
    c, found = coded[-1], ablate.looks(model, cat, coded[-1])
    seen, title = attention_by_hand(model, c), np.flatnonzero(c["item"] == TARGET)
    assert list(found) == list(dict.fromkeys(model.plan))
    for kind, share in found.items():
        of_kind = seen[[k == kind for k in model.plan]].mean(0)  # (T, T)
        rows = of_kind[c["at"][0]], of_kind[title].mean(0)  # the header's last token; the title's
        want = [[row[c["item"] == k].sum() for k in (1, 2, 3)] for row in rows]
        assert_close(share, torch.tensor(want), rtol=0, atol=1e-6)
        assert kind not in ("IN", "IN-closed") or share[1].tolist() == [0, 0, 0]
        rest = [row[(c["item"] == 0) | (c["item"] == TARGET)].sum() for row in rows]
        assert_close(1 - share.sum(1), torch.tensor(rest), rtol=0, atol=1e-6)


def test_what_a_recommendation_looks_at(runs, tmp_path, capsys):
    """The best title's numbers are on the screen and in the picture, for titles typed by hand and for a user."""
    out, png = runs / "shop-IN1_CR1-s0", tmp_path / "looks.png"
    r = Recommender(out)
    user, window = next(iter(r.d.future.items()))
    titles = [r.d.titles[i] for i in window.history]
    assert ablate.main(["attention", "--out", str(out), "--recommend", *titles, "--plot", str(png)])
    shown = capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ablate.main(["attention", "--out", str(out), "--user", user])
    assert capsys.readouterr().out + f"drawn into {png}\n" == shown
    best = r.top_k([titles])[0]
    assert f"recommended: {best['titles'][0]} (score {best['scores'][0]:.3f})" in shown
    example = data.Example(window.history, [(len(titles), r.d.ids.index(best["items"][0][0]))])
    share = ablate.looks(r.model, r.cat, data.encode(r.cat, example, False))
    rows = [line for line in shown.splitlines() if line[0:1].isdigit()]  # first those of the header, then the title's
    assert len(rows) == 2 * len(titles) and max(word.count("#") for row in rows for word in row.split()) == 10
    for row, (g, n) in zip(rows, itertools.product((0, 1), range(len(titles))), strict=True):
        assert row.startswith(f"{n + 1} {titles[n]} ")
        assert re.findall(r"0\.\d{4}", row) == [f"{v[g, n]:.4f}" for v in share.values()]
    for argv, message in ((["--user", "nobody"], "nobody"), (["--user", user, "--users", "3"], "--users")):
        with refuses(message):
            ablate.main(["attention", "--out", str(out), *argv])
    lines = [("$", [0.5], ["1 pen $_$"])]  # dollars are no formula
    ablate.draw(png, {"a": lines, "b": lines}, 2)


def test_attention_and_its_base(runs, shop, tmp_path, capsys):
    """A LoRA run beside its base: untuned under all-OR and under the run's plan, tuned with its adapters merged."""
    base, out = tmp_path / "base", tmp_path / "shop-IN1_OR-s0"
    tokenizer = data.train_tokenizer(data.load(shop, k=0).titles)
    save(spread(Llama(Config(**SMALL, vocab_size=tokenizer.get_vocab_size(), eos_token_id=0))), base)
    tokenizer.save(str(base / "tokenizer.json"))
    write_json(base / "source.json", {"holds": "another model in 4 bits"})
    argv = ["--data", str(shop), "--model", str(base), "--plans", "IN:1 OR", "--lr", "0.1", "--out", str(tmp_path)]
    assert ablate.main(["run", *argv, *STEPS])
    assert "base (another model in 4 bits) --core 0" in capsys.readouterr().out
    base, png = str(base.rename(tmp_path / "moved")), out / "looks.png"
    assert ablate.main(["attention", "--out", str(out), "--users", "1", "--base", base, "--plot", str(png)])
    shown = capsys.readouterr().out
    assert (
        png.read_bytes().startswith(b"\x89PNG") and "another model in 4 bits" in shown and ", 1 test windows" in shown
    )
    tuned, cat, d, _ = load_run(out, base=base)
    some = [d.test[i] for i in sorted(np.random.default_rng(0).permutation(len(d.test))[:1])]
    coded = [data.encode(cat, e, False) for e in data.window_examples(some)]
    models = {"trained, plan IN:1 OR": tuned} | {f"base, plan {p}": load(base, p) for p in ("OR", "IN:1 OR")}
    for name, model in models.items():
        own = shown.partition(f"\n{name}\n")[2]
        assert all("".join(f"{v:9.3f}" for v in row) in own for row in ablate.shares(model, cat, coded).flatten(1))
    assert ablate.main(["attention", "--out", str(out), "--base", base, "--recommend", d.titles[3], "--plot", str(png)])
    shown = capsys.readouterr().out
    assert all(f"\n{name}: in the title\n" in shown for name in models)
    with refuses("trained from scratch"):
        ablate.main(["attention", "--out", str(runs / "shop-OR-s0"), "--base"])


def test_curves(runs, monkeypatch, capsys):
    drawn, one = [], runs / "shop-OR-s0"
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "draw", lambda path, panels, columns: drawn.append(panels))
        assert all(ablate.main(["curves", "--out", str(out), "--plot", "x.png"]) for out in (runs, one))
    assert [[len(lines) for lines in panels.values()] for panels in drawn] == [[2] * 3, [1] * 3]
    log = read_lines(one / "metrics.jsonl")
    for name, ((label, x, y),) in drawn[1].items():
        assert (label, x, y) == (str(one), [2, 4], [m[name] for m in log])
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with refuses("pip install matplotlib"):
        ablate.main(["curves", "--out", str(one), "--plot", "x.png"])
    capsys.readouterr()
    assert ablate.main(["curves", "--out", str(one)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    best = int(newest(one, "best").name.removeprefix("best-"))  # the checkpoint that train.py saved
    for row, m in zip(rows, log, strict=True):
        numbers = [f"{m[name]:.4f}" for name in ("loss", "valid_nll", "valid_NDCG@10")]
        assert row == [str(m["step"]), *numbers] + ["best"] * (m["step"] == best)
