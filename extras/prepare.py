"""What you have -> the project's form: a folder with items.tsv.gz and sequences.tsv.gz.

    python -m extras.prepare ratings.csv products.csv --out data/shop
    python -m extras.prepare sales.csv sales.csv --out data/shop       # the titles stand beside the interactions

It reads, packed with .gz or not,
    tables with a header line: CSV, or semicolons, tabs or | between the columns, in any order, with CSV's quotes (in a
    table with tabs only around a whole text, on one line: else a quote is text);
    RecBole's .inter and .item;
    MovieLens' files without a header, known by their names: u.data, u.item, ratings.dat, movies.dat;
    Amazon's reviews and metadata of 2014, 2018 and 2023, and other files with one JSON object a line.
Columns are known by their names (NAMES below) or given: --user --item --time --title. Times are ISO 8601 (UTC unless
they say otherwise) or numbers since 1970: seconds, ms or finer. Interactions may stand in any order; equal times keep
the file's. Further columns of the items stay where they are plain text. What is left out is counted and reported.
"""

import ast
import csv
import gzip
import html
import itertools
import json
import re
import shlex
import sys
import tempfile
import zlib
from collections import Counter
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from eval import Parser, run_main
from hatllm import InputError

NAMES = {  # what a column may be called, the most telling first; in small letters, without _ and the like
    "user": "userid user uid reviewerid customerid customer memberid visitorid sessionid".split(),
    "item": "parentasin asin itemid movieid productid articleid bookid sku stockcode item".split(),
    "time": "unixreviewtime timestamp times time unixtime datetime date eventtime createdat orderdate".split(),
    "title": "title itemtitle producttitle movietitle booktitle itemname productname name product".split(),
}
MOVIELENS = {  # files without a header: what stands between the columns, and the first columns
    "u.data": ("\t", "user item rating timestamp"),
    "u.item": ("|", "item title release_date"),
    "ratings.dat": ("::", "user item rating timestamp"),
    "movies.dat": ("::", "item title genres"),
}


def note(notes, what, where, n=1):
    """notes: {what is reported at the end: [how often, where first]}"""
    notes.setdefault(what, [0, where])[0] += n


def rows(path, notes, wanted=None):
    """(where, {column: value}) of every line of a file. What it is, its first line and its name tell."""
    try:
        text = lines(path, notes)
        first = next(text, "")
        if not first.strip() or "\0" in first:
            raise InputError(f"{path}, line 1: no text; a table with a header (CSV, UTF-8) or JSON lines are needed")
        read = json_rows if first.lstrip()[0] in "{[" else table_rows
        for number, row in read(path, itertools.chain([first], text), wanted):
            yield f"{path}, line {number}", row
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None


def lines(path, notes):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        bar = tqdm(file, desc=path.name, unit=" lines", unit_scale=True, leave=False, disable=None)
        for number, line in enumerate(bar, 1):
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:
                note(notes, "lines are not UTF-8 and were read as Windows-1252", f"{path}, line {number}")
                yield line.decode("cp1252", "replace")


def json_rows(path, text, wanted):
    """One JSON object a line. Amazon's metadata of 2014 are Python literals instead."""
    for number, line in enumerate(text, 1):
        literal = line.startswith("{'")
        asin = re.search(r"'asin': '(\w+)'", line) if literal else None
        try:
            if asin and wanted is not None and asin[1] not in wanted:
                yield number, {"asin": asin[1]}  # 95% of the lines: to read the rest of them would take minutes
            elif line.strip():
                yield number, dict((ast.literal_eval if literal else json.loads)(line))
        except Exception as e:  # whatever a parser says of a line
            raise InputError(f"{path}, line {number}: not one JSON object ({e})") from None


def table_rows(path, text, _):
    """A table with a header, or one of MovieLens'."""
    name, first = path.name.removesuffix(".gz"), next(text)
    between, columns = MOVIELENS.get(name, (max("\t,;|", key=first.count), ""))
    typed = re.search(r":(token|float)(_seq)?\s*$", first)  # RecBole's header: item_id:token, title:token_seq
    # else a quote is text; between tabs csv would read on as far as the next one, over many lines
    quoting = csv.QUOTE_NONE if columns or between == "\t" else csv.QUOTE_MINIMAL
    text = itertools.chain([first], text)
    if between == "::":  # csv knows single characters only
        text, between = (line.replace("::", "\x1f") for line in text), "\x1f"
    known = dict(delimiter=between, quoting=quoting, strict=True, skipinitialspace=True)
    table = csv.DictReader(text, columns.split() or None, **known)
    try:
        table.fieldnames = [c.split(":")[0] if typed else unquoted(c) for c in table.fieldnames]
        if any(n > 1 for name, n in Counter(table.fieldnames).items() if name):
            raise InputError(f"{path}, line 1: a column stands there twice")
        for row in table:
            if name in MOVIELENS:
                row.pop(None, None)  # the further columns
            if None in row or None in row.values():
                raise InputError(f"{path}, line {table.line_num}: not {len(table.fieldnames)} columns")
            yield table.line_num, {c: unquoted(value) for c, value in row.items()} if between == "\t" else row
    except csv.Error as e:
        where = f"{path}, line {table.reader.line_num}"
        raise InputError(f"{where}: {e}; does a text that begins with a quote end with one?") from None


def unquoted(text):
    """'"5"" nail"' -> '5" nail', as other programs write a text with a quote in it."""
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', text)
    return whole[1].replace('""', '"') if whole else text


def find_columns(where, row, names, needed):
    """names: {role: what its column may be called} -> {role: column}. The needed roles must have one."""
    there, found = {plain(column): column for column in row} | {column: column for column in row}, {}
    for role, telling in names.items():
        found[role] = next((there[name] for word in telling for name in (word, plain(word)) if name in there), None)
        if role in needed and found[role] is None:
            asked, columns = " or ".join(telling[:3]), ", ".join(row)
            raise InputError(f"{where}: no column of {role}s ({asked}); --{role} names it; there are: {columns:.200}")
    return found


def plain(name):
    """'Order Date' and 'order_date' -> 'orderdate'"""
    return re.sub(r"[\W_]", "", name).lower()


def bare(value):
    known = isinstance(value, str | int | float) and value == value  # NaN is not
    return str(value).strip() if known else ""


def clean(value):
    """One line of text, without HTML's entities."""
    return " ".join(html.unescape(bare(value)).split())


def seconds(value):
    """Seconds since 1970 of an ISO 8601 date, or of a number in s, ms or finer; None if it is neither."""
    text = bare(value)
    try:
        if re.fullmatch(r"\d{4}-.*|(19|20)\d{6}(T.*)?", text):
            date = datetime.fromisoformat(text.removesuffix(" UTC"))
            time = date.replace(tzinfo=date.tzinfo or UTC).timestamp()
        else:
            time = float(text)
            for _ in ("ms", "us", "ns"):
                if time >= 1 << 33:  # the year 2242
                    time /= 1000
    except ValueError:
        return None
    if not 0 <= time < 1 << 33:
        return None
    return int(time) if time == int(time) else time


def read_interactions(path, notes, given=NAMES):
    """-> {user: {(time, item): None}} in the file's order, {item: where it stands first}, the column of the items."""
    users, first, column = {}, {}, None
    for where, row in rows(path, notes):
        column = column or find_columns(where, row, given, ("user", "item", "time"))
        user, item, time = (row.get(column[role]) for role in ("user", "item", "time"))
        user, item, time = bare(user), sys.intern(bare(item)), seconds(time)
        if not user or not item:
            note(notes, "interactions without a user or an item are left out", where)
        elif time is None:
            what = "interactions whose time is no ISO 8601 date and no number from 1970 on are left out"
            note(notes, what, f"{where}, {row.get(column['time'])!r:.40}")
        elif item.split() != [item] or "\t" in user or len(user.splitlines()) > 1:
            what = "interactions whose item id has a space, or user id a tab, are left out"
            note(notes, what, f"{where}, {item!r:.40}")
        else:
            events = users.setdefault(user, {})
            if (time, item) in events:
                note(notes, "duplicates (same user, item and time) are left out", where)
            events[time, item] = None
            first.setdefault(item, where)
    return users, first, column and column["item"]


def read_items(path, notes, given=NAMES, wanted=None):
    """-> {item: {"title": its title, further columns of plain text}} of the items that have a title, in the file's
    order. wanted: those to read; None for all."""
    names = {"item": [*given["item"], *NAMES["item"], "id"], "title": given["title"]}
    items, column, where, row = {}, {"title": None}, path, {}
    for where, row in rows(path, notes, wanted):
        if column["title"] is None:  # not every JSON object has one
            column = find_columns(where, row, names, ["item"])
        item, title = bare(row.get(column["item"])), clean(row.get(column["title"]))
        if item.split() != [item]:
            note(notes, "lines of items whose id is empty or has a space in it are left out", where)
        elif wanted is not None and item not in wanted:
            note(notes, "lines of items that nobody bought are left out", where)
        elif not title:
            note(notes, "lines of items without a title are left out", where)
        elif item not in items:
            further = {clean(c): clean(value) for c, value in row.items() if isinstance(value, str | int | float)}
            for name in ("", "item_id", "title", *column.values()):
                further.pop(name, None)
            items[item] = {"title": title} | further
        elif items[item]["title"] != title:
            note(notes, "lines give an item another title; the first one stays", where)
    if not row:
        raise InputError(f"{path}: no line after the header")
    if column["title"] is None:
        find_columns(where, row, names, ["title"])
    return items


def write_table(path, header, table):
    with gzip.open(path, "wt", encoding="utf-8", errors="replace") as file:
        file.writelines("\t".join(row) + "\n" for row in itertools.chain([header], table))


def write(folder, items, users):
    """{item: {"title": .., ..}}, {user: (time, item) pairs} -> items.tsv.gz, sequences.tsv.gz; returns the counts."""
    columns = list(dict.fromkeys(column for item in items.values() for column in item))
    table = ([i, *(item.get(column, "") for column in columns)] for i, item in items.items())
    write_table(folder / "items.tsv.gz", ["item_id", *columns], table)
    # users by id, numbers in their order; sorted is stable: equal times keep the file's order
    ordered = ((user, sorted(users[user], key=itemgetter(0))) for user in sorted(users, key=lambda u: (len(u), u)))
    table = ((user, " ".join(i for _, i in events), " ".join(str(t) for t, _ in events)) for user, events in ordered)
    write_table(folder / "sequences.tsv.gz", ["user_id", "item_ids", "times"], table)
    return f"{len(users):,} users, {len(items):,} items, {sum(map(len, users.values())):,} interactions"


def prepare(interactions, catalogue, out, given=NAMES, all_items=False):
    """Makes the folder out, whole or not at all; returns the counts in words, and the notes."""
    interactions, catalogue, out, notes = Path(interactions), Path(catalogue), Path(out), {}
    if out.exists():
        raise InputError(f"{out} is there already: give another --out, or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    users, first, column = read_interactions(interactions, notes, given)
    if column:  # where both files have it, it is the same
        given = given | {"item": [column, *given["item"]]}
    items = read_items(catalogue, notes, given, wanted=None if all_items else first)
    if catalogue.samefile(interactions):  # its other columns tell of an interaction, not of an item
        items = {item: {"title": row["title"]} for item, row in items.items()}
    count = Counter(item for events in users.values() for _, item in events)
    for item, where in first.items():
        if item not in items:
            note(notes, f"interactions are left out: {catalogue} has no title of the item", where, count[item])
    users = {user: [event for event in events if event[1] in items] for user, events in users.items()}
    users = {user: events for user, events in users.items() if events}
    if not users:
        why = "; ".join(f"{where}: {what}" for what, (_, where) in notes.items() if "interactions" in what)
        raise InputError(f"{interactions}: no interaction is left ({why or 'it has none'})")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        counts = write(made, items, users)
        made.rename(out)
    return counts, notes


def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("interactions", metavar="INTERACTIONS", help="who bought what and when")
    parser.add_argument("items", metavar="ITEMS", help="the items' titles; may be the same file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make")
    for role in NAMES:
        parser.add_argument(f"--{role}", metavar="COLUMN", help=f"the column of {role}s, where its name does not tell; "
                            "sku,code where the two files call it so")  # fmt: skip
    parser.add_argument(
        "--all_items", action="store_true", help="also keep what nobody bought, for eval.py --catalogue"
    )
    args = parser.parse_args(argv)
    given = {role: vars(args)[role].split(",") if vars(args)[role] else names for role, names in NAMES.items()}
    counts, notes = prepare(args.interactions, args.items, args.out, given, args.all_items)
    print(f"{args.out}: {counts}")
    for what, (n, where) in notes.items():
        print(f"  {n:,} {what}; the first: {where}")
    print(f"next: python train.py --data {shlex.quote(args.out)}")


if __name__ == "__main__":
    run_main(main)
