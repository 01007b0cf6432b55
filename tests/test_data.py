"""data.py: reading, splits, the trie, prompts, examples, batches; against brute force and the published counts."""

import gzip
import itertools
import random
from functools import cache

import numpy as np
import pytest
import torch
from conftest import data_root, refuses, tiny_config
from tokenizers import Tokenizer, models, normalizers, processors, trainers

import data
from data import HISTORY, Catalogue, Example, Trie, Window
from hatllm import TARGET

ITEMS = "item_id\ttitle\n1\tA pen\n2\tInk\n3\tPaper\n4\tGlue\n"
SEQUENCES = "user_id\titem_ids\ttimes\nu\t1 2 3\t1 2 3\nv\t4 3 2 1\t1 1 2 5\n"
WINDOWS = "split\tuser_id\titem_ids\ttime\ntrain\tu\t1 2\t5\ntrain\tu\t1 2 3\t6\nvalid\tv\t2 4\t7\ntest\tv\t2 4 1\t8\n"


def write(folder, gz: bool = False, **tables):
    """The folder with NAME.tsv[.gz] for every table, text or bytes."""
    for name, text in tables.items():
        text = text.encode() if isinstance(text, str) else text
        (folder / f"{name}.tsv{'.gz' * gz}").write_bytes(gzip.compress(text, mtime=0) if gz else text)
    return folder


def load(folder, split="time"):
    return data.load(folder, split, 5 if [*folder.glob("windows.tsv")] else 0)  # a published split has no --core


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("newline, mark", [("\n", "\ufeff"), ("\r\n", "")])
def test_plain_gzipped_crlf_and_byte_order_mark(tmp_path, gz, newline, mark):
    """Also more columns, blank lines, runs of spaces, quotes that are text, and no newline at the end."""
    items = 'item_id\tprice\ttitle\tyear\n\n1\t9\t A   "pen" \t1\n2\t\t"Ink\t\n3\t1\tPaper\t3\n4\t\tGlue\t'
    tables = dict(items=items, sequences=SEQUENCES.replace("5\n", "5e0"))
    (tmp_path / "windows.tsv.bak").write_text("anything")
    d = load(write(tmp_path, gz, **{n: mark + t.replace("\n", newline) for n, t in tables.items()}), "loo")
    assert (d.ids, d.titles) == (["1", "2", "3", "4"], ['A "pen"', '"Ink', "Paper", "Glue"])
    assert d.test == [Window([0, 1], 2, "u", 3.0), Window([3, 2, 1], 0, "v", 5.0)]


BAD = [  # a table's end, or the whole of it with its header; what the sentence names
    ("items", "1 \tAgain\n", ["line 6", "item_id 1"]), ("items", " \tPen\n", ["line 6", "no item_id"]),
    ("items", "5\tA\tpen\n", ["line 6"]), ("items", "", []),
    ("items", "item_id\tname\n1\tPen\n", ["title"]),
    ("items", "item_id\ttitle\ttitle\n1\tA\tB\n", ["twice"]),
    ("items", "9\tCaf\xe9\n", ["UTF-8"]), ("sequences", None, []),
    ("sequences", "w\t1 9 2\t1 2 3\n", ["line 4", "item 9"]), ("sequences", "w\t1 2\t1 May\n", ["line 4", "'1 May'"]),
    ("sequences", "w\t1 2\t1 nan\n", ["line 4", "'1 nan'"]), ("sequences", "w\t1 2\t\n", ["line 4"]),
    ("sequences", "w\t1 2 3\t1 2\n", ["line 4", "'1 2'"]), ("sequences", "w\t1 2 3\t1 3 2\n", ["line 4", "user w"]),
    ("sequences", "u\t1 2 3\t1 2 3\n", ["line 4", "user u"]), ("sequences", "w\t\t\n", ["line 4"]),
    ("sequences", "w\t1 2 3\n", ["line 4"]), ("sequences", "user_id\titem_ids\ttimes\nw\t1\t1\n", ["0 train"]),
    ("sequences", "user\titem_ids\ttimes\nw\t1 2\t1 2\n", ["line 1", "user_id"]),
    ("windows", "dev\tu\t1 2\t9\n", ["line 6", "'dev'"]), ("windows", "test\tu\t1\t9\n", ["line 6"]),
    ("windows", "test\tu\t1 2\t\n", ["line 6"]), ("windows", "test\tu\t1 2\t8 9\n", ["line 6", "'8 9'"]),
    ("windows", WINDOWS[: WINDOWS.index("test")], ["0 test"]), ("sequences and windows", "", ["published"]),
]  # fmt: skip


@pytest.mark.parametrize("table, text, parts", BAD)
def test_bad_input_is_one_sentence_with_file_and_line(tmp_path, table, text, parts):
    """A traceback, or a silently wrong data set, in place of a sentence that names the place."""
    good = dict(items=ITEMS, sequences=SEQUENCES, windows=WINDOWS)
    tables = {n: good[n].encode() for n in ("items", "windows" if table == "windows" else "sequences")}
    if text is None:
        tables.pop(table)
    elif table in tables:
        whole = not text or text.startswith(("item_id", "user", "split"))
        tables[table] = (b"" if whole else tables[table]) + text.encode("latin-1")
    else:
        tables["windows"] = good["windows"].encode()
    with refuses(write(tmp_path, **tables), "windows" if "windows" in table or "0 t" in parts else "", *parts):
        load(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b[:40] + b"\0" * 9 + b[49:], lambda b: b"PK" + b])
def test_damaged_gzip(tmp_path, damage):
    """EOFError, zlib.error and BadGzipFile are three classes: each must be the same sentence."""
    write(tmp_path, gz=True, items=ITEMS + "".join(f"x{i}\tTitle {i * i}\n" for i in range(99)), sequences=SEQUENCES)
    path = tmp_path / "items.tsv.gz"
    path.write_bytes(damage(path.read_bytes()))
    with refuses("items.tsv.gz", "complete"):
        load(tmp_path)


def test_folders_that_contradict_themselves_or_the_split(tmp_path):
    """Which table is out of date? A published split that is silently split anew would not be comparable with what was
    published; and leaving two items of two out leaves none to learn from."""
    write(tmp_path, items=ITEMS, windows=WINDOWS)
    for split, k in (("loo", 5), ("time", 0)):
        with refuses("published split", "windows.tsv", "--split", "--core"):
            data.load(tmp_path, split, k)
    (tmp_path / "windows.tsv").unlink()
    with refuses(tmp_path, "0 train"):
        load(write(tmp_path, sequences="user_id\titem_ids\ttimes\nu\t1 2\t1 2\nv\t3 4\t1 2\n"), "loo")
    with refuses("items.tsv", "items.tsv.gz"):
        load(write(tmp_path, True, items=ITEMS))


@pytest.mark.parametrize("name, value", [("HISTORY", 0), ("TIES", "Shuffled"), ("PROMPT", ("", "\n"))])
def test_constants_that_mean_nothing(tmp_path, monkeypatch, name, value):
    """Catches examples without end, a typing error that means the other value, an unpacking error."""
    monkeypatch.setattr(data, name, value)
    with refuses("data.py:", name):
        load(write(tmp_path, items=ITEMS, sequences=SEQUENCES))


def test_where_data_is_looked_for(tmp_path, monkeypatch):
    """A path, $HATLLM_DATA, data/: the first that has items.tsv. A wrong name is not looked for on the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HATLLM_DATA", str(tmp_path / "env"))
    for place in (tmp_path / "data/mine", tmp_path / "env/mine", tmp_path / "mine"):
        place.mkdir(parents=True)
        assert data.find(write(place, items=ITEMS).name).resolve() == place
    (tmp_path / "mine.csv").write_text("1,A pen\n")
    for name, hint in (
        ("mine.csv", "python -m extras.prepare mine.csv ITEMS"),
        ("beuaty", "beauty"),
        ("office", "items.tsv"),
    ):
        with refuses(f"--data {name}", hint):
            data.find(name)


# --- splits ---------------------------------------------------------------------------------------------------------


def timed(seed: int) -> dict[str, list]:
    """30 random users as {user: [(item, time)]}, each item once in all, with many ties in time."""
    rng, users = random.Random(seed), {}
    for u in range(30):
        times = sorted(rng.randrange(40) for _ in range(rng.randint(2, 25)))
        users[f"u{u}"] = [(100 * u + j, float(t)) for j, t in enumerate(times)]
    return users


@pytest.mark.parametrize("seed", range(20))
def test_split_by_time_does_not_leak(seed):
    """By brute force, with ties: which windows there are, their order, and that what is learnt from (also under
    --targets all) is neither held out nor later than the last training target."""
    users = timed(seed)
    parts, learnt = data.split_time(users)
    parts = [parts[name] for name in ("train", "valid", "test")]
    rows, time = [w for part in parts for w in part], {i: t for s in users.values() for i, t in s}
    ends = [(u, s, j) for u, s in users.items() for j in range(len(s)) if j >= HISTORY or j == len(s) - 1]
    every = [([i for i, _ in s[:j]][-HISTORY:], s[j][0], u, s[j][1]) for u, s, j in ends]
    assert rows == sorted(every, key=lambda w: w[3])  # stable: ties as in the file
    assert [len(p) for p in parts[:2]] == [int(0.8 * len(rows)), int(0.1 * len(rows))]
    for earlier, later in zip(parts, parts[1:], strict=False):
        assert max(w.time for w in earlier) <= min(w.time for w in later)
    assert all(time[i] <= time[w.target] == w.time for w in rows for i in w.history)
    held_out, last = {w.target for part in parts[1:] for w in part}, max(w.time for w in parts[0])
    assert learnt == [[i for i, t in s if i not in held_out and t <= last] for s in users.values()]


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out(seed):
    """A user's last item is for test, the one before for validation; training must hold neither as a target."""
    users = timed(seed)
    parts, learnt = data.split_loo(users)
    long = [(u, [i for i, _ in s]) for u, s in users.items() if len(s) > 2]
    for name, n in (("test", 1), ("valid", 2)):
        assert [w[:3] for w in parts[name]] == [(s[:-n][-HISTORY:], s[-n], u) for u, s in long]
    ends = [(s[:j][-HISTORY:], s[j], u) for u, s in long for j in range(1, len(s) - 2) if j >= 10 or j == len(s) - 3]
    assert [w[:3] for w in parts["train"]] == ends and learnt == [s[:-2] for _, s in long]


def test_ties_as_in_the_file_or_shuffled(tmp_path, monkeypatch):
    """Only items of equal time change places; in which way is up to the user's id alone, not to the other lines."""
    times = [0.0] * 20 + [1.0] + [2.0] * 20
    lines = [f"u{u}\t{' '.join(map(str, range(41)))}\t{' '.join(map(str, times))}\n" for u in range(3)]
    index, header = {str(i): i for i in range(41)}, "user_id\titem_ids\ttimes\n"
    filed = data.read_sequences(write(tmp_path, sequences=header + "".join(lines)), index)
    assert filed["u1"] == [*enumerate(times)]
    monkeypatch.setattr(data, "TIES", "shuffled")
    shuffled = data.read_sequences(tmp_path, index)
    assert all(s != filed[u] and [t for _, t in s] == times and sorted(s) == filed[u] for u, s in shuffled.items())
    assert shuffled["u0"] != shuffled["u1"]
    assert data.read_sequences(write(tmp_path, sequences=header + lines[1]), index)["u1"] == shuffled["u1"]


PUBLISHED = [
    "beauty: 22,332 users, 12,086 items, 46,908 / 5,863 / 5,864 train / valid / test windows; 31 more users have too "
    "few items (--core, --split)",
    "office: 4,895 users, 2,414 items, 15,400 / 1,925 / 1,925 train / valid / test windows",
    "books: 14,585 users, 6,342 items, 31,162 / 3,896 / 4,383 train / valid / test windows",
]


@pytest.mark.parametrize("summary", PUBLISHED, ids=lambda s: s[:6])
def test_published_data_sets(summary):
    """Another core, split or rule for untitled items changes the counts. books: MSL's has no validation windows, so
    the latest ninth of the training windows is that; one item has no title, another occurs nowhere."""
    d = data.load(data_root(summary.partition(":")[0]))
    assert d.summary() == summary and all(d.titles)
    assert d.train[-1].time <= d.valid[0].time and d.valid[-1].time <= d.test[0].time
    last = data.examples(d, "last")
    assert [(e.history, e.targets) for e in last] == [(w.history, [(len(w.history), w.target)]) for w in d.train]


def test_untitled_and_unused_items_leave(tmp_path):
    """A history loses its untitled items and is then cut to HISTORY; a window whose target or whole history has no
    title goes. Without validation windows the latest are these, wherever they stand in the file."""
    items = "item_id\ttitle\n1\tA\n2\t\n3\tC\n9\tNever bought\n4\tD\n"
    test, latest, again = f"test\tu\t1 {'4 ' * 10}2 1\t4", "train\tu\t1 2 3\t9", "train\tu\t1 2 3\t1"
    rows = [latest, "train\tu\t1 3 2\t2", "train\tu\t2 3\t3", test]
    header = "split\tuser_id\titem_ids\ttime"
    d = load(write(tmp_path, items=items, windows="\n".join([header, *rows, *[again] * 8])))
    assert d.ids == ["1", "3", "4"]
    assert [w[:2] for w in d.train] == [([0], 1)] * 8 and d.valid == [Window([0], 1, "u", 9.0)]
    assert [w[:2] for w in d.test] == [([2] * HISTORY, 0)]
    assert d.sequences == [[0, 1]] * 8 and d.counts.tolist() == [8, 8, 0]


def test_core_by_brute_force():
    """One user or item that is too rare after the other, until there is none. Catches a single round of it, and users
    with one interaction, who have no history."""
    for seed, k in itertools.product(range(9), (0, 2, 3)):
        rng = random.Random(seed)
        users = {f"u{u}": [(rng.randrange(12), t) for t in range(rng.randint(1, 6))] for u in range(12)}
        kept = {(u, i, t) for u, s in users.items() for i, t in s}
        while True:
            of = [[x[j] for x in kept] for j in (0, 1)]
            rare = [x for x in kept if of[0].count(x[0]) < max(k, 2) or of[1].count(x[1]) < k]
            if not rare:
                break
            kept.remove(rare[0])
        assert {(u, i, t) for u, s in data.core(users, k).items() for i, t in s} == kept


def test_chain_undoes_sliding():
    """Interactions of overlapping windows must be counted once, whatever the order of the lines; a missing window
    begins a new stretch, also where the next history ends with the same item."""
    users = timed(7)
    rows = [data.window(s, at, u) for u, s in users.items() for at in range(1, len(s))]
    random.Random(0).shuffle(rows)
    rows.sort(key=lambda w: (w.time, w.target))  # ties in the users' order, as files have them
    assert sorted(data.chain(rows)) == sorted([i for i, _ in s] for s in users.values())
    rows = [Window([*range(max(0, j - HISTORY), j)], j, "u", float(j)) for j in range(5, 30) if j != 20]
    assert data.chain(rows[::-1]) == [[*range(20)], [*range(11, 30)]]
    assert data.chain([Window([7, 3], 4, "u", 0.0), Window([9, 4], 5, "u", 1.0)]) == [[7, 3, 4], [9, 4, 5]]


def test_digest_tells_data_apart(tmp_path):
    """A run that resumes on other titles, ids, users, windows or interactions must notice. The last change of all only
    moves an interaction out of what is learnt: no window shows it."""

    def digest(old="", new="", split="time"):
        text = "item_id\ttitle\nA\tPen\nB\tInk\nC\tGlue\n|user_id\titem_ids\ttimes\n"
        text += f"u\t{'A B C ' * 8}A\t{' '.join(map(str, range(25)))}\nv\tC B A\t0 1 50\n"
        items, sequences = text.replace(old, new).split("|") if old else text.split("|")
        return load(write(tmp_path, items=items, sequences=sequences), split).digest

    changes = [("Glue", "Tape"), ("C", "D"), ("v\t", "w\t"), ("u\tA B", "u\tA A"), ("20 21", "20 20.5")]
    found = [digest(), digest(split="loo"), *(digest(*x) for x in changes), digest("0 1 50", "0 30 50")]
    assert len({*found}) == len(found) and digest() == found[0]


# --- the trie -------------------------------------------------------------------------------------------------------


def test_the_worked_example():
    """The table in the documentation is what the arrays hold."""
    titles = ["ab", "abc", "ad", "xyz", "q", "q"]
    t = Trie([np.array([*map(ord, title), 0]) for title in titles])
    table = {line.split()[0]: line.split()[1:15] for line in Trie.__doc__.splitlines() if len(line.split()) > 14}
    assert [*map(int, table["node"])] == list(range(len(t.parent)))
    for name in ("fan", "child", "stop"):
        array = getattr(t, name).tolist()
        assert [x for x in zip(table[name], map(str, array), strict=True) if x[0] not in ("-", x[1])] == [], name
    above = [table["title"].index(title[:-1] or '""') for title in table["title"][1:]]
    assert t.parent[1:].tolist() == above
    assert t.token[1:].tolist() == [ord(title[-1]) % ord("$") and ord(title[-1]) for title in table["title"][1:]]
    assert t.leaf_of_item.tolist() == [0, 1, 2, 4, 3, 3] and t.n_leaves == 5


def random_paths(seed: int) -> list[np.ndarray]:
    """Titles over a few tokens with duplicates, beginnings of one another, and runs where only one can follow."""
    rng = random.Random(seed)
    titles = [[rng.randint(2, 4) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 40))]
    titles += [titles[rng.randrange(len(titles))][: rng.randint(1, 5)] for _ in range(5)]
    titles += [titles[0] + [rng.randint(5, 9) for _ in range(6)]] if seed % 2 else []
    rng.shuffle(titles)
    return [np.array([*t, (1, 10)[seed % 2]]) for t in titles]  # the end token is the smallest, or the largest


SMALL = [[[3, 1]], [[1]], [[3, 4, 5, 1]] * 3, [[1], [3, 1], [3, 3, 1]], [[9, 1], [2, 1]]]


@pytest.mark.parametrize("paths", [*SMALL, *map(random_paths, range(20))], ids=len)
def test_trie_by_brute_force(paths):
    """Every array against a dict of prefixes; also one title, one title of three items, no token but the end."""
    paths = [np.array(p) for p in paths]
    trie, titles = Trie(paths), sorted({tuple(p.tolist()) for p in paths})
    below = {}  # prefix -> the titles below it
    for leaf, t in enumerate(titles):
        for n in range(len(t) + 1):
            below.setdefault(t[:n], []).append(leaf)
    order = sorted(below, key=lambda p: (len(p), p))
    number, children = {p: n for n, p in enumerate(order)}, {p: [] for p in order}
    for p in order[1:]:
        children[p[:-1]].append(number[p])
    stop = {p: number[p] for p in order}
    for p in reversed(order[1:]):
        stop[p] = stop[order[children[p][0]]] if len(children[p]) == 1 else number[p]
    assert (len(trie.parent), trie.n_leaves) == (len(order), len(titles))
    arrays = {
        "token": [p[-1] if p else 0 for p in order],
        "parent": [number[p[:-1]] for p in order],
        "depth": [len(p) for p in order],
        "fan": [len(children[p]) for p in order],
        "leaf": [below[p][0] for p in order],
        "leaves": [len(below[p]) for p in order],
        "stop": [stop[p] for p in order],
        "start": [0, *np.cumsum([len(t) for t in titles])],
        "path_node": [number[t[: n + 1]] for t in titles for n in range(len(t))],
        "leaf_of_item": [titles.index(tuple(p.tolist())) for p in paths],
    }
    for name, want in arrays.items():
        assert getattr(trie, name).tolist() == want, name
    assert trie.token[trie.path_node].tolist() == [x for t in titles for x in t]
    row, child = trie.children(torch.arange(len(order)).repeat(2))
    assert row.tolist() == [n for n in range(2 * len(order)) for _ in children[order[n % len(order)]]]
    assert child.tolist() == [c for p in order for c in children[p]] * 2


# --- prompts --------------------------------------------------------------------------------------------------------

ODD = ["A pen", 'The "Red" Pen', "Tom &amp; Jerry &#39;s", "日本語のペン 🖊️", "Ink<|endoftext|>", "<|end|>", "A", " Ink",
       "A pen", "naïve café", "Next:", "Bought:\nA pen", "<|end|> A pen <|end|>"]  # fmt: skip


def tokenizer_of_odd(template: str = "$A"):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, "TINY_VOCABULARY", 330)
        tokenizer = data.train_tokenizer(ODD)
    tokenizer.add_special_tokens(["<|endoftext|>", "<s>", "</s>"])
    ids = [(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return tokenizer


def catalogue(tokenizer, **changes) -> Catalogue:
    return Catalogue(ODD, tokenizer, tiny_config(**dict(vocab_size=tokenizer.get_vocab_size()) | changes))


@cache
def odd() -> Catalogue:
    return catalogue(tokenizer_of_odd())


def test_titles_are_text_in_the_template():
    """A title that spells a special token must not become it: it would end the title, or the document. PROMPT is around
    the titles, to the letter; they are encoded alone, and all tokens but theirs are context."""
    cat, rng, tokenizer, (a, b, c) = odd(), random.Random(0), tokenizer_of_odd(), data.PROMPT
    assert tokenizer.token_to_id("<|end|>") == 0 and not any(0 in t for t in cat.titles)
    assert [x for x in cat.bearers if len(x) > 1] == [[0, 8]] and len(cat.bearers) == len(set(ODD))
    for n in range(1, HISTORY + 1):
        history = [rng.randrange(len(ODD)) for _ in range(n)]
        tokens, item = cat.prompt(history)
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == a + b.join(ODD[i] for i in history) + c
        for k, i in enumerate(history, 1):
            assert tokens[item == k].tolist() == cat.titles[i].tolist()
            assert tokenizer.decode(tokens[item == k].tolist(), skip_special_tokens=False) == ODD[i]
        assert (np.diff(item[item > 0]) >= 0).all() and item.max() == n and not item[-len(cat.header) :].any()


def test_whole_titles_are_tokens(monkeypatch):
    """Each one, also where a title begins or ends another; but for the one that spells the end token, and new ones."""
    monkeypatch.setattr(data, "WHOLE_TITLES", True)
    cat, tokenizer = odd.__wrapped__(), tokenizer_of_odd()
    assert [len(t) == 1 for t in cat.titles] == [title != "<|end|>" for title in ODD]
    assert len({tuple(t) for t in cat.titles}) == len(set(ODD))
    assert [len(part) for part in (cat.instruction, cat.separator, cat.header)] == [1, 1, 1]
    new = tokenizer.encode("A pen, red", add_special_tokens=False).ids
    assert len(new) > 2 and tokenizer.decode(new) == "A pen, red"
    e = data.encode(cat, data.Example([0, 1], [(2, 3)]), True)
    assert len(e["tokens"]) == 5 and len(e["at"]) == 1  # one choice among all titles, after the header


@pytest.mark.parametrize("whole", [False, True])
def test_the_prompt_may_be_a_chat_template(monkeypatch, whole):
    """Catches its special tokens read as letters, and a tokenizer that is another one once it is saved and read."""
    monkeypatch.setattr(data, "WHOLE_TITLES", whole)
    monkeypatch.setattr(data, "PROMPT", ("<s>", "\n", "<|end|>"))
    tokenizer = tokenizer_of_odd()
    back = data.Tokenizer.from_str(tokenizer.to_str())
    for t in (tokenizer, back):
        cat = catalogue(t)
        assert (*cat.instruction, *cat.header) == (t.token_to_id("<s>"), 0)
        assert [t.tolist() for t in cat.titles] == [t.tolist() for t in catalogue(tokenizer).titles]
    cat = catalogue(tokenizer_of_odd("<s> $A"))
    assert cat.prompt([0])[0].tolist().count(tokenizer.token_to_id("<s>")) == 1  # it begins with bos, as Llama 3's does


def test_only_titles_begin_anew():
    """SentencePiece marks where a text begins. A separator follows a title, so no mark belongs between them."""
    tokenizer = Tokenizer(models.BPE(unk_token="?", byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    titles = ["red pen", "ink well"]
    tokenizer.train_from_iterator([*titles, *data.PROMPT, "a"], trainers.BpeTrainer(special_tokens=["?"]))
    cat = Catalogue(titles, tokenizer, tiny_config(vocab_size=tokenizer.get_vocab_size()))
    shown = "".join(tokenizer.id_to_token(t) for t in cat.prompt([0, 1])[0].tolist())
    assert shown == "_The_user_bought,_oldest_first:\n_red_pen\n_ink_well\nNext:\n"


def test_a_history_shows_texts_and_the_target_is_a_title(monkeypatch):
    """Catches spans of the titles' lengths, a target that is cut or carries the other columns, a cut separator."""
    monkeypatch.setattr(data, "TEXT_TOKENS", 7)
    tokenizer, texts = tokenizer_of_odd(), [f"{t}, Acme" for t in ODD]
    cat = Catalogue(ODD, tokenizer, tiny_config(vocab_size=tokenizer.get_vocab_size()), texts)
    history, whole = [3, 1, 4, 1], [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    tokens, item = cat.prompt(history)
    _, _, source = data.collate_prompts(cat, [history])
    every = [t for text in whole for t in text[:7]]  # what the item cache is computed from
    assert (
        [every[s] for s in source[0, item > 0]] == tokens[item > 0].tolist() == sum((whole[i][:7] for i in history), [])
    )
    assert data.n_title_tokens(cat, [Example(history, [(4, 2)])]) == len(cat.titles[2]) + 1
    assert max(map(len, whole)) > 7 and [t.tolist() for t in cat.titles] == [t.tolist() for t in odd().titles]
    for name in ("token", "leaf_of_item"):
        assert torch.equal(getattr(cat.trie, name), getattr(odd().trie, name))


def test_columns_of_the_history(tmp_path):
    """Empty columns leave no comma; an item without any shows its title; the digest tells such runs apart."""
    write(tmp_path)
    rows = ["item_id\tbrand\ttitle\tprice", "a\tAcme\tred\t3", "b\t\tblue\t", "c\tBig  Co\tglue\t1", "d\t\tink\t2"]
    (tmp_path / "items.tsv").write_text("\n".join(rows))
    (tmp_path / "sequences.tsv").write_text("user_id\titem_ids\ttimes\n" + "u\ta b c d a b c d\t1 2 3 4 5 6 7 8\n")
    d = data.load(tmp_path, "loo", k=0, columns="title,brand,price")
    assert d.texts == ["red, Acme, 3", "blue", "glue, Big Co, 1", "ink, 2"] and d.titles == [
        "red",
        "blue",
        "glue",
        "ink",
    ]
    assert data.load(tmp_path, "loo", k=0, columns="brand").texts == ["Acme", "blue", "Big Co", "ink"]
    assert data.load(tmp_path, "loo", k=0).texts == d.titles and data.load(tmp_path, "loo", k=0).digest != d.digest
    (tmp_path / "new.tsv").write_text("\n".join([rows[0], "a\tAcme\tred\t4"]))
    newer, candidates = data.renew(d, tmp_path / "new.tsv", "title,brand,price")  # what is gone keeps its text
    assert newer.texts == ["red, Acme, 4", *d.texts[1:]] and candidates == [0]
    with refuses("items.tsv", "line 1", "colour"):
        data.load(tmp_path, "loo", k=0, columns="title,colour")


@pytest.mark.parametrize("template, first", [("<s> $A </s>", 1), ("$A </s>", 0), ("<s> <s> $A", 2)])
def test_what_a_tokenizer_puts_first_stays_first(template, first):
    """Llama 3 puts a begin token before a text; without it the model is out of its training. An end after it is not
    for a text that goes on; and titles have neither."""
    tokenizer = tokenizer_of_odd(template)
    (tokens, item), (plain, context) = (cat.prompt([0, 1]) for cat in (catalogue(tokenizer), odd()))
    assert tokens.tolist() == [tokenizer.token_to_id("<s>")] * first + plain.tolist()
    assert item.tolist() == [0] * first + context.tolist()


def test_titles_are_whole_and_the_same_from_call_to_call(tmp_path):
    """tokenizer.json may say that texts are cut, padded, or split at random: right for training, not for titles."""
    tokenizer = tokenizer_of_odd()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    tokenizer.model.dropout = 0.9
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = catalogue(data.read_tokenizer(tmp_path)).titles
    assert [t.tolist() for t in found] == [t.tolist() for t in odd().titles]


def test_tokenizers_that_do_not_fit(tmp_path):
    """The library raises a bare Exception; a token beyond the embedding is an index error deep in the model."""
    for text in ("{", "{}", '{"model": {}}'):
        with refuses("tokenizer.json"):
            data.read_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text(text)
    with refuses(ODD[3], token := int(odd().titles[3][0])):
        catalogue(tokenizer_of_odd(), eos_token_id=token)
    tokenizer = tokenizer_of_odd()
    most = tokenizer.token_to_id(data.PROMPT[2])  # the last one, which the prompt needs
    with refuses(f"a token {most}, but the model has {most};"):
        catalogue(tokenizer, vocab_size=most)


# --- examples and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trie_only", [False, True])
def test_training_reads_the_prompt_of_evaluation(trie_only):
    """The template exists once: another prompt in training than in evaluation costs accuracy and shows nowhere. A row
    of the masked softmax is where titles part, and nothing after the last one is read."""
    cat = odd()
    for history, target in [([0], 1), ([3, 2, 1], 0), ([4, 5, 9], 6), ([1, 0], 12)]:
        c = data.encode(cat, Example(history, [(len(history), target)]), trie_only)
        tokens, item = cat.prompt(history)
        title, T = [*cat.titles[target].tolist(), 0], len(tokens)
        others = [[*cat.titles[i].tolist(), 0] for i in range(len(ODD))]
        steps = [n for n in range(len(title)) if len({t[n] for t in others if t[:n] == title[:n]}) > 1 or not trie_only]
        fed = title[: steps[-1]]
        assert c["tokens"].tolist() == [*tokens, *fed]
        assert c["item"].tolist() == [*item, *[TARGET] * len(fed)] and not c["branch"].any()
        assert c["at"].tolist() == [T - 1 + n for n in steps]
        paths = cat.trie.path_node[cat.trie.start[cat.trie.leaf_of_item[target]] :].tolist()
        assert c["next"].tolist() == [paths[n] for n in steps]


@pytest.mark.parametrize("trie_only", [False, True])
def test_branches_hold_separate_prompts(trie_only):
    """A branch, with what it sees of the trunk, is token by token the prompt of its own target."""
    cat, history, targets = odd(), [3, 1, 4, 0], [(1, 1), (2, 4), (3, 0), (4, 12)]
    c = data.encode(cat, Example(history, targets), trie_only)
    for b, (k, target) in enumerate(targets, 1):
        own = data.encode(cat, Example(history[:k], [(k, target)]), trie_only)
        at = np.flatnonzero(c["branch"] == b)
        seen, mine = np.append(np.arange(c["fork"][at[0]]), at), np.isin(c["at"], at)
        assert not c["branch"][: c["fork"][at[0]]].any() and len({*c["fork"][at]}) == 1
        assert all(c[x][seen].tolist() == own[x].tolist() for x in ("tokens", "item"))
        assert c["next"][mine].tolist() == own["next"].tolist()
        assert np.searchsorted(seen, c["at"][mine]).tolist() == own["at"].tolist()
    pair = [Example(history, targets), Example([0], [(1, 2)])]
    assert data.n_title_tokens(cat, pair) == sum(len(cat.titles[t]) + 1 for t in (1, 4, 0, 12, 2))


@pytest.mark.parametrize("most", [1, 2, 3, 4, 10])
def test_every_item_is_a_target_once(most, monkeypatch):
    """--targets all: each item with one before it, once, with its last items as the history: all of them up to HISTORY,
    else more than half of HISTORY. Catches a target whose history holds it, or is empty."""
    monkeypatch.setattr(data, "HISTORY", most)
    sequences = [[100 * n + j for j in range(n)] for n in range(1, 45)]
    found = data.examples(data.Dataset(None, [], [], [], [], [], [], sequences), "all")
    pairs = [(e.history[:k], t) for e in found for k, t in e.targets]
    assert sorted(t for _, t in pairs) == sorted(i for s in sequences for i in s[1:])
    for history, t in pairs:
        n = t % 100
        assert history == list(range(t - len(history), t))
        assert len(history) == n if n <= most else most / 2 < len(history) <= most
    assert all(0 < k <= len(e.history) for e in found for k, _ in e.targets)
    assert all(e.targets[-1][0] == len(e.history) <= most for e in found)
    assert most < 10 or len(found) == sum(1 + max(0, -(-(n - 11) // 5)) for n in range(2, 45))


def test_collate():
    """Right-padded with item -1; rows point to the same tokens as before; no branches where all have one target."""
    cat = odd()
    examples = [Example([0], [(1, 1)]), Example([3, 1, 4], [(1, 1), (3, 4)]), Example([2, 4, 9, 1], [(4, 12)])]
    coded = [data.encode(cat, e, True) for e in examples]
    b, T = data.collate(cat, coded), max(len(c["tokens"]) for c in coded)
    for name, filler in (("tokens", 0), ("item", -1), ("branch", 0), ("fork", 0)):
        assert getattr(b, name).tolist() == [[*c[name], *[filler] * (T - len(c[name]))] for c in coded]
    assert b.rows.tolist() == [n * T + a for n, c in enumerate(coded) for a in c["at"]]
    trie, following = cat.trie, [v for c in coded for v in c["next"].tolist()]
    assert b.next.tolist() == following and trie.columns[trie.column[b.next]].tolist() == trie.token[b.next].tolist()
    assert b.parents[b.parent].tolist() == trie.parent[following].tolist() and len(b.parents) == len(
        {*b.parents.tolist()}
    )
    assert b.M == sum(int((trie.parent[1:] == parent).sum()) for parent in b.parents)
    wide = data.collate(cat, coded, 64)
    assert wide.tokens.shape[1] % 64 == 0 and (wide.item[:, T:] == -1).all()
    assert wide.tokens.flatten()[wide.rows].tolist() == b.tokens.flatten()[b.rows].tolist()
    single = data.collate(cat, [coded[0], coded[2]]).to("cpu")
    assert single.branch is None and single.fork is None
    tokenizer = tokenizer_of_odd("<s> $A")
    longer = Catalogue(ODD, tokenizer, tiny_config(vocab_size=tokenizer.get_vocab_size()), [f"{t}, Acme" for t in ODD])
    for c, some, trie_only in itertools.product((cat, longer), (examples, examples[:1]), (False, True)):
        sizes = [len(data.encode(c, e, trie_only)["tokens"]) for e in some]
        assert data.longest(c, some, trie_only) == max(sizes)


def test_collate_prompts():
    """As prompt(), right-padded with item -1; source leads from a title's token to its state in the item cache."""
    cat, histories = odd(), [[0], [3, 2, 1, 0], [5, 8]]
    tokens, item, source = data.collate_prompts(cat, histories)
    place = [(i, n) for i, t in enumerate(cat.titles) for n in range(len(t))]
    for row, h in enumerate(histories):
        t, i = cat.prompt(h)
        rest = [0] * (tokens.shape[1] - len(t))
        assert tokens[row].tolist() == [*t, *rest] and item[row].tolist() == [*i, *[x - 1 for x in rest]]
        assert ((source[row] >= 0) == (item[row] > 0)).all()
        of = [place[s] for s in source[row].tolist() if s >= 0]  # this very title, not another of the same tokens
        assert of == [(x, n) for x in h for n in range(len(cat.titles[x]))]


def test_batches():
    """All once, longest first, in the room that is given, padding included; a text that is longer stands alone."""
    lengths = [5, 1, 30, 7, 7, 2, 0]
    found = data.batches(lengths, 16)
    assert sorted(np.concatenate(found).tolist()) == list(range(7)) and found[0].tolist() == [2]
    assert all(len(b) * max(lengths[i] for i in b) <= 16 for b in found[1:]) and len(found) == 4


@pytest.mark.parametrize("gpu", [False, True])
def test_ahead(gpu, monkeypatch):
    """In order, nothing lost, one more than is asked for at most (memory), and what fails in the thread is raised."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    made = []
    some = data.ahead(lambda x: made.append(x) or x, range(9))
    assert next(some) == 0 and len(made) <= 2 and [*some] == [*range(1, 9)] and not [*data.ahead(str, [])]
    with pytest.raises(ZeroDivisionError):
        list(data.ahead(lambda x: 1 // x, [1, 0]))
