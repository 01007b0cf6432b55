"""eval.py for people with a catalogue of their own: Recommender, --histories, --user, --only, --catalogue."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refuses
from test_train import command, files, lines, small_and_single, write_data  # noqa: F401
from tokenizers import normalizers

import data
import eval as ev
import train
from eval import Recommender
from hatllm import TARGET, layout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run; tests only read it."""
    root = tmp_path_factory.mktemp("made")
    train.main(command(write_data(root / "shop"), root / "run", eval_limit=9, max_steps=3, plan="IN-closed:1 OR CR:1"))
    return root / "run"


@pytest.fixture
def own(made, tmp_path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(made, tmp_path / "own"))


@pytest.fixture(scope="module")
def whole(made) -> Recommender:
    return Recommender(str(made))


def table(path: Path, *rows: str) -> str:
    path.write_text("\n".join(row.replace("|", "\t") for row in rows) + "\n")
    return str(path)


def catalogue(shop: Path, path: Path, **changes) -> str:
    """The data's items.tsv with other titles; None: the item is gone."""
    titles = {x: item.title for x, item in data.read_items(shop / "items.tsv").items()} | changes
    return table(path, "item_id|title", *(f"{x}|{t}" for x, t in titles.items() if t is not None))


def brute(r: Recommender, made: Path, history: list[str], candidates: dict[str, str]) -> dict[str, float]:
    """title -> log-probability, each in a forward pass of its own. A token is renormalised over those that continue
    some candidate's title (full: over all): neither trie nor cache."""
    tokens, item = (torch.from_numpy(x) for x in r.cat.prompt([r.d.ids.index(x) for x in history]))
    tokenizer = data.read_tokenizer(ev.newest(made, "best"))
    paths = {t: [*tokenizer.encode(t, add_special_tokens=False).ids, 0] for t in candidates.values()}
    tau = 1.0 if r.args.score == "full" else r.config["constants"]["TAU"]
    scores = {}
    for title, path in paths.items():
        text = torch.cat((tokens, torch.tensor(path[:-1], dtype=torch.long)))[None]
        kinds = torch.cat((item, torch.full((len(path) - 1,), TARGET)))[None]
        with torch.no_grad():
            z = r.model.logits(r.model(text, layout(kinds)))[0, len(tokens) - 1 :].float() / tau
        scores[title] = 0.0
        for n, token in enumerate(path):
            may = sorted({p[n] for p in paths.values() if p[:n] == path[:n]})
            among = z[n] if r.args.score == "full" else z[n, may]
            scores[title] += float(z[n, token] - among.logsumexp(0))
    return scores


def check(r: Recommender, made: Path, history: list[str], candidates: dict[str, str], k: int):
    """top_k is brute force over the candidates (id -> title)."""
    scores = brute(r, made, history, candidates)
    best = sorted(scores, key=scores.get, reverse=True)[:k]
    (p,) = r.top_k([history], k)
    assert p["titles"] == best and p["exact"] and p["history"] == history
    assert p["scores"] == pytest.approx([scores[t] for t in best], abs=1e-3)
    assert p["items"] == [[x for x, title in candidates.items() if title == t] for t in best]


# --- candidates -----------------------------------------------------------------------------------------------------


ONLY = ("i0", "i39", "i3", "i17", "i18", "i30", "i7", "i21")  # i0 and i39 share a title


@pytest.mark.parametrize("score", ["trie", "full"])
def test_only_is_brute_force_on_the_sub_catalogue(made, tmp_path, score):
    """Catches a list that is cut out of the full top K, and scores over titles that are no candidates. Items that are
    none stay in histories. Under full scores nothing is renormalised: the full ranking, filtered."""
    r = Recommender(made, only=table(tmp_path / "ids.txt", *ONLY), score=score)
    for k, history in ((1, ["i5"]), (3, ["i9", "i0", "i12"]), (40, ["i39", "i5"])):
        check(r, made, history, {x: r.d.titles[r.d.ids.index(x)] for x in sorted(ONLY, key=r.d.ids.index)}, k)
    if score == "full":
        (part,), (everything,) = (x.top_k([["i5", "i1"]], 40) for x in (r, Recommender(made, score="full")))
        kept = [n for n, ids in enumerate(everything["items"]) if set(ids) & set(ONLY)]
        assert part["titles"] == [everything["titles"][n] for n in kept]
        assert part["scores"] == pytest.approx([everything["scores"][n] for n in kept], abs=1e-4)


def test_one_candidate(made, tmp_path):
    r = Recommender(made, only=table(tmp_path / "ids.txt", " i3", "", "gone i7 i9"))  # an id a line, no words in it
    assert [p["items"] for p in r.top_k([["i5"], ["i3"]])] == [[["i3"]]] * 2


def test_a_newer_catalogue(made, whole, tmp_path, capsys):
    """i1 has another name, in prompts too; i2 is gone, but may stand in a history, under its old title; i90 is new."""
    path = catalogue(
        made.parent / "shop",
        tmp_path / "new.tsv",
        i1="green pencil",
        i2=None,
        i3="",
        i90="the old stapler",
        i91="red pen",
    )
    r = Recommender(made, catalogue=path)
    candidates = {x: t for x, t in zip(r.d.ids, r.d.titles, strict=True) if x not in ("i2", "i3")}
    assert candidates["i1"] == "green pencil" and set(candidates) == {
        x for x, item in data.read_items(Path(path)).items() if item.title
    }
    assert r.d.titles[2:4] == whole.d.titles[2:4] and r.d.test == whole.d.test
    for history in (["i2", "i1", "i90"], ["i3"]):
        check(r, made, history, candidates, 60)
    (p,) = r.top_k([["the OLD stapler", "blue pen"]])
    assert p["history"][0] == "i90"
    both = Recommender(made, catalogue=path, only=table(tmp_path / "ids.txt", "i90", "i1"))
    assert sorted(both.top_k([["i2"]])[0]["items"]) == [["i1"], ["i90"]]
    capsys.readouterr()
    one = Recommender(made, catalogue=path, only=table(tmp_path / "ids.txt", "i90", "i2", "gone"))
    assert one.top_k([["i2"]])[0]["items"] == [["i90"]] and "1 of its 3 ids are among the" in capsys.readouterr().out


def test_testing_among_candidates(made, own, capsys):
    """A window whose target is no candidate is dropped and counted; popularity ranks the candidates alone; the full
    results stay, as do those under another catalogue."""
    shop = made.parent / "shop"
    ev.main(["--out", str(own)])
    before, d = files(own), ev.load_run(own)[2]
    gone = {d.ids[w.target] for w in d.test[:3]}
    kept = [w for w in d.test if d.ids[w.target] not in gone]
    flags = ["--out", str(own), "--catalogue", catalogue(shop, own / "a.tsv", **dict.fromkeys(gone), i99="new")]
    d = Recommender(own, catalogue=flags[-1]).d
    capsys.readouterr()
    ev.main(flags)
    shown, now = capsys.readouterr().out, files(own)
    assert all(now[name] == text for name, text in before.items())
    (name,) = (x for x in now.keys() - before.keys() if x.startswith("results"))
    found, saved = lines(own / name.replace("results", "predictions").replace("json", "jsonl")), json.loads(now[name])
    assert [p["user"] for p in found] == [w.user for w in kept] and saved["model"]["n"] == len(kept)
    dropped = len(d.test) - len(kept)
    assert saved["model"]["dropped"] == dropped and f"{dropped} windows dropped" in shown
    assert f"among all {41 - len(gone)} items" in shown
    assert not gone & {x for p in found for ids in p["items"] for x in ids}
    counts = {x: int(d.counts[n]) for n, x in enumerate(d.ids) if x not in gone}
    positions = [(sum(c > counts[p["target"]] for c in counts.values()),
                  sum(c == counts[p["target"]] for c in counts.values())) for p in found]  # fmt: skip
    before, ties = torch.tensor(positions).numpy().T
    assert saved["popularity"] == ev.metrics(before, ties)
    ev.main([*flags[:-1], catalogue(shop, own / "a.tsv", i0=None)])  # the same name, another content
    assert files(own)[name] == now[name]
    flags[-1] = catalogue(shop, own / "a.tsv", i99="new")
    with refuses("no target", "--catalogue"):
        ev.main([*flags, "--only", table(own / "ids.txt", "i99")])


# --- histories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["time", "loo"])
def test_the_future_of_a_user(made, split):
    """The last items of the whole sequence. Catches a history that ends before the held-out items."""
    d, sequences = data.load(made.parent / "shop", split), {}
    for _, row in data.read_table(made.parent / "shop/sequences.tsv", ["user_id", "item_ids"]):
        sequences[row["user_id"]] = row["item_ids"].split()[-data.HISTORY :]
    assert {u: [d.ids[i] for i in w.history] for u, w in d.future.items()} == sequences
    assert all((w.user, w.target) == (u, None) for u, w in d.future.items())


def test_the_future_of_a_published_split(tmp_path):
    """The user's latest window counts, whatever the order of the lines; of windows of one day, the one held out."""
    table(tmp_path / "items.tsv", "item_id|title", *(f"{n}|title {n}" for n in range(20)))
    table(tmp_path / "windows.tsv", "split|user_id|item_ids|time", "test|b|1 2|9", "train|a|5 6|7", "train|a|3 4|6",
          "valid|c|1 2|8", "train|b|0 1 2 3 4 5 6 7 8 9 10|1", "test|d|3 4|5", "train|d|1 2|5")  # fmt: skip
    d = data.load(tmp_path)
    assert {u: [d.ids[i] for i in w.history] for u, w in d.future.items()} == {
        "a": ["5", "6"], "b": ["1", "2"], "c": ["1", "2"], "d": ["3", "4"]}  # fmt: skip


def test_names(made, whole, tmp_path):
    """Titles as written, else in any case, or ids, as text or numbers; a title comes before an id that reads alike."""
    assert whole.window(["RED pen", " old  ink pot", "i7", "i39"]).history == [0, 10, 7, 39]
    assert len(whole.window(["i1"] * 30).history) == data.HISTORY
    path = table(
        tmp_path / "new.tsv", "item_id|title", "7|seven", "8|9", "9|nine", "TEN|x", "10|ten", "A|GLUE", "b|glue"
    )
    window = Recommender(made, catalogue=path).window([7, "SEVEN", "9", "nine", "TEN", "glue", "GLUE"])
    assert window.history == [40, 40, 41, 42, 44, 46, 45]
    for wrong in ("red pen", [], None):
        with refuses("a history is a list"):
            whole.window(wrong)
    with refuses('no item is called "i77"'):
        whole.top_k([["i77"]])
    with refuses("unrecognized arguments: --excludehistory"):
        Recommender("out", excludehistory=True)
    with refuses("--score", "ful"):
        Recommender(made, score="ful")
    with refuses("k is 0"):
        whole.top_k([["i1"]], k=0)
    r = Recommender(made, k=3, exclude_history=False, only="")
    assert [len(r.top_k([["i1"]], k)[0]["titles"]) for k in (None, 2, None)] == [3, 2, 3]


def test_titles_that_are_one_to_the_tokenizer(made, tmp_path, monkeypatch, capsys):
    """Catches an item under the title of another one, and a catalogue that shrinks without a word."""
    tokenizer = data.read_tokenizer(ev.newest(made, "best"))
    tokenizer.normalizer = normalizers.Lowercase()
    monkeypatch.setattr(data, "read_tokenizer", lambda folder: tokenizer)
    r = Recommender(made, catalogue=catalogue(made.parent / "shop", tmp_path / "items.tsv", i1="A Pen", i2="a PEN"))
    assert "'A Pen' and 'a PEN' are one title to the tokenizer; there are 1 such cases" in capsys.readouterr().err
    (p,) = r.top_k([["i3"]], k=40)
    assert [t for ids, t in zip(p["items"], p["titles"], strict=True) if "i1" in ids] == ["A Pen / a PEN"]


def test_what_is_not_certain_is_said(made, own, tmp_path, capsys):
    for flags, certain in (([], True), (["--patience", "0", "--beam", "1", "--k", "20"], False)):
        ev.main(["--out", str(made), "--recommend", "i3", *flags])
        assert ("not certain" in capsys.readouterr().out) != certain
    ev.main(["--out", str(own), "--histories", "all", *flags])
    assert "60 users, 0 of them exact" in capsys.readouterr().out


def read(path: Path) -> dict[str, list[tuple]]:
    """user -> rows (rank, id, title, score)."""
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    assert header == ["user_id", "rank", "item_id", "title", "score"]
    users = {}
    for user, rank, x, title, score in rows:
        users.setdefault(user, []).append((int(rank), x, title, float(score)))
    return users


def flat(p: dict) -> list[tuple]:
    rows = zip(p["items"], p["titles"], p["scores"], strict=True)
    return [(n, x, title, pytest.approx(s, abs=1e-3)) for n, (ids, title, s) in enumerate(rows, 1) for x in ids]


def test_the_file_is_top_k(own, whole, tmp_path, monkeypatch, capsys):
    """Whatever the portions: in the order of the lines, every item of a title a line. A line longer than HISTORY is
    cut as in training."""
    histories = {f"user {n}": [f"i{(n * 7 + j) % 40}" for j in range(1 + 3 * n)] for n in range(5)}
    path = table(tmp_path / "h.tsv", "x|item_ids|user_id", *(f"-|{' '.join(h)}|{u}" for u, h in histories.items()))
    for users, flags, k in ((2, [], 10), (5, ["--to", str(tmp_path / "r.tsv"), "--k", "50"], 50)):
        monkeypatch.setattr(ev, "USERS", users)
        ev.main(["--out", str(own), "--histories", path, *flags])
        found = read(Path(flags[1]) if flags else own / "recommendations.tsv")
        assert found == {u: flat(p) for u, p in zip(histories, whole.top_k([*histories.values()], k), strict=True)}
        assert list(found) == list(histories) and len({row[0] for row in found["user 0"]}) == min(k, 39)
    assert "5 users, 5 of them exact (--patience), written to" in capsys.readouterr().out
    assert not [*tmp_path.glob("*.part*")]


def test_all_users_of_the_data(own, capsys):
    """--user prints what --histories all writes, without what the history holds."""
    flags = ["--out", str(own), "--exclude_history", "--k", "4"]
    ev.main([*flags, "--histories", "all"])
    found, d = read(own / "recommendations.tsv"), ev.load_run(own)[2]
    assert list(found) == list(d.future) and len(found) == 60
    assert not any(x in [d.ids[i] for i in d.future[u].history] for u, rows in found.items() for _, x, *_ in rows)
    capsys.readouterr()
    ev.main([*flags, "--user", "u7"])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "after " + " | ".join(d.titles[i] for i in d.future["u7"].history)
    ids = [x for row in rows for x in row.split()[1].split(",")]
    assert ids == [x for _, x, *_ in found["u7"]]


def test_a_file_is_read_as_it_is_needed(own, tmp_path, monkeypatch):
    """Constant memory: at any time no more than a portion of the lines is held."""
    monkeypatch.setattr(ev, "USERS", 3)
    path = table(tmp_path / "h.tsv", "user_id|item_ids", *(f"u{n}|i{n}" for n in range(10)))
    real, given, ahead = data.read_histories, [], []

    def reading(*args):
        given.append(0)
        for w in real(*args):
            given[-1] += 1
            yield w

    def predict(decoder, cat, d, windows, args):
        ahead.append((given[-1], len(windows)))
        return [{"user": w.user, "items": [], "titles": [], "scores": [], "exact": True} for w in windows]

    monkeypatch.setattr(data, "read_histories", reading)
    monkeypatch.setattr(ev, "predict", predict)
    ev.main(["--out", str(own), "--histories", path])
    assert sorted(given) == [10, 10] and ahead == [(3, 3), (6, 3), (9, 3), (10, 1)]


def test_a_failure_leaves_the_old_file(own, tmp_path, monkeypatch):
    """The second portion fails, or is interrupted: no half of a file, and no rest of one."""
    monkeypatch.setattr(ev, "USERS", 1)
    path = table(tmp_path / "h.tsv", "user_id|item_ids", "a|i1", "b|i2")
    (own / "recommendations.tsv").write_text("old")
    before, real = files(own), ev.predict

    def predict(decoder, cat, d, windows, args):
        if windows[0].user == "b":
            raise error
        return real(decoder, cat, d, windows, args)

    monkeypatch.setattr(ev, "predict", predict)
    for error in (KeyboardInterrupt(), OSError("no space left")):
        with pytest.raises(type(error)):
            ev.main(["--out", str(own), "--histories", path])
        assert files(own) == before


@pytest.mark.parametrize("rank, users", [(0, ["u0", "u2", "u4"]), (1, [])])
def test_processes_share_the_work(rank, users, own, tmp_path):
    """The second of two computes every second user, and writes nothing; the first writes what all have found."""

    class Process(ev.World):
        def __init__(self):
            self.rank, self.size = rank, 2

        def gather(self, values: list) -> list:
            other = {"user": "of the other process", "items": [], "exact": True}
            return [values[n // 2] if n % 2 == rank else other for n in range(5)]

    path = table(tmp_path / "h.tsv", "user_id|item_ids", *(f"u{n}|i{n}" for n in range(5)))
    before, args = files(own), ev.make_parser().parse_args(["--out", str(own), "--histories", path])
    ev.write_recommendations(Recommender(own), args, Process())
    assert files(own).keys() - before.keys() == ({"recommendations.tsv"} if users else set())
    assert not users or list(read(own / "recommendations.tsv")) == users


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, rows, parts", [
    ("histories", ["user_id|item_ids", "a|i1", "b|i1 i77"], ["wrong.tsv, line 3: item i77", "--core"]),
    ("histories", ["user_id|item_ids", "a|"], ["wrong.tsv, line 2: 0 items"]),
    ("histories", ["a|i1"], ["wrong.tsv, line 1: no column"]),
    ("only", ["", " "], ["wrong.tsv names no item"]),
    ("catalogue", ["item_id|title", "i1|"], ["wrong.tsv names no item that has a title"]),
    ("catalogue", ["item_id|title", "i1|x", "i1|y"], ["wrong.tsv, line 3", "already"])])  # fmt: skip
def test_wrong_files(flag, rows, parts, made, tmp_path, monkeypatch):
    """Named with the line, before the work begins."""
    monkeypatch.setattr(ev, "predict", None)
    with refuses(*parts):
        ev.main(["--out", str(made), f"--{flag}", table(tmp_path / "wrong.tsv", *rows)])


@pytest.mark.parametrize("flags, parts", [
    ("--user nobody", ["--user nobody", "no such user"]),
    ("--user u1 --recommend x", ["--recommend", "not allowed with", "--user"]),
    ("--to x.tsv", ["--to", "--histories"]),
    ("--user u1 --limit 1", ["--limit", "--user"]),
    ("--histories all --split valid", ["--split", "--histories"]),
    ("--histories nowhere.tsv", ["nowhere.tsv"]),
    ("--catalogue .", ["cannot be read"])])  # fmt: skip
def test_wrong_flags(flags, parts, made):
    with refuses(*parts):
        ev.main(["--out", str(made), *flags.split()])
