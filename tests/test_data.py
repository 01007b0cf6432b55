"""data.py: reading, splits, the trie, prompts, examples, batches; against brute force and the published counts."""

import gzip
import random
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from conftest import data_root

import data
from data import HISTORY, STRIDE, Catalogue, Example, Trie, Windows
from hatllm import InputError

ITEMS = "item_id\ttitle\n1\tA pen\n2\tInk\n3\tPaper\n4\tGlue\n"
SEQUENCES = "user_id\titem_ids\ttimes\nu\t1 2 3\t1 2 3\nv\t4 3 2 1\t1 1 2 5\n"
WINDOWS = "split\tuser_id\titem_ids\ttime\ntrain\tu\t1 2\t5\ntrain\tu\t1 2 3\t6\nvalid\tv\t2 4\t7\ntest\tv\t2 4 1\t8\n"


def write(folder, gz: bool = False, **tables):
    """The folder with NAME.tsv[.gz] for every table, text or bytes."""
    for name, text in tables.items():
        text = text.encode() if isinstance(text, str) else text
        (folder / f"{name}.tsv{'.gz' * gz}").write_bytes(gzip.compress(text, mtime=0) if gz else text)
    return folder


def load(folder, **more):
    return data.load(str(folder), k=0, **more)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_plain_gzipped_and_crlf(tmp_path, gz, newline):
    """A \\r that stays would be part of the last title, or of the last column's name."""
    tables = dict(items=ITEMS, sequences=SEQUENCES)
    d = load(write(tmp_path, gz, **{n: t.replace("\n", newline) for n, t in tables.items()}), split="loo")
    assert (d.ids, d.titles) == (["1", "2", "3", "4"], ["A pen", "Ink", "Paper", "Glue"])
    assert d.test.histories() == [[0, 1], [3, 2, 1]] and d.test.target.tolist() == [2, 0]


def test_reading_is_lenient_where_it_can_be(tmp_path):
    """More columns, blank lines, no newline at the end, runs of spaces in a title: none is an error or a row."""
    items = "item_id\tprice\ttitle\tyear\n\n1\t9\t A   pen \t1\n2\t\tInk\t\n3\t1\tPaper\t3"
    d = load(write(tmp_path, items=items, sequences="user_id\ti\tt\tmore\nu\t1  2 3\t1 2.5 3e1\tx\n"), split="loo")
    assert d.titles == ["A pen", "Ink", "Paper"] and d.test.time.tolist() == [30.0]


ROW = "items.tsv, line {}: "
BAD = {
    "duplicate item": (dict(items=ITEMS + "1\tAgain\n"), "items.tsv, line 6: item_id 1 is already .*line 2"),
    "item without a tab": (dict(items="item_id\ttitle\n1\tPen\n2\n"), "items.tsv, line 3: 1 .*2 are needed"),
    "item with too few columns": (dict(items="item_id\ta\ttitle\n1\tx\tPen\n2\tx\n"), "items.tsv, line 3: 2 col.* 3"),
    "no title column": (dict(items="item_id\tname\n1\tPen\n"), "items.tsv: no column .*'title', only item_id, name"),
    "empty items": (dict(items=""), "items.tsv is empty"),
    "items with a header only": (dict(items="item_id\ttitle\n\n"), "items.tsv is empty"),
    "not UTF-8": (dict(items="item_id\ttitle\n1\tCafé\n".encode("latin-1")), "items.tsv: cannot be read .*UTF-8"),
    "no header": (
        dict(sequences=SEQUENCES.partition("\n")[2]),
        "sequences.tsv, line 1: the header must begin .*user_id",
    ),
    "unknown item": (dict(sequences=SEQUENCES + "w\t1 9 2\t1 2 3\n"), "sequences.tsv, line 4: item 9 is not in items"),
    "time that is no number": (
        dict(sequences=SEQUENCES + "w\t1 2\t1 May\n"),
        "sequences.tsv, line 4: '1 May' .*number",
    ),
    "time that is not a number": (dict(sequences=SEQUENCES + "w\t1 2\t1 nan\n"), "sequences.tsv, line 4: '1 nan'"),
    "times not in order": (dict(sequences=SEQUENCES + "w\t1 2 3\t1 3 2\n"), "sequences.tsv, line 4: .*user w .*order"),
    "more items than times": (
        dict(sequences=SEQUENCES + "w\t1 2 3\t1 2\n"),
        "sequences.tsv, line 4: 3 items, .*2 times",
    ),
    "user twice": (dict(sequences=SEQUENCES + "u\t1 2 3\t1 2 3\n"), "sequences.tsv, line 4: user u stands .*already"),
    "user without items": (dict(sequences=SEQUENCES + "w\t\t\n"), "sequences.tsv, line 4: 0 items"),
    "columns": (dict(sequences=SEQUENCES + "w\t1 2 3\n"), "sequences.tsv, line 4: 2 tab-separated .*3 are needed"),
    "empty sequences": (dict(sequences="user_id\titem_ids\ttimes\n"), "sequences.tsv is empty"),
    "sequences too short": (dict(sequences="user_id\ti\tt\nw\t1\t1\n"), "no user is left"),
    "no sequences": (dict(sequences=None), "no sequences.tsv"),
    "unknown split": (
        dict(windows=WINDOWS + "dev\tu\t1 2\t9\n"),
        "windows.tsv, line 6: split 'dev' .*train, valid, test",
    ),
    "window of one item": (dict(windows=WINDOWS + "test\tu\t1\t9\n"), "windows.tsv, line 6: 1 items, but 2"),
    "unknown item in a window": (dict(windows=WINDOWS + "test\tu\t7 1\t9\n"), "windows.tsv, line 6: item 7"),
    "time of a window": (dict(windows=WINDOWS + "test\tu\t1 2\tnow\n"), "windows.tsv, line 6: 'now'"),
    "two times of a window": (dict(windows=WINDOWS + "test\tu\t1 2\t8 9\n"), "windows.tsv, line 6: .*8 9"),
    "columns of a window": (dict(windows=WINDOWS + "test\tu\t1 2\n"), "windows.tsv, line 6: 3 tab.*4 are needed"),
    "no test windows": (dict(windows=WINDOWS[: WINDOWS.index("test")]), "windows.tsv: no window of split test"),
    "no training windows": (dict(windows="split\tu\ti\tt\ntest\tu\t1 2\t1\n"), "windows.tsv: no window of split train"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_with_file_and_line(tmp_path, case):
    """A traceback, or a silently wrong data set, in place of a sentence that names the place."""
    bad, sentence = BAD[case]
    tables = dict(items=ITEMS) | ({} if "windows" in bad else dict(sequences=SEQUENCES)) | bad
    write(tmp_path, **{n: t for n, t in tables.items() if t is not None})
    with pytest.raises(InputError, match=sentence) as e:
        load(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b[:40] + b"\0" * 9 + b[49:], lambda b: b"PK" + b])
def test_damaged_gzip(tmp_path, damage):
    """EOFError, zlib.error and BadGzipFile are three classes: each must be the same sentence."""
    write(tmp_path, gz=True, items=ITEMS + "".join(f"x{i}\tTitle {i * i}\n" for i in range(99)), sequences=SEQUENCES)
    path = tmp_path / "items.tsv.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="items.tsv.gz: cannot be read .*complete"):
        load(tmp_path)


def test_unknown_name_gets_the_nearest(tmp_path, monkeypatch):
    """--data beuaty must not be looked for on the network, nor end in a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HATLLM_DATA", raising=False)
    with pytest.raises(InputError, match="--data beuaty: .*did you mean 'beauty'"):
        data.load("beuaty")
    with pytest.raises(InputError, match="--data qqq: .*ml-100k"):
        data.load("qqq")


def test_places_in_order(tmp_path, monkeypatch):
    """A path, --data_dir, $HATLLM_DATA, data/: the first that has items.tsv; an empty folder hides nothing."""
    monkeypatch.chdir(tmp_path)
    places = [tmp_path / p / "mine" for p in ("", "flag", "env", "data")]
    for p in places:
        p.mkdir(parents=True)
    monkeypatch.setenv("HATLLM_DATA", str(tmp_path / "env"))
    for p in reversed(places):
        write(p, items=ITEMS)
        assert data.find("mine", str(tmp_path / "flag")).resolve() == p


def test_loo_of_a_published_split(tmp_path):
    """A published split that is silently split anew would not be comparable with what was published."""
    with pytest.raises(InputError, match="--split loo: .*published split"):
        load(write(tmp_path, items=ITEMS, windows=WINDOWS), split="loo")


# --- splits ---------------------------------------------------------------------------------------------------------


@cache
def real(name: str):
    return data.load(name, str(data_root()))


def timed(seed: int, users: int = 30, longest: int = 25) -> tuple[list, dict]:
    """Random users as [(item, time)], each item once in all, with many ties in time; and the time of every item."""
    rng, users_, time = random.Random(seed), [], {}
    for u in range(users):
        times = sorted(rng.randrange(40) for _ in range(rng.randint(2, longest)))
        users_.append([(100 * u + j, float(t)) for j, t in enumerate(times)])
        time |= dict(users_[-1])
    return users_, time


@pytest.mark.parametrize("seed", range(20))
def test_split_by_time_does_not_leak(seed):
    """By brute force, with ties: which windows there are, their order, and that what is learnt from (also under
    --targets all) is neither held out nor later than the last training target."""
    users, time = timed(seed)
    parts = data.split_time(users)
    rows = [r for part in parts for r in part]
    expected = []
    for u, s in enumerate(users):
        for j, (item, t) in enumerate(s):
            if j >= HISTORY or (j == len(s) - 1 and j > 0):
                expected.append(([i for i, _ in s[:j]][-HISTORY:], item, u, t))
    assert sorted(rows) == sorted(expected)
    assert [len(p) for p in parts[:2]] == [int(0.8 * len(rows)), int(0.1 * len(rows))]
    for earlier, later in zip(parts, parts[1:], strict=False):
        assert max(r[3] for r in earlier) <= min(r[3] for r in later)
    assert all(time[i] <= time[target] == t for history, target, _, t in rows for i in history)

    train, held_out = parts[0], {r[1] for part in parts[1:] for r in part}
    learnt = data.before_held_out(users, train, parts[1] + parts[2])
    last = max(r[3] for r in train)
    assert learnt == [[i for i, t in s if i not in held_out and t <= last] for s in users]
    assert {r[1] for r in train} <= {i for s in learnt for i in s}


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out(seed):
    """A user's last item is for test, the one before for validation; training must hold neither as a target."""
    users, _ = timed(seed)
    train, valid, test = data.split_loo(users)
    long = [(u, [i for i, _ in s]) for u, s in enumerate(users) if len(s) > 2]
    assert [(h, t, u) for h, t, u, _ in test] == [(s[:-1][-HISTORY:], s[-1], u) for u, s in long]
    assert [(h, t, u) for h, t, u, _ in valid] == [(s[:-2][-HISTORY:], s[-2], u) for u, s in long]
    cut = [
        (s[:j][-HISTORY:], s[j], u) for u, s in long for j in range(1, len(s) - 2) if j >= HISTORY or j == len(s) - 3
    ]
    assert [(h, t, u) for h, t, u, _ in train] == cut


@pytest.mark.parametrize("split", ["time", "loo"])
def test_what_is_counted_and_learnt_holds_no_target(tmp_path, split):
    """The whole of load(): popularity and --targets all must come from the training part alone."""
    users, time = timed(3, users=12)
    items = "item_id\ttitle\n" + "".join(f"{i}\tTitle {i}\n" for s in users for i, _ in s)
    rows = [f"u{u}\t{' '.join(str(i) for i, _ in s)}\t{' '.join(str(t) for _, t in s)}" for u, s in enumerate(users)]
    d = load(write(tmp_path, items=items, sequences="\n".join(["user_id\ti\tt", *rows])), split=split)
    held = set(d.valid.target.tolist() + d.test.target.tolist())
    assert not held & {i for s in d.sequences for i in s} and not d.counts[list(held)].any()
    assert d.counts.sum() == sum(map(len, d.sequences))
    when = [time[int(i)] for i in d.ids]
    if split == "time":
        assert max(when[t] for e in data.examples(d, "all") for _, t in e.targets) <= d.train.time.max()
    for w in (d.train, d.valid, d.test):
        assert [when[t] for t in w.target] == w.time.tolist()
        assert all(when[i] <= t for h, t in zip(w.histories(), w.time, strict=True) for i in h)


def test_core_by_brute_force():
    """Dropping an item can take a user below the core, which can take an item: once around is not enough."""
    rng = random.Random(0)
    for k in (0, 2, 3, 5):
        users = {u: [(rng.randrange(25), 0.0) for _ in range(rng.randint(1, 9))] for u in range(40)}
        kept = {u: list(s) for u, s in users.items()}
        while True:
            count = Counter(i for s in kept.values() for i, _ in s)
            bad_item = next((i for i, n in count.items() if n < k), None)
            bad_user = next((u for u, s in kept.items() if len(s) < max(k, 2)), None)
            if bad_item is not None:
                kept = {u: [(i, t) for i, t in s if i != bad_item] for u, s in kept.items()}
            elif bad_user is not None:
                del kept[bad_user]
            else:
                break
        assert data.core(users, k) == kept


def test_beauty_is_the_published_data_set():
    """Counts of the published recipe (design.md 3): another core, split or rule for untitled items changes them."""
    d = real("beauty")
    assert d.summary() == "beauty: 22,332 users, 12,086 items, 46,908 / 5,863 / 5,864 train / valid / test windows"
    assert all(d.titles) and len(d.titles) > len(set(d.titles))
    assert d.train.time.max() <= d.valid.time.min() and d.valid.time.max() <= d.test.time.min()
    folder = data_root("beauty")
    ids, titles = data.read_items(folder)
    users = data.read_sequences(folder, {x: i for i, x in enumerate(ids)})
    users = list(data.core({u: [(i, t) for i, t in s if titles[i]] for u, s in users.items()}, 5).values())
    assert sum(map(len, users)) == 198_215
    # what may be learnt from, in another way: no later than the last training target, none held out
    windows = [(t, u, j) for u, s in enumerate(users) for j, (_, t) in enumerate(s) if j >= 10 or j == len(s) - 1]
    held = {(u, j) for _, u, j in sorted(windows, key=lambda w: w[0])[46_908:]}
    last = d.train.time.max()
    learnt = [[ids[i] for j, (i, t) in enumerate(s) if t <= last and (u, j) not in held] for u, s in enumerate(users)]
    assert [[d.ids[i] for i in s] for s in d.sequences] == [s for s in learnt if s]
    # leave one out: one test and one validation window a user
    train, valid, test = data.split_loo(users)
    assert len(valid) == len(test) == 22_332 and all(v[3] <= t[3] for v, t in zip(valid, test, strict=True))


def test_office_is_the_published_split():
    d = real("office")
    assert (len(d.ids), len(d.train), len(d.valid), len(d.test)) == (2_414, 15_400, 1_925, 1_925)
    assert len(set(d.train.user.tolist())) == len(d.sequences) == 3_718
    assert d.train.time.max() <= d.valid.time.min() and d.valid.time.max() <= d.test.time.min()


def test_books_is_the_published_split():
    """MSL's has no validation windows: they are the latest ninth of the training windows. Item 5746 has no title and
    leaves, with the two windows of which it is the target; 2403 occurs nowhere."""
    d = real("books")
    assert (len(d.train), len(d.valid), len(d.test)) == (31_162, 3_896, 4_383)
    assert len(d.train) + len(d.valid) == 35_060 - 2 and len(d.valid) == -(-35_058 // 9)
    assert d.train.time.max() <= d.valid.time.min() and d.valid.time.max() <= d.test.time.min()
    assert all(d.titles) and len(d.ids) == 6_344 - 2 and not {"5746", "2403"} & set(d.ids)


def test_untitled_items_leave_windows(tmp_path):
    """A history loses its untitled items, a window whose target or whole history has no title goes."""
    items = "item_id\ttitle\n1\tA\n2\t\n3\tC\n4\tD\n"
    rows = ["train\tu\t1 2 3\t1", "train\tu\t1 3 2\t2", "train\tu\t2 3\t3", "test\tu\t2 1 4\t4"]
    d = load(write(tmp_path, items=items, windows="\n".join(["split\tu\ti\tt", *rows, *rows[:1] * 8])))
    assert d.ids == ["1", "3", "4"]
    assert d.train.histories() == [[0]] * 8 and d.train.target.tolist() == [1] * 8 and len(d.valid) == 1
    assert d.test.histories() == [[0]] and d.test.target.tolist() == [2]


def test_chain_undoes_sliding():
    """Interactions of overlapping windows must be counted once; a missing window begins a new stretch."""
    users, _ = timed(7)
    rows = [data.window(s, at, u) for u, s in enumerate(users) for at in range(1, len(s))]
    random.Random(0).shuffle(rows)
    rows.sort(key=lambda r: (r[3], r[1]))  # ties in the users' order, as files have them
    assert sorted(data.chain(rows)) == sorted([i for i, _ in s] for s in users)
    s = list(range(30))
    rows = [(s[max(0, j - HISTORY) : j], j, 0, float(j)) for j in range(5, 30) if j != 20]
    assert data.chain(rows) == [s[:20], s[11:30]]


def test_windows_and_catalogue():
    """Items are numbered anew in the order of items.tsv; those that occur nowhere leave."""
    rows = {"train": [([4, 2], 7, 0, 1.0)], "valid": [], "test": [([7], 2, 1, 2.0)]}
    d = data.catalogued("x", list("abcdefgh"), list("ABCDEFGH"), rows, [[4, 2, 7], [4], []])
    assert (d.ids, d.titles, d.sequences) == (["c", "e", "h"], ["C", "E", "H"], [[1, 0, 2], [1]])
    assert d.train.histories() == [[1, 0]] and d.train.target.tolist() == [2] and len(d.valid) == 0
    assert d.counts.tolist() == [1, 2, 1] and d.valid.histories() == []
    assert d.test[np.array([0])].user.tolist() == [1]


def test_digest_tells_data_apart():
    """A run that resumes on other titles, or on a split that moved by one window, must notice."""
    rows = [([1, 2], 0, 0, 1.0), ([2, 0], 1, 0, 1.0), ([0, 1], 2, 1, 2.0)]

    def digest(titles="ABC", a=1, b=2, swap=False):
        parts = {"train": rows[:a], "valid": rows[a:b], "test": rows[b:][:: -1 if swap else 1]}
        return data.catalogued("x", list("abc"), list(titles), parts, [[0, 1, 2]]).digest()

    assert digest() == digest()
    assert len({digest(), digest("ABD"), digest(a=2), digest(b=1), digest(b=1, swap=True)}) == 5


# --- the trie -------------------------------------------------------------------------------------------------------


def random_paths(seed: int) -> list[np.ndarray]:
    """Titles over a few tokens with duplicates, beginnings of one another, and runs where only one can follow."""
    rng = random.Random(seed)
    titles = [[rng.randint(2, 4) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 40))]
    titles += [titles[rng.randrange(len(titles))][: rng.randint(1, 5)] for _ in range(5)]
    titles += [titles[0] + [rng.randint(5, 9) for _ in range(6)]] if seed % 2 else []
    rng.shuffle(titles)
    return [np.array([*t, seed % 3]) for t in titles]  # end token 0, 1 or 2: also one that titles contain


def check_trie(trie: Trie, paths: list[np.ndarray]):
    """Every array against a dict of prefixes."""
    items = {}
    for i, p in enumerate(paths):
        items.setdefault(tuple(p.tolist()), []).append(i)
    titles = sorted(items)
    below = {}  # prefix -> the titles below it
    for leaf, t in enumerate(titles):
        for n in range(len(t) + 1):
            below.setdefault(t[:n], []).append(leaf)
    order = sorted(below, key=lambda p: (len(p), p))
    number = {p: n for n, p in enumerate(order)}
    children = {p: [] for p in order}
    for p in order[1:]:
        children[p[:-1]].append(number[p])
    assert (trie.n_nodes, trie.n_leaves) == (len(order), len(titles))
    for name, of in {
        "token": lambda p: p[-1] if p else 0,
        "parent": lambda p: number[p[:-1]] if p else 0,
        "depth": len,
        "fan": lambda p: len(children[p]),
        "leaf": lambda p: below[p][0],
        "leaves": lambda p: len(below[p]),
    }.items():
        assert getattr(trie, name).tolist() == [of(p) for p in order], name
    assert all(below[p] == list(range(below[p][0], below[p][0] + len(below[p]))) for p in order)
    for p, n in number.items():
        first = int(trie.child[n])
        assert children[p] == list(range(first, first + len(children[p])))
        while p and len(children[p]) == 1:
            p = order[children[p][0]]
        assert int(trie.stop[n]) == number[p]
    for leaf, t in enumerate(titles):
        at = slice(int(trie.start[leaf]), int(trie.start[leaf + 1]))
        assert tuple(trie.path_token[at].tolist()) == t
        assert trie.path_node[at].tolist() == [number[t[: n + 1]] for n in range(len(t))]
        assert trie.items[trie.first_item[leaf] : trie.first_item[leaf + 1]].tolist() == items[t]
        assert all(trie.leaf_of_item[i] == leaf for i in items[t])


@pytest.mark.parametrize("seed", range(30))
def test_trie_by_brute_force(seed):
    paths = random_paths(seed)
    if seed % 3 != 2:  # with end token 2, which titles contain, a title may begin another: not promised
        check_trie(Trie(paths), paths)


@pytest.mark.parametrize("titles", [[[3, 1]], [[1]], [[3, 4, 5, 1]] * 3, [[1], [3, 1], [3, 3, 1]], [[9, 1], [2, 1]]])
def test_small_tries(titles):
    """One title, one title of three items, a title of no token but the end."""
    paths = [np.array(t) for t in titles]
    check_trie(Trie(paths), paths)


def test_many_titles():
    """Built without a loop over nodes; the arrays agree with each other on 20,000 titles."""
    rng = np.random.default_rng(0)
    paths = [np.append(rng.zipf(1.5, n) % 500 + 1, 0) for n in rng.integers(3, 20, 20_000)]
    t = Trie(paths)
    assert t.leaves[0] == t.n_leaves == len({tuple(p.tolist()) for p in paths})
    assert (t.depth[1:] == t.depth[t.parent[1:]] + 1).all() and t.fan.sum() == t.n_nodes - 1
    for i in range(0, 20_000, 997):
        leaf = t.leaf_of_item[i]
        assert t.path_token[t.start[leaf] : t.start[leaf + 1]].tolist() == paths[i].tolist()


# --- prompts --------------------------------------------------------------------------------------------------------

ODD = ["A pen", 'The "Red" Pen', "Tom &amp; Jerry &#39;s", "日本語のペン 🖊️", "Ink<|endoftext|>", "<|end|>", "A", " Ink",
       "A pen", "naïve café", "Next:", "Bought:\nA pen", "<|end|> A pen <|end|>"]  # fmt: skip


@cache
def odd() -> Catalogue:
    tokenizer = data.train_tokenizer(ODD, 330)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return Catalogue(ODD, tokenizer, tokenizer.token_to_id("<|end|>"))


def test_titles_are_text():
    """A title that spells a special token must not become it: it would end the title, or the document."""
    cat, tokenizer = odd(), data.train_tokenizer(ODD, 330)
    for text, ids in zip(ODD, cat.titles, strict=True):
        assert len(ids) and 0 not in ids and max(ids) < tokenizer.get_vocab_size()
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<|end|>") == 0
    assert cat.trie.n_leaves == len(set(ODD))


def test_prompt_spans_are_exact():
    """Titles are encoded alone: the tokens of item k are those of titles[k], and all others are context."""
    cat, rng = odd(), random.Random(0)
    for n in [*range(1, HISTORY + 1)]:
        history = [rng.randrange(len(ODD)) for _ in range(n)]
        tokens, item = cat.prompt(history)
        assert len(tokens) == len(item) and item.min() == 0 and item.max() == n
        for k, i in enumerate(history, 1):
            assert tokens[item == k].tolist() == cat.titles[i].tolist()
            where = np.flatnonzero(item == k)
            assert (np.diff(where) == 1).all()
        context = [*cat.bos, *cat.head, *list(cat.separator) * (n - 1), *cat.header]
        assert tokens[item == 0].tolist() == context and not item[-len(cat.header) :].any()
        assert (np.diff(item[item > 0]) >= 0).all()


def test_prompt_is_the_template():
    """What the model reads is PROMPT around the titles, to the letter."""
    cat, tokenizer = odd(), data.train_tokenizer(ODD, 330)
    tokens, _ = cat.prompt([0, 2, 4])
    a, b, c = data.PROMPT
    assert tokenizer.decode(tokens.tolist()) == a + ODD[0] + b + ODD[2] + b + ODD[4] + c


def test_a_first_token_of_the_tokenizer_stays_first():
    """Llama 3 puts a begin token first; without it the model is out of its training. Titles must not have it."""
    from tokenizers import processors

    tokenizer = data.train_tokenizer(ODD, 330)
    tokenizer.add_special_tokens(["<|begin|>"])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    cat = Catalogue(ODD, tokenizer, 0)
    tokens, item = cat.prompt([0, 1])
    assert tokens[0] == begin and item[0] == 0 and (tokens == begin).sum() == 1


@pytest.mark.parametrize("trie_only", [False, True])
def test_training_reads_the_prompt_of_evaluation(trie_only):
    """The template exists once: another prompt in training than in evaluation costs accuracy and shows nowhere."""
    cat = odd()
    for history, target in [([0], 1), ([3, 2, 1], 0), ([4, 5, 9], 6), ([1, 0], 12)]:
        c = data.encode(cat, Example(history, [(len(history), target)]), trie_only)
        tokens, item = cat.prompt(history)
        title = np.append(cat.titles[target], 0)
        assert (
            c["tokens"][: len(tokens)].tolist() == tokens.tolist() and c["item"][: len(item)].tolist() == item.tolist()
        )
        fed = c["tokens"][len(tokens) :]
        assert fed.tolist() == title[: len(fed)].tolist() and (c["item"][len(item) :] == len(history) + 1).all()
        assert c["n_tokens"] == len(title) and (c["at"] >= len(tokens) - 1).all()
        steps = c["at"] - len(tokens) + 1  # how much of the title stands before the row
        assert c["next"].tolist() == title[steps].tolist()
        fan = [int(cat.trie.fan[n]) for n in c["node"]]
        if trie_only:
            assert min(fan) > 1 and len(fed) == steps[-1]
        else:
            assert steps.tolist() == list(range(len(title))) and len(fed) == len(title) - 1
        for s, n in zip(steps, c["node"], strict=True):
            path = []
            while n:
                path, n = [int(cat.trie.token[n]), *path], int(cat.trie.parent[n])
            assert path == title[:s].tolist()


def test_branches_hold_separate_prompts():
    """A branch, with what it sees of the trunk, is token by token the prompt of its own target."""
    cat, history, targets = odd(), [3, 1, 4, 0], [(1, 1), (2, 4), (3, 0), (4, 12)]
    c = data.encode(cat, Example(history, targets), False)
    for b, (k, target) in enumerate(targets, 1):
        own = data.encode(cat, Example(history[:k], [(k, target)]), False)
        at = np.flatnonzero(c["branch"] == b)
        seen = np.append(np.arange(c["fork"][at[0]]), at)
        assert (c["branch"][: c["fork"][at[0]]] == 0).all() and len(set(c["fork"][at].tolist())) == 1
        for name in ("tokens", "item"):
            assert c[name][seen].tolist() == own[name].tolist()
        mine = np.isin(c["at"], at)
        assert c["next"][mine].tolist() == own["next"].tolist() and c["node"][mine].tolist() == own["node"].tolist()
        assert np.searchsorted(seen, c["at"][mine]).tolist() == own["at"].tolist()
    assert c["n_tokens"] == sum(len(cat.titles[t]) + 1 for _, t in targets)


# --- examples and batches -------------------------------------------------------------------------------------------


def dataset(sequences: list[list[int]]) -> data.Dataset:
    none, n = Windows.of([]), 1 + max(i for s in sequences for i in s)
    return data.Dataset("x", [str(i) for i in range(n)], [f"t{i}" for i in range(n)], none, none, none, sequences)


def test_every_item_is_a_target_once():
    """--targets all: each item with one before it, once, with its last items as the history: all of them up to
    HISTORY, else between HISTORY - STRIDE and HISTORY. Sharing changes how, not what."""
    sequences = [[100 * n + j for j in range(n)] for n in range(2, 45)]
    d = dataset(sequences)
    shared, alone = data.examples(d, "all"), data.examples(d, "all", share=False)
    pairs = [(e.history[:k], t) for e in shared for k, t in e.targets]
    assert pairs == [(e.history, t) for e in alone for _, t in e.targets]
    assert all(len(e.targets) == 1 and e.targets[0][0] == len(e.history) for e in alone)
    assert sorted(t for _, t in pairs) == sorted(i for s in sequences for i in s[1:])
    for history, t in pairs:
        before = t % 100
        assert history == list(range(t - len(history), t))
        assert len(history) == before if before <= HISTORY else HISTORY - STRIDE < len(history) <= HISTORY
    assert all(e.targets[-1][0] == len(e.history) <= HISTORY for e in shared)
    assert len(shared) < len(alone) / 3


def test_examples_of_the_published_recipe():
    d = real("office")
    found = data.examples(d)
    assert len(found) == len(d.train)
    assert [(e.history, e.targets) for e in found[:50]] == [
        (h, [(len(h), t)]) for h, t in zip(d.train.histories()[:50], d.train.target.tolist(), strict=False)
    ]


def test_collate():
    """Right-padded with item -1; rows point to the same tokens as before; no branches where all have one target."""
    cat = odd()
    examples = [Example([0], [(1, 1)]), Example([3, 1, 4], [(1, 1), (3, 4)]), Example([2, 4, 9, 1], [(4, 12)])]
    coded = [data.encode(cat, e, True) for e in examples]
    b = data.collate(coded)
    size = [len(c["tokens"]) for c in coded]
    assert b.tokens.shape == (3, max(size)) and (b.item >= 0).sum(1).tolist() == size
    for n, c in enumerate(coded):
        for name in ("tokens", "item", "branch", "fork"):
            row = getattr(b, name)[n]
            assert row[: size[n]].tolist() == c[name].tolist()
            assert (row[size[n] :] == (-1 if name == "item" else 0)).all()
    at = [n * max(size) + int(a) for n, c in enumerate(coded) for a in c["at"]]
    assert b.rows.tolist() == at
    assert b.next.tolist() == np.concatenate([c["next"] for c in coded]).tolist()
    assert b.node.tolist() == np.concatenate([c["node"] for c in coded]).tolist()
    single = data.collate([coded[0], coded[2]])
    assert single.branch is None and single.fork is None and single.to("cpu").branch is None


def test_collate_prompts():
    """As prompt(), right-padded with item -1; source leads from a title's token to its state in the item cache."""
    cat, histories = odd(), [[0], [3, 2, 1, 0], [5, 5]]
    tokens, item, source = data.collate_prompts(cat, histories)
    assert tokens.dtype == item.dtype == source.dtype == torch.long
    every = np.concatenate(cat.titles)
    for n, h in enumerate(histories):
        t, i = cat.prompt(h)
        assert tokens[n, : len(t)].tolist() == t.tolist() and item[n, : len(t)].tolist() == i.tolist()
        assert (item[n, len(t) :] == -1).all() and not tokens[n, len(t) :].any()
        assert ((source[n] >= 0) == (item[n] > 0)).all()
        assert every[source[n][item[n] > 0]].tolist() == tokens[n][item[n] > 0].tolist()
        for k, x in enumerate(h, 1):  # of this very title, not of another with the same tokens
            assert int(source[n][item[n] == k][0]) == sum(map(len, cat.titles[:x]))


def test_damaged_tokenizer(tmp_path):
    """The library raises a bare Exception; a missing file must name the folder's contents."""
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        data.read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "tokenizer.json")) + ": not a tokenizer"):
        data.read_tokenizer(tmp_path)
