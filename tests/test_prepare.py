"""extras/prepare.py: every format gives the same folder; what is left out is counted; what is wrong is a sentence."""

import gzip
import json
import os
import random

import pytest
from conftest import refuses

import data
from extras import prepare

A, B, C = 1400000000, 1400086400, 1400172800  # 2014-05-13, -14, -15 at 16:53:20
SEQUENCES = f"user_id\titem_ids\ttimes\n1\t1 2\t{A} {B}\n2\t2\t{C}\n"
EVENTS = [("1", "2", B), ("2", "2", C), ("1", "1", A)]


def table(path):
    return gzip.open(path, "rt", encoding="utf-8", newline="").read()


def write(path, content):
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def made(folder, interactions, items, **given):
    """items.tsv, sequences.tsv and notes of two files, each (name, content)."""
    paths = [write(folder / name, content) for name, content in (interactions, items)]
    given = {role: [given[role]] if role in given else names for role, names in prepare.NAMES.items()}
    _, notes = prepare.prepare(*paths, folder / "made", given)
    return table(folder / "made/items.tsv.gz"), table(folder / "made/sequences.tsv.gz"), notes


def lines(form, events=EVENTS):
    return "".join(form.format(u=u, i=i, t=t) + "\n" for u, i, t in events)


FORMATS = {  # interactions, items, further columns of the items
    "csv": (
        ("r.csv", "rating,Item ID,time,userId\n" + lines("5,{i},{t},{u}")), ("i.csv", "title,id\nPen,1\nInk,2\n"), [],
    ),
    "semicolons, quotes, byte order mark, Windows": (
        ("r.csv", '\ufeff"customer";"sku";"date"\r\n' + lines('"{u}";"{i}";"{t}"').replace("\n", "\r\n")),
        ("i.csv.gz", '\ufeff"Brand; or maker";SKU;product\r\n"B";1;"Pen"\r\n;2;Ink\r\n'),
        ["Brand; or maker"],
    ),
    "tabs, quotes": (
        ("r.tsv", '"userId"\t"Item ID"\t"time"\n' + lines('"{u}"\t{i}\t{t}')),
        ("i.tsv", 'product_id\t"item ID"\ttitle\t\t\n2\t1\t"Pen"\t\t\n1\t2\tInk\t\t\n'),
        ["product_id"],
    ),
    "one file": (sales := ("s.tsv", "name\tuser\titem\tdate\nInk\t1\t2\t2014-05-14T16:53:20\n"
                 "Ink\t2\t2\t2014-05-15 18:53:20+02:00\nPen\t1\t1\t2014-05-13 16:53:20 UTC\n"), sales, []),
    "one file, names of customers and kinds of items": (
        shop := ("s.txt", "customer_id|name|item|sku|product_name|date\n"
                 + lines('{u}|Jane|pens|{i}| "{i}"|{t}').replace('"1"', '"Pen"').replace('"2"', '"Ink"')), shop, []),
    "RecBole": (
        ("x.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + lines("{u}\t{i}\t5.0\t{t}.0")),
        ("x.item", 'item_id:token\ttitle:token_seq\tbrand:token\n1\tPen\t"Old" pens\n2\tInk\t\n'),
        ["brand"],
    ),
    "MovieLens 100K": (
        ("u.data", lines("{u}\t{i}\t5\t{t}")), ("u.item", "1|Pen|01-Jan-1995||http|0|1\n2|Ink|||http|0|1\n\n"),
        ["release_date"],
    ),
    "MovieLens 1M": (
        ("ratings.dat", lines("{u}::{i}::5::{t}")), ("movies.dat.gz", '1::Pen::"War" or not\n2::Ink::War\n'),
        ["genres"],
    ),
    "Amazon 2014, 2018": (
        ("r.json.gz", lines('{{"reviewerID": "{u}", "asin": "{i}", "summary": "title", "unixReviewTime": {t}}}')),
        ("m.json", "{'asin': '9', 'title': never read}\n"
                   "{'asin': '1', 'categories': [['x']], 'title': 'Pen', 'price': 2.5}\n"
                   "{'asin': '2', 'title': \"Ink\"}\n"),
        ["price"],
    ),
    "Amazon 2023": (
        ("r.jsonl", lines('{{"title": "!", "asin": "", "parent_asin": "{i}", "user_id": "{u}", "timestamp": {t}000}}')),
        ("m.jsonl", '{"main_category": "All", "features": ["x"], "price": null, "parent_asin": "1", "title": "Pen"}\n'
                    '{"price": 3.5, "parent_asin": "2", "title": "Ink"}\n'),
        ["main_category", "price"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_folder(tmp_path, name):
    interactions, items, further = FORMATS[name]
    found, sequences, notes = made(tmp_path, interactions, items)
    assert sequences == SEQUENCES
    header, *rows = [line.split("\t") for line in found.splitlines()]
    assert header == ["item_id", "title", *further]
    assert sorted(row[:2] for row in rows) == [["1", "Pen"], ["2", "Ink"]] and all(len(r) == len(header) for r in rows)
    assert set(notes) <= {"lines of items that nobody bought are left out"}


def test_awkward_titles_through_to_the_data_set(tmp_path):
    """Quoted commas, line breaks and tabs move no column; entities and Windows-1252 become what they stand for."""
    titles = ['Pen, red "fine"', "Two\r\nlines", "A\ttab", "R&amp;D", '5" nail', "Crème’s", " 墨水 ★ ", "Two\u2028more"]
    quoted = ['"' + t.replace('"', '""') + '"' for t in titles]
    items = b"\n".join(
        [b"item,title", *(f"i{n},{t}".encode("cp1252" if "è" in t else "utf-8") for n, t in enumerate(quoted))]
    )
    rng = random.Random(0)
    events = [(f"user {u}", f"i{i}", rng.random() * 1e9) for u in range(20) for i in rng.sample(range(8), 5)]
    _, _, notes = made(tmp_path, ("r.csv", "user,item,time\n" + lines("{u},{i},{t}", events)), ("i.csv", items))
    d = data.load(tmp_path / "made", "time", 0)
    expected = ['Pen, red "fine"', "Two lines", "A tab", "R&D", '5" nail', "Crème’s", "墨水 ★", "Two more"]
    assert dict(zip(d.ids, d.titles, strict=True)) == {f"i{n}": t for n, t in enumerate(expected)}
    seen = data.read_sequences(d.folder, {x: x for x in d.ids})
    users = {u for u, _, _ in events}
    assert seen == {user: [(i, t) for u, i, t in sorted(events, key=lambda e: e[2]) if u == user] for user in users}
    assert list(notes.values()) == [[1, f"{tmp_path}/i.csv, line 8"]] and "Windows-1252" in list(notes)[0]


def test_quotes_in_a_table_with_tabs_are_text(tmp_path):
    """Where a quote opens a field, as in CSV, the lines as far as the next quote become one title."""
    titles = ['"Best of', 'TV 24"', '"Ink" well, 50 ml', '"5"" nail"', '""']
    items = ("i.tsv", "item\ttitle\n" + "".join(f"{n}\t{t}\n" for n, t in enumerate(titles)))
    found, _, notes = made(tmp_path, ("r.csv", GOOD.replace("a", "0") + "u,1,2\nu,2,3\nu,3,4\nu,4,5\n"), items)
    assert [line.split("\t")[1] for line in found.splitlines()[1:]] == [*titles[:3], '5" nail']
    assert "interactions are left out: " in [*notes][1] and len(notes) == 2  # the last has no title


def test_what_is_no_number_is_no_name(tmp_path):
    """Python writes what is missing as NaN; it would be one user for all, and one title."""
    lines = '{"user": NaN, "item": "1", "time": 5}\n{"user": "u", "item": "2", "time": 5}\n'
    items = '{"item": "1", "title": NaN}\n{"item": "2", "title": "Ink"}\n'
    found, sequences, _ = made(tmp_path, ("r.json", lines), ("i.json", items))
    assert found.endswith("\n2\tInk\n") and sequences.endswith("\nu\t2\t5\n") and "nan" not in found + sequences


def test_items_that_nobody_can_name_are_left_out(tmp_path):
    """The folder could not be read, or an item without an id would be recommended."""
    paths = [
        write(tmp_path / "r.csv", GOOD),
        write(tmp_path / "i.csv", "item,title\na,Pen\n,No\n9 a,No\na\tb,No\nb,Ink\n"),
    ]
    _, notes = prepare.prepare(*paths, tmp_path / "made", all_items=True)
    assert [*notes.values()] == [[3, f"{tmp_path}/i.csv, line 3"]]
    assert [*data.read_items(tmp_path / "made/items.tsv")] == ["a", "b"]


def test_the_order_of_the_interactions_tells_nothing_but_ties(tmp_path):
    events = [(f"{u}", f"{i % 7}", 1000 * u + i) for u in range(12) for i in range(9)]
    items = ("i.csv", "item,title\n" + "".join(f"{i},T{i}\n" for i in range(7)))
    found = []
    for n, event_order in enumerate((events, random.Random(1).sample(events, len(events)))):
        (tmp_path / str(n)).mkdir()
        found.append(made(tmp_path / str(n), ("r.csv", "user,item,time\n" + lines("{u},{i},{t}", event_order)), items))
    assert found[0] == found[1] and found[0][1].splitlines()[-1].startswith("11\t0 1 2 3 4 5 6 0 1\t11000 11001 ")
    ties = ("r.csv", "user,item,time\n" + lines("{u},{i},{t}", [("1", "5", 9), ("1", "3", 9), ("1", "4", 8)]))
    assert made(tmp_path, ties, items)[1].endswith("\n1\t4 5 3\t8 9 9\n")


def test_what_is_left_out_is_counted_with_the_first_line(tmp_path):
    rows = 'u,a,100|u,a,100|u,a,200|u,b c,9|"u\tv",a,9|v,a,yesterday|,a,100|u,x,100|v,,|u,x,1|w,y,5|u,a,100'.split("|")
    items = "item,title\nb,Nobody's\na,Pen\ny, \na,Pen\na,Other\n"
    found, sequences, notes = made(tmp_path, ("r.csv", "user,item,time\n" + "\n".join(rows)), ("i.csv", items))
    assert found == "item_id\ttitle\na\tPen\n" and sequences == "user_id\titem_ids\ttimes\nu\ta a\t100 200\n"
    r, i = f"{tmp_path}/r.csv, line ", f"{tmp_path}/i.csv, line "
    expected = [
        ("duplicates", 2, r + "3"),
        ("has a space", 2, r + "5, 'b c'"),
        ("time is no", 1, r + "7, 'yesterday'"),
        ("without a user", 2, r + "8"),
        ("nobody", 1, i + "2"),
        ("without a title", 1, i + "4"),
        ("another title", 1, i + "6"),
        ("no title of", 3, r + "9"),
    ]
    assert len(notes) == len(expected)
    for (what, n_first), (words, n, first) in zip(notes.items(), expected, strict=True):
        assert words in what and n_first == [n, first]


@pytest.mark.parametrize("text, expected", [
    ("1400000000", A), (A, A), (1400000000.5, A + 0.5), ("1400000000123", A + 0.123), (A * 10**6, A), (A * 10**9, A),
    ("2014-05-13", 1399939200), ("20140513", 1399939200), ("2014-05-13T16:53:20Z", A), ("2014-05-13 18:53:20+02:00", A),
    ("15265", 15265), ("1.4e9", A), ("0", 0), ("-1", None), ("nan", None), ("inf", None), ("9" * 300, None), ("", None),
    (None, None), ("13.05.2014", None), ("2014-13-01", None), ("1960-01-01", None),
    ("9999-12-31", None),
])  # fmt: skip
def test_times(text, expected):
    assert prepare.seconds(text) == expected


GOOD = "user,item,time\nu,a,1\n"
BAD = [  # interactions, items, what the sentence names
    ("", "", ["r.csv", "line 1"]), ("PK\x03\x04\0\0\n", "", ["r.csv", "CSV"]), (GOOD, "", ["i.csv", "line 1"]),
    ("who,item,time\nu,a,1\n", "", ["r.csv, line 2", "user", "--user", "who, item, time"]),
    ("196\t242\t3\t881250949\n1\t2\t3\t4\n", "", ["r.csv", "--user"]), (GOOD + "u,a\n", "", ["r.csv, line 3", "3 col"]),
    (GOOD + "u,a,1,2\n", "", ["r.csv, line 3", "3 col"]), ("user,item,time,user\nu,a,1,v\n", "", ["line 1", "twice"]),
    (GOOD + 'u,"a"b,1\n', "", ["r.csv, line 3", "quote"]), (GOOD + 'u,"a', "", ["r.csv, line 3", "quote"]),
    ("user,item,time\nu,a b,1\n", "item,title\na b,Pen\n", ["r.csv, line 2", "a b", "space"]),
    ('{"user": "u", "item": "a", "time": 1}\n["user"]\n', "", ["r.csv, line 2", "JSON"]),
    ('[{"user": "u",\n', "", ["r.csv, line 1", "JSON"]),
    (GOOD, "{'asin': 'a', 'title': 'open\n", ["i.csv, line 1", "JSON"]),
    (GOOD, "item,what\na,Pen\n", ["i.csv", "--title", "item, what"]),
    (GOOD, "what,title\na,Pen\n", ["i.csv, line 2", "--item"]), (GOOD, "item,title\n", ["i.csv", "header"]),
    (GOOD, '{"item": "a", "title": ["Pen"]}\n', ["r.csv", "no interaction is left"]),
    (GOOD, "item,title\nb,Pen\n", ["r.csv", "no interaction is left", "r.csv, line 2"]),
    ("user,item,time\n", "item,title\na,Pen\n", ["r.csv", "it has none"]),
]  # fmt: skip


@pytest.mark.parametrize("interactions, items, parts", BAD)
def test_bad_input_is_a_sentence_and_no_folder(tmp_path, interactions, items, parts):
    with refuses(*parts):
        made(tmp_path, ("r.csv", interactions), ("i.csv", items))
    assert sorted(os.listdir(tmp_path)) == ["i.csv", "r.csv"]


def test_columns_can_be_given(tmp_path):
    """A given name counts before one that is known; a wrong one is said, not passed over."""
    interactions = ("r.csv", "user,Kunde,Artikel,time,wann,kunde\nx,u,a,7,5,y\n")
    items = ("i.csv", "Artikel,title,Titel,brand\na,X,Pen,B\n")
    given = dict(user="Kunde", item="Artikel", time="wann", title="Titel")
    found, sequences, _ = made(tmp_path, interactions, items, **given)
    assert found == "item_id\ttitle\tbrand\na\tPen\tB\n" and sequences.endswith("\nu\ta\t5\n")
    (tmp_path / "made").rename(tmp_path / "old")
    for role in given:
        with refuses(f"--{role}"):
            made(tmp_path, interactions, items, **given | {role: "Wer"})


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    files = ("r.csv", GOOD), ("i.csv", "item,title\na,Pen\n")
    (tmp_path / "made").mkdir()
    with refuses(tmp_path / "made", "--out"):
        made(tmp_path, *files)
    (tmp_path / "made").rmdir()
    monkeypatch.setattr(prepare, "write_table", lambda path, *_: path.write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path, *files)
    assert sorted(os.listdir(tmp_path)) == ["i.csv", "r.csv"]


def test_the_command_says_what_it_made_and_what_comes_next(tmp_path, capsys):
    paths = [
        str(write(tmp_path / "r.csv", GOOD + "u,a,1\n")),
        str(write(tmp_path / "i.json", json.dumps(dict(item="a", title="Pen")))),
    ]
    argv = [*paths, "--out", str(tmp_path / "my/shop")]
    prepare.main(argv)
    out = capsys.readouterr().out
    assert (
        "1 users, 1 items, 1 interactions" in out
        and f"1 duplicates (same user, item and time) are left out; the first: {paths[0]}, line 3" in out
    )
    assert out.endswith(f"next: python train.py --data {tmp_path}/my/shop\n")
    with refuses("my/shop is there already"):
        prepare.main(argv)


def test_a_json_line_without_a_time_is_counted(tmp_path):
    lines = '{"user": "u", "item": "1", "time": 5}\n{"user": "u", "item": "1"}\n'
    *_, notes = made(tmp_path, ("r.json", lines), ("i.csv", "item,title\n1,Pen\n"))
    assert [*notes.values()] == [[1, f"{tmp_path}/r.json, line 2, None"]]


def test_what_an_ordinary_shop_has(tmp_path, capsys):
    """The two files call the item differently, names vary in case and spaces, and one item is new."""
    orders = write(tmp_path / "o.csv", "Customer,ref,Order Date,day\nu,1,2020-01-01,x\nu,2,2020-01-02,x\n")
    products = write(tmp_path / "p.csv", "code,Name\n1,Pen\n2,Ink\n3,New\n")
    flags = [str(orders), str(products), "--item", "ref,code", "--time", "order_date"]
    prepare.main([*flags, "--out", str(tmp_path / "made")])
    assert table(tmp_path / "made/items.tsv.gz") == "item_id\ttitle\n1\tPen\n2\tInk\n"
    prepare.main([*flags, "--out", str(tmp_path / "all"), "--all_items"])
    assert table(tmp_path / "all/items.tsv.gz").endswith("3\tNew\n")
    with refuses("o.csv, line 2", "times (when)", "--time", "Order Date, day"):
        prepare.main([*flags[:4], "--time", "when", "--out", str(tmp_path / "no")])
