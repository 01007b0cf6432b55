"""eval.py: metrics against their definition, predictions, and the command line on small runs of train.py."""

import io
import itertools
import json
import math
import shutil
import sys
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuses, tiny_model
from safetensors.torch import load_file, save_file
from test_train import command, files, lines, small_and_single, write_base, write_data  # noqa: F401

import data
import eval as ev
import train
from data import Catalogue, Dataset, Window
from decode import Decoder

TITLES = ["red pen", "red pencil", "red", "blue ink", "ink well", "paper", "paper clip", "glue", "red pen", "tape",
          "paper cut", "scissors", "stapler", "blue pen"]  # fmt: skip
SEQUENCES = [[0, 3, 5, 0], [8, 1, 2, 0, 5], [5, 5, 3], [13, 0]]
WINDOWS = [Window([0, 3], 5, "ann", 1.0), Window([8, 1, 2], 0, "bob", 2.0), Window([5], 5, "cy", 3.0),
           Window([4, 6, 7, 9, 10, 11, 12, 13, 1, 2], 8, "dee", 4.0)]  # fmt: skip
IDS = [f"i{n}" for n in range(len(TITLES))]


@cache
def world() -> tuple[Dataset, Catalogue, Decoder]:
    """A catalogue in which two items bear one title, a tiny model, windows."""
    d, tokenizer = Dataset(Path("x"), IDS, TITLES, TITLES, *[WINDOWS] * 3, SEQUENCES), data.train_tokenizer(TITLES)
    m = tiny_model("IN:1 OR:2 CR:1", vocab_size=tokenizer.get_vocab_size(), eos_token_id=0)
    cat = Catalogue(TITLES, tokenizer, m.config)
    return d, cat, Decoder(m, cat.trie)


def flags(text: str = ""):
    return ev.make_parser().parse_args(["--beam", "3", "--tokens", "300", *text.split()])


def truth(history: list[int]) -> list[float]:
    """Score of every item after a history: each title is asked for on its own."""
    _, cat, decoder = world()
    tokens, item, _ = data.collate_prompts(cat, [history] * len(TITLES))
    return decoder.search(tokens, item, target=cat.trie.leaf_of_item).target.tolist()


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Ranks 1, 3, 11 and not listed. A discount of log2(rank) in place of log2(rank + 1), or a rank that is one off,
    shows at once."""
    m = ev.metrics(np.array([0, 2, 10, np.inf]), np.ones(4))
    assert m == pytest.approx({"HR@1": 1 / 4, "HR@5": 2 / 4, "HR@10": 2 / 4, "NDCG@1": 1 / 4,
                               "NDCG@5": (1 + 0.5) / 4, "NDCG@10": (1 + 0.5) / 4})  # fmt: skip
    assert ev.metrics(np.array([9]), np.array([1]))["NDCG@10"] == pytest.approx(1 / math.log2(11))
    assert set(ev.metrics(np.array([]), np.array([])).values()) == {0.0}


@pytest.mark.parametrize("before, ties", [(b, t) for b in (0, 1, 3, 9, 10) for t in (1, 2, 4, 6)])
def test_ties_are_the_mean_over_their_orders(before, ties):
    """Where equal scores stand is chance: counting the target first (or last) flatters (or wrongs) a model that
    scores all alike."""
    ranks = np.array([before + 1 + order.index(0) for order in itertools.permutations(range(ties))])
    for k in (1, 2, 5, 10):
        assert ev.hits(np.array([before]), np.array([ties]), k)[0] == pytest.approx((ranks <= k).mean())
        gains = np.where(ranks <= k, 1 / np.log2(1 + ranks), 0)
        assert ev.gains(np.array([before]), np.array([ties]), k)[0] == pytest.approx(gains.mean())


def test_popularity_by_its_definition():
    """Counts of the training part, ranked against the whole catalogue, items of equal count tied."""
    d, flat = world()[0], [i for s in SEQUENCES for i in s]
    windows = [Window([0], target, "u", 0.0) for target in range(len(TITLES))]
    for target, before, ties in zip(range(len(TITLES)), *ev.popularity(d, windows), strict=True):
        assert before == sum(flat.count(i) > flat.count(target) for i in range(len(TITLES)))
        assert ties == sum(flat.count(i) == flat.count(target) for i in range(len(TITLES)))


def test_positions():
    """From the file alone: items of one title are tied, so are titles of one score; a group counts with all its
    items; a target that is not listed is nowhere."""
    items, scores = [[4], [7, 8], [1], [2, 3], [5]], [-1.0, -2.0, -3.0, -3.0, -4.0]
    want = {4: (0, 1), 7: (1, 2), 8: (1, 2), 1: (3, 3), 2: (3, 3), 3: (3, 3), 5: (6, 1), 9: (math.inf, 1)}
    before, ties = ev.positions([{"items": items, "scores": scores, "target": t} for t in want])
    assert list(zip(before, ties, strict=True)) == list(want.values())


def test_report_slices_add_up():
    """Every window is in one slice by popularity and in one by length, and their means make the whole's."""
    d, at = world()[0], (np.array([0, 2, 10, np.inf]), np.ones(4))
    r = ev.report(d, WINDOWS, *at)
    for kind in ("target seen", "history of"):
        parts = [s for name, s in r["slices"].items() if name.startswith(kind)]
        assert sum(s["n"] for s in parts) == r["n"] == 4
        assert all(sum(s["n"] * s[m] for s in parts) / 4 == pytest.approx(r[m]) for m in ("HR@10", "NDCG@5"))
    often = [i for i, n in enumerate((0, 1, 4, 5, 19, 20)) for _ in range(n)]
    many = Dataset(Path("x"), IDS, TITLES, TITLES, *[WINDOWS] * 3, [often])
    edges = [Window([0] * n, i, "u", 0.0) for i, n in enumerate((1, 4, 5, 5, 9, 9))]
    assert {n: s["n"] for n, s in ev.report(many, edges, np.zeros(6), np.ones(6))["slices"].items()} == {
        "target seen 0 times": 1, "target seen 1-4 times": 2, "target seen 5-19 times": 2, "target seen 20+ times": 1,
        "history of 1-4 items": 2, "history of 5+ items": 4}  # fmt: skip


def test_a_sample_of_windows():
    """Catches the first n, which are the oldest, and another draw or order in every call."""
    found = ev.sample([*range(100)], 20)
    assert found == sorted({*found}) == ev.sample([*range(100)], 20) and len(found) == 20 and found[-1] > 50
    assert ev.sample([*range(9)], 0) == [*range(9)]


# --- windows through the decoder ------------------------------------------------------------------------------------


def recommend(decoder, cat, histories, args, targets=()):
    return ev.recommend(decoder, cat, histories, args, targets, data.collate_prompts(cat, histories))


@pytest.mark.parametrize("exclude", ["", " --exclude_history"])
def test_recommend(exclude):
    """The k best titles by brute force, with all items that bear them. exclude leaves out the history's items, and
    these alone: not another item of the same title, nor any of the k places."""
    _, cat, decoder = world()
    histories = [w.history for w in WINDOWS]
    for k in (1, 4, 10, 30):
        found = recommend(decoder, cat, histories, flags(f"--k {k}{exclude}"))
        for history, p in zip(histories, found, strict=True):
            score, groups = truth(history), {}
            for i in sorted(set(range(len(TITLES))) - set(history if exclude else [])):
                groups.setdefault(TITLES[i], []).append(i)
            best = sorted(groups.values(), key=lambda g: -score[g[0]])[:k]
            assert p["items"] == best and p["exact"]
            assert p["scores"] == pytest.approx([score[g[0]] for g in best], abs=1e-4)


def test_a_beam_that_finds_too_few_titles_lists_no_others():
    """Catches a place without a title that shows the last one of the catalogue."""
    _, cat, decoder = world()
    for p in recommend(decoder, cat, [w.history for w in WINDOWS], flags("--beam 1 --patience 0")):
        every = sum(p["items"], [])
        assert len(p["items"]) < 10 and len({*every}) == len(every) and all(map(math.isfinite, p["scores"]))


def test_predictions_are_in_the_order_of_the_windows():
    """Batches are by length; a prediction at another window's place would be another user's. The ids and titles are
    the files' own."""
    d, cat, decoder = world()
    found = ev.predict(decoder, cat, d, WINDOWS, flags())
    assert json.loads(json.dumps(found)) == found  # no numpy numbers: they cannot be written
    for w, p in zip(WINDOWS, found, strict=True):
        assert (p["user"], p["history"], p["target"]) == (w.user, [f"i{i}" for i in w.history], f"i{w.target}")
        (one,), score = recommend(decoder, cat, [w.history], flags()), truth(w.history)
        assert p["items"] == [[f"i{i}" for i in g] for g in one["items"]]
        assert p["titles"] == [TITLES[g[0]] for g in one["items"]]
        assert p["scores"] == pytest.approx(one["scores"], abs=1e-4)
        assert p["nll"] == pytest.approx(-score[w.target], abs=1e-4)
    for w, before, listed in zip(WINDOWS, ev.positions(found)[0], found, strict=True):
        score = truth(w.history)
        others = sum(s > score[w.target] + 1e-4 for s in score)
        assert before == others if f"i{w.target}" in sum(listed["items"], []) else others >= 10


def test_too_large_a_batch_is_halved(monkeypatch):
    """Out of memory: the same predictions in smaller batches, and nothing of the failed batch is held meanwhile."""
    (_, cat, decoder), real, sizes, held = world(), Decoder.search, [], []
    histories, targets = [w.history for w in WINDOWS], [w.target for w in WINDOWS]
    expected = recommend(decoder, cat, histories, flags(), targets)

    def search(self, tokens, *rest, **more):
        sizes.append(len(tokens))
        assert not [ref for ref in held if ref() is not None]
        if len(tokens) > room:
            large = torch.zeros(9)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, *rest, **more)

    monkeypatch.setattr(Decoder, "search", search)
    room = 1
    found = recommend(decoder, cat, histories, flags(), targets)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    for a, b in zip(found, expected, strict=True):
        assert (a["items"], a["exact"]) == (b["items"], b["exact"]) and a["nll"] == pytest.approx(b["nll"])
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)
    room = 0
    with pytest.raises(torch.OutOfMemoryError):  # one user alone; run() makes a sentence of it
        recommend(decoder, cat, histories, flags())


def broken(token: int | None = None) -> Decoder:
    """A decoder whose model gives NaN: always, or after one token."""
    _, cat, decoder = world()
    m = tiny_model("OR", vocab_size=decoder.model.config.vocab_size, eos_token_id=0)
    (m.embed_tokens.weight.data if token else m.norm.weight.data)[token or slice(None)] = torch.nan
    return Decoder(m, cat.trie)


def test_scores_that_are_no_numbers_are_refused():
    """Catches lists of nothing that are called exact, and a branch that is not a number."""
    _, cat, _ = world()
    (red, *_) = cat.titles[0].tolist()  # titles that begin with it cannot be scored
    for decoder in (broken(), broken(red)):
        with refuses("not finite"):
            recommend(decoder, cat, [[5, 7]], flags())


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with data, a base, and runs: from scratch; adapters, and full tuning, of the base in bfloat16."""
    root = tmp_path_factory.mktemp("made")
    base = write_base(root / "base", write_data(root / "shop"))
    shown = dict(columns="title,brand", split="loo")
    train.main(command(root / "shop", root / "tiny", eval_limit=0, plan="IN-closed:1 OR CR:1", **shown))
    train.main(command(root / "shop", root / "lora", base, eval_limit=0, lora=4, dtype="bfloat16", max_steps=4))
    train.main(command(root / "shop", root / "full", base, eval_limit=0, lora=0, dtype="bfloat16", max_steps=1))
    return root


@pytest.fixture
def moved(made, tmp_path) -> Path:
    """A copy, to be spoilt, whose original cannot be found."""
    root = Path(shutil.copytree(made, tmp_path / "moved"))
    for name in ("tiny", "lora", "full"):
        path = root / name / "config.json"
        path.write_text(path.read_text().replace(str(made), "/nowhere"))
    return root


@pytest.mark.parametrize("name", ["tiny", "lora", "full"])
def test_validation_is_eval_on_the_validation_split(name, made):
    """One arithmetic: dtype, merged adapters, search. Catches a training that chooses its best by other numbers. With
    an item cache (tiny's plan) the sums are in another order."""
    ev.main(["--out", str(made / name), "--split", "valid"])
    result = json.loads((made / name / "results-valid.json").read_text())["model"]
    log = {line["step"]: line for line in lines(made / name / "metrics.jsonl")}
    best = log[int(ev.newest(made / name, "best").name[5:])]
    same = pytest.approx if name == "tiny" else lambda x, rel: x
    assert result["nll"] == same(best["valid_nll"], rel=1e-5)
    assert result["NDCG@10"] == same(best["valid_NDCG@10"], rel=1e-5)


@pytest.mark.parametrize("more, file", [
    ("", "test"), ("--score full", "test-scorefull"), ("--exclude_history", "test-exclude_historyTrue"),
    ("--limit 2 --split valid", "valid-limit2"), ("--patience 0", "test-patience0"), ("--limit 5", "test-limit5"),
    ("--beam 3 --k 12", "test-k12-beam3"),
])  # fmt: skip
def test_main_writes_what_it_prints(made, capsys, more, file):
    """results, the table, and the metrics of predictions are the same numbers; other settings have other files."""
    before = files(made / "tiny")
    ev.main(["--out", str(made / "tiny"), *more.split()])
    d, shown, now = ev.load_run(made / "tiny")[2], capsys.readouterr().out, files(made / "tiny")
    changed = {name for name in now if before.get(name) != now[name]}
    assert changed <= {f"results-{file}.json", f"predictions-{file}.jsonl"}
    windows = ev.sample(d.valid, 2) if "valid" in more else ev.sample(d.test, 5) if "limit" in more else d.test
    assert len(windows) == (2 if "valid" in more else 5 if "limit" in more else len(d.test))
    found, saved = lines(made / f"tiny/predictions-{file}.jsonl"), json.loads(now[f"results-{file}.json"])
    result = saved["model"]
    assert [(p["user"], p["target"]) for p in found] == [(w.user, d.ids[w.target]) for w in windows]
    again = ev.metrics(*ev.positions(found))
    assert {m: result[m] for m in again} == again and saved["popularity"] == ev.metrics(*ev.popularity(d, windows))
    assert saved["popularity"] == ev.metrics(*np.array([p["popularity"] for p in found]).T)
    assert [p["seen"] for p in found] == [sum(s.count(w.target) for s in d.sequences) for w in windows]
    line = next(x for x in shown.splitlines() if x.startswith("model"))
    assert line.split()[-6:] == [f"{result[m]:.4f}" for m in ev.NAMES]
    assert 0 < result["nll"] == pytest.approx(np.mean([p["nll"] for p in found]))
    assert f"{result['nll']:.4f} nats per item" in shown and f"exact for {result['exact']:.1%}" in shown
    assert result["exact"] == np.mean([p["exact"] for p in found])
    assert not any(i in p["history"] for p in found for g in p["items"] for i in g) or "exclude" not in more


def test_main_recommends(made, capsys):
    """Whatever the case, the last HISTORY titles; or the nearest titles are named."""
    out = ["--out", str(made / "tiny"), "--k", "3", "--recommend"]
    ev.main([*out, *["old paper"] * 9, "Red Pen", "old INK pot"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"after {'old paper | ' * 8}red pen | old ink pot" and len(shown) == 2 + 3
    scores = [float(line.split()[0]) for line in shown[2:]]
    assert scores == sorted(scores, reverse=True) and scores[0] < 0
    with refuses('no item is called "red pem"; near: "red pen"'):
        ev.main([*out, "red pem"])
    with refuses('"zzzz"; none is near'):
        ev.main([*out, "zzzz"])
    with refuses("HR@10 needs 10"):
        ev.main([*out[:4]])


def test_a_run_can_be_moved(moved, tmp_path, monkeypatch):
    """Evaluated from another directory, data and base beside it or given; what is missing is named with its flag."""
    monkeypatch.chdir(moved / "lora")
    expected = ev.load_run(str(moved / "lora"))[0].head
    for out in (Path("../lora"), "../lora", moved / "lora"):
        assert torch.equal(ev.load_run(out)[0].head, expected)
    ev.main(["--out", "../lora", "--limit", "2"])
    (moved / "shop").rename(tmp_path / "wares")
    with refuses("items.tsv", "--data"):
        ev.main(["--out", "../lora"])
    ev.main(["--out", "../lora", "--limit", "2", "--data", str(tmp_path / "wares")])
    (moved / "base").rename(tmp_path / "trunk")
    with refuses("config.json", "--base"):
        ev.main(["--out", "../lora", "--data", str(tmp_path / "wares")])
    given = ["--data", str(tmp_path / "wares"), "--base", str(tmp_path / "trunk")]
    ev.main(["--out", "../lora", "--limit", "2", *given])
    path = tmp_path / "trunk/model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(path).items()}, path)
    with refuses("is not the base", "lora"):
        ev.main(["--out", "../lora", *given])
    (tmp_path / "wares/items.tsv").write_text((tmp_path / "wares/items.tsv").read_text().replace("paper", "papyrus"))
    with refuses("is not the data", "lora"):
        ev.main(["--out", "../lora", *given])


@pytest.mark.parametrize("name, change", [("config", {"rope_theta": 7.0}), ("tokenizer", {"added_tokens": []})])
def test_a_base_with_another_config_or_tokenizer_is_another_base(name, change, moved):
    """Catches a fingerprint of the weights alone: another rope_theta computes other numbers."""
    path = moved / f"base/{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refuses("is not the base"):
        ev.load_run(moved / "lora")


def test_the_runs_own_plan_is_the_one_that_counts(moved):
    (path,) = (moved / "tiny").glob("best-*/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hatllm_plan": "OR"}))
    assert set(ev.load_run(moved / "tiny")[0].plan) != {"OR"}


def test_a_run_older_than_the_fingerprint_of_masks_is_read(moved):
    path = moved / "tiny/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "masks"}))
    ev.load_run(moved / "tiny")


@pytest.mark.parametrize("key, value", [("split", None), ("core", "5"), ("constants", 3), ("constants", {})])
def test_a_damaged_run_config_is_named(key, value, moved):
    path = moved / "tiny/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with refuses("config.json", key):
        ev.load_run(moved / "tiny")


@pytest.mark.parametrize("rank, size", [("1", "1"), ("3", "2"), ("0", "abc"), ("-1", "2")])
def test_processes_that_cannot_be(rank, size, monkeypatch):
    """Catches a lone process that believes to be the second one, and saves nothing."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, value)
    with refuses("torchrun"):
        ev.World()


def test_a_moved_run_can_be_evaluated_from_inside(moved, monkeypatch):
    """Its data beside it, or within it."""
    monkeypatch.chdir(moved / "tiny")
    ev.load_run(".")
    (moved / "shop").rename("shop")
    ev.load_run(".")


@pytest.mark.parametrize("loss, tau", [("msl", 0.5), ("lml", 1.0)])
def test_ranked_at_the_temperature_of_the_training(loss, tau):
    """Catches a run of lml, whose loss knows no TAU, that is ranked under one."""
    _, cat, decoder = world()
    assert ev.make_decoder(decoder.model, cat, {"constants": {"TAU": 0.5}, "loss": loss}).tau == tau


def test_the_newest_checkpoint_has_the_highest_number(tmp_path):
    """Catches an order by letters."""
    for n in (999_999, 1_000_000, 5):
        (tmp_path / f"step-{n:06d}").mkdir()
    assert ev.newest(tmp_path, "step").name == "step-1000000" and ev.newest(tmp_path, "best") is None


@pytest.mark.parametrize(
    "name, value", [("PROMPT", ("Bought: ", ", ", "; next: ")), ("HISTORY", 9), ("TEXT_TOKENS", 7)]
)
def test_what_data_py_said_in_training_must_hold(name, value, made, monkeypatch):
    before = getattr(data, name)
    monkeypatch.setattr(data, name, value)
    with refuses(f"{name} = {list(before) if name == 'PROMPT' else before!r}", "data.py"):
        ev.load_run(made / "tiny")


def test_main_on_what_is_no_run(moved, tmp_path):
    with refuses("no run of train.py"):
        ev.main(["--out", str(tmp_path / "none")])
    with refuses("model's folder", "train.py"):
        ev.main(["--out", str(moved / "base")])
    shutil.rmtree(ev.newest(moved / "tiny", "best"))
    with refuses("no checkpoint yet"):
        ev.main(["--out", str(moved / "tiny")])


def test_a_terminal_that_is_not_utf8(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    ev.run_main(lambda argv: print("Café"))
    assert b"Caf?" in sys.stdout.buffer.getvalue()


def test_a_missing_compiler_is_a_sentence():
    failure = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def main(argv):
        raise failure("no compiler\nmore")

    with pytest.raises(SystemExit, match="error: --compile does not work here .no compiler."):
        ev.run_main(main)
