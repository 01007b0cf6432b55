"""From files to token batches: data sets, splits, the catalogue's trie, the prompt.

A data set is a folder with items.tsv[.gz] (item_id, title; more columns are allowed) and either
    sequences.tsv[.gz]   user_id, item_ids in time order separated by spaces, their times likewise, or
    windows.tsv[.gz]     split (train, valid, test), user_id, item_ids of which the last is the target, its time: a
                         published split, used as it is. A user's windows of one time stand in their order.
Each has a header line. Shapes as in model.py, plus N windows and R rows: the positions that have a loss.
"""

import contextlib
import copy
import csv
import functools
import gc
import gzip
import hashlib
import itertools
import math
import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from hatllm import TARGET, InputError, needed, round_up
from model import Config

PRESETS = ("ml-100k", "beauty", "office", "books")  # the first two are fetched
TIMES = ("times", "time", "timestamp", "days_since_epoch")  # names of the column of times
csv.field_size_limit(2**31 - 1)  # a long sequence is one field
gc.set_threshold(100_000)  # looking through millions of tuples for cycles would take half of the time to load them
HISTORY = 10  # items in a prompt: the last ones (BIGRec, MSL). It also decides which windows there are
TIES = "file"  # a user's items of equal time: in the order of the file, or "shuffled", by a seed of the user's own
PROMPT = ("The user bought, oldest first:\n", "\n", "\nNext:\n")  # before the history, between titles, after it; or ""
TEXT_TOKENS = 0  # how many of an item's first tokens a history shows; 0: all. The target is always the whole title
TINY_VOCABULARY = 4096  # tokens of the tokenizer that `tiny` gets, learnt from the catalogue
WHOLE_TITLES = False  # and, if True, one more for every title: then `tiny` knows items as SASRec does, not by words


# --- Reading: what is wrong gets a sentence that names file and line ------------------------------------------------


def read_table(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of path[.gz] as (where, {column: text}), one at a time. The header names at least these columns, in any
    order; quotes are text."""
    found = [p for p in (path, Path(f"{path}.gz")) if p.exists()]
    if len(found) != 1:
        what = "both are there, give one of them" if found else "there is no such file"
        raise InputError(f"{path} or {path}.gz: {what}")
    path = found[0]
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows.fieldnames = ["times" if c in TIMES and "times" in columns else c for c in rows.fieldnames or ()]
            if len(set(rows.fieldnames)) < len(rows.fieldnames):
                raise InputError(f"{path}, line 1: a column stands there twice, or two of times")
            if lacking := [c for c in columns if c not in rows.fieldnames]:
                there = ", ".join(rows.fieldnames)
                raise InputError(f"{path}, line 1: no column {lacking[0]} among {there:.200}; tabs stand between them")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{where}: not the {len(rows.fieldnames)} tab-separated columns of the header")
                yield where, row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path}: cannot be read ({e}); is the file complete, and UTF-8?") from None


class Item(NamedTuple):
    title: str  # what is written; '' where an item has none
    text: str  # what a history shows of it


def read_items(path: Path, columns: str = "title") -> dict[str, Item]:
    """item_id -> Item, in the order of the file. columns: those that a history shows, separated by commas."""
    items, shown = {}, [column.strip() for column in columns.split(",")]
    for where, row in read_table(path, ["item_id", "title", *shown]):
        row = {name: " ".join(text.split()) for name, text in row.items()}
        if not row["item_id"]:
            raise InputError(f"{where}: no item_id")
        if row["item_id"] in items:
            raise InputError(f"{where}: item_id {row['item_id']} stands in the file already")
        items[row["item_id"]] = Item(row["title"], ", ".join(row[name] for name in shown if row[name]) or row["title"])
    return items


def read_times(where: str, text: str, n: int) -> list[float]:
    try:
        times = [float(t) for t in text.split()]
    except ValueError:
        times = []
    if len(times) != n or not all(map(math.isfinite, times)):
        raise InputError(f"{where}: '{text:.40}' is not {n} numbers: one time per item, in seconds or days")
    return times


def read_ids(where: str | Path, text: str, index: dict[str, int], least: int) -> list[int]:
    ids = text.split()
    if unknown := [i for i in ids if i not in index]:
        raise InputError(f"{where}: item {unknown[0]} is unknown: no item of items.tsv, or --core has left it out")
    if len(ids) < least:
        raise InputError(f"{where}: {len(ids)} items, but {least} are needed")
    return [index[i] for i in ids]


def read_sequences(folder: Path, index: dict[str, int]) -> dict[str, list[tuple[int, float]]]:
    """user -> [(item, time)] in time order."""
    users = {}
    for where, row in read_table(folder / "sequences.tsv", ["user_id", "item_ids", "times"]):
        items = read_ids(where, row["item_ids"], index, 1)
        times = read_times(where, row["times"], len(items))
        if any(a > b for a, b in itertools.pairwise(times)):
            raise InputError(f"{where}: the times of user {row['user_id']} are not in ascending order")
        if row["user_id"] in users:
            raise InputError(f"{where}: user {row['user_id']} stands in the file already; one line per user")
        users[row["user_id"]] = list(zip(items, times, strict=True))
        if TIES == "shuffled":
            random.Random(row["user_id"]).shuffle(users[row["user_id"]])
            users[row["user_id"]].sort(key=lambda pair: pair[1])  # stable: what is equal stays shuffled
    return users


def read_windows(folder: Path, index: dict[str, int], titled: list[bool]) -> dict[str, list]:
    """split -> windows. Untitled items leave the histories; a window without a titled target or history is dropped."""
    rows = {"train": [], "valid": [], "test": []}
    for where, row in read_table(folder / "windows.tsv", ["split", "user_id", "item_ids", "times"]):
        *history, target = read_ids(where, row["item_ids"], index, 2)
        history = [i for i in history if titled[i]][-HISTORY:]
        (time,) = read_times(where, row["times"], 1)
        if row["split"] not in rows:
            raise InputError(f"{where}: split '{row['split']}' is none of train, valid, test")
        if titled[target] and history:
            rows[row["split"]].append(Window(history, target, row["user_id"], time))
    if not rows["valid"]:  # published without one: the latest ninth of the training windows
        rows["train"].sort(key=lambda w: w.time)
        cut = len(rows["train"]) * 8 // 9
        rows["train"], rows["valid"] = rows["train"][:cut], rows["train"][cut:]
    return rows


def read_histories(path: Path, ids: list[str]) -> Iterator["Window"]:
    """Windows without a target, a line of the file at a time."""
    index = {x: i for i, x in enumerate(ids)}
    for where, row in read_table(path, ["user_id", "item_ids"]):
        yield Window(read_ids(where, row["item_ids"], index, 1)[-HISTORY:], None, row["user_id"], math.inf)


# --- Windows: a history and the item that came next -----------------------------------------------------------------


class Window(NamedTuple):
    history: list[int]  # the last HISTORY items, oldest first
    target: int | None  # None: it is to be recommended
    user: str
    time: float  # the target's


@dataclass
class Dataset:
    """Items are numbered 0 .. N-1 in the catalogue's order; ids, titles and users are the files' own."""

    folder: Path
    ids: list[str]
    titles: list[str]
    texts: list[str]  # what a history shows of an item
    train: list[Window]
    valid: list[Window]
    test: list[Window]
    sequences: list[list[int]]  # the training interactions, in order, a user (or a stretch of one) a list
    left_out: int = 0  # users with too few interactions

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """(items,) how often each item occurs in the training interactions: popularity, and who is cold."""
        return np.bincount([i for s in self.sequences for i in s], minlength=len(self.ids))

    @functools.cached_property
    def future(self) -> dict[str, Window]:
        """user -> the window that comes after all of the user's items, those held out included; its target is None."""
        windows = sorted((*self.train, *self.valid, *self.test), key=lambda w: w.time)  # a user's last one counts
        last = {w.user: [*w.history, w.target] for w in windows}
        return {user: Window(items[-HISTORY:], None, user, math.inf) for user, items in last.items()}

    @functools.cached_property
    def users(self) -> set[str]:
        return {w.user for w in (*self.train, *self.valid, *self.test)}

    @functools.cached_property
    def digest(self) -> str:
        """A fingerprint of the catalogue, the split and what is learnt from."""
        parts = self.ids, self.titles, self.texts, self.train, self.valid, self.test, self.sequences
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def summary(self) -> str:
        sizes = f"{len(self.train):,} / {len(self.valid):,} / {len(self.test):,} train / valid / test windows"
        more = f"; {self.left_out:,} more users have too few items (--core, --split)" if self.left_out else ""
        return f"{self.folder.name}: {len(self.users):,} users, {len(self.ids):,} items, {sizes}{more}"


def core(users: dict, k: int) -> dict:
    """Drops users and items with fewer than k interactions until none is left that has (the k-core)."""
    while True:
        count = Counter(i for s in users.values() for i, _ in s)
        kept = {u: [pair for pair in s if count[pair[0]] >= k] for u, s in users.items()}
        kept = {u: s for u, s in kept.items() if len(s) >= max(k, 2)}
        if kept == users:
            return kept
        users = kept


def window(sequence: list[tuple[int, float]], at: int, user: str) -> Window:
    return Window([i for i, _ in sequence[max(0, at - HISTORY) : at]], sequence[at][0], user, sequence[at][1])


def split_time(users: dict[str, list]) -> tuple[dict[str, list], list[list[int]]]:
    """-> windows by split, training sequences. One window per item that has HISTORY items before it, or the last item
    of a shorter user; all in order of the target's time, 8:1:1 (BIGRec, MSL). Ties in time keep the files' order."""
    rows = [window(s, at, u) for u, s in users.items() for at in range(min(HISTORY, len(s) - 1), len(s))]
    rows.sort(key=lambda w: w.time)
    a, b = int(0.8 * len(rows)), int(0.8 * len(rows)) + int(0.1 * len(rows))
    # learnt from: interactions no later than the last training target, none of them held out
    last = max((w.time for w in rows[:a]), default=0)
    held = Counter(w.user for w in rows[a:])  # a user's last ones
    sequences = [[i for i, t in s[: len(s) - held[u]] if t <= last] for u, s in users.items()]
    return {"train": rows[:a], "valid": rows[a:b], "test": rows[b:]}, sequences


def split_loo(users: dict[str, list]) -> tuple[dict[str, list], list[list[int]]]:
    """Leave one out (SASRec, TIGER): a user's last item is for test, the one before for validation."""
    long = {u: s for u, s in users.items() if len(s) >= 3}
    rest = {u: s[:-2] for u, s in long.items()}
    train = [window(s, at, u) for u, s in rest.items() for at in range(min(HISTORY, len(s) - 1), len(s)) if at]
    valid, test = ([window(s, len(s) - n, u) for u, s in long.items()] for n in (2, 1))
    return {"train": train, "valid": valid, "test": test}, [[i for i, _ in s] for s in rest.values()]


def chain(train: list) -> list[list[int]]:
    """The sequences along which published training windows slid: a window that fits continues its user's last one."""
    open_, done = {}, []
    for history, target, user, _ in sorted(train, key=lambda w: w.time):
        s = open_.get(user)
        if s is not None and s[-len(history) :] == history:
            s.append(target)
        else:
            done.append([*history, target])
            open_[user] = done[-1]
    return done


def find(name: str | Path) -> Path:
    """The folder of a data set: a path, else NAME in $HATLLM_DATA or data/, else a preset is fetched to data/."""
    places = [Path(name), *(Path(p) / name for p in (os.environ.get("HATLLM_DATA"), "data") if p)]
    for place in places:
        if (place / "items.tsv").exists() or (place / "items.tsv.gz").exists():
            return place.resolve()
    if str(name) in PRESETS[:2]:
        from extras import fetch

        return fetch.fetch(str(name), "data")
    if Path(name).is_file():
        raise InputError(f"--data {name} is a file; make a folder: python -m extras.prepare {name} ITEMS --out FOLDER")
    looked = ", ".join(dict.fromkeys(map(str, places)))
    raise InputError(f"--data {name}: no items.tsv[.gz] in {looked}; known by name: {', '.join(PRESETS)}")


def load(name: str | Path, split: str = "time", k: int = 5, columns: str = "title") -> Dataset:
    """The data set of that name or folder, split by time or loo, its k-core; a published split stays as it is. columns:
    see read_items."""
    if HISTORY < 1 or TIES not in ("file", "shuffled") or len(PROMPT) != 3:
        raise InputError("data.py: HISTORY is 1 at least, TIES is 'file' or 'shuffled', PROMPT has three parts")
    folder = find(name)
    print(f"reading {folder}", file=sys.stderr)  # of millions it takes a minute
    items = read_items(folder / "items.tsv", columns)
    index, titled = {x: i for i, x in enumerate(items)}, [bool(x.title) for x in items.values()]
    windows, sequences = ([*folder.glob(f"{x}.tsv"), *folder.glob(f"{x}.tsv.gz")] for x in ("windows", "sequences"))
    if windows and (sequences or split != "time" or k != 5):
        raise InputError(f"{folder} is a published split: windows.tsv goes without --split, --core, sequences.tsv")
    if windows:
        rows = read_windows(folder, index, titled)
        return catalogued(folder, items, rows, chain(rows["train"]))
    users = {u: [pair for pair in s if titled[pair[0]]] for u, s in read_sequences(folder, index).items()}
    d = catalogued(folder, items, *(split_loo if split == "loo" else split_time)(core(users, k)))
    d.left_out = len(users) - len(d.users)
    return d


def catalogued(folder: Path, items: dict[str, Item], rows: dict[str, list], sequences: list[list[int]]) -> Dataset:
    """Renumbers the items that occur, in the order of items.tsv: they are the catalogue."""
    if not all(rows.values()):
        sizes = ", ".join(f"{len(part)} {name}" for name, part in rows.items())
        raise InputError(f"{folder}: {sizes} windows, but each needs one at least; give more users or a lower --core")
    windows = [w for part in rows.values() for w in part]
    kept = sorted(set().union(*(w.history for w in windows), (w.target for w in windows)))
    new = {old: i for i, old in enumerate(kept)}
    parts = {}
    for name, part in rows.items():
        parts[name] = [w._replace(history=[new[i] for i in w.history], target=new[w.target]) for w in part]
    ids, (titles, texts) = [*items], zip(*items.values(), strict=True)
    columns = ([column[i] for i in kept] for column in (ids, titles, texts))
    return Dataset(folder, *columns, sequences=[[new[i] for i in s] for s in sequences if s], **parts)


def renew(d: Dataset, path: Path, columns: str) -> tuple[Dataset, list[int]]:
    """d under a newer catalogue, and the candidates: the items of that file. The items of d keep their numbers; one
    that is gone keeps its title too, for histories, but is no candidate."""
    found = {x: item for x, item in read_items(path, columns).items() if item.title}
    items = dict(zip(d.ids, map(Item, d.titles, d.texts), strict=True)) | found
    titles, texts = map(list, zip(*items.values(), strict=True))
    return replace(d, ids=[*items], titles=titles, texts=texts), [i for i, x in enumerate(items) if x in found]


# --- The catalogue as a trie of title tokens ------------------------------------------------------------------------


class Trie:
    """All titles as arrays, each with its end token ($ below), so that no title is the beginning of another.

    Nodes are numbered breadth first, so that a node's children are neighbours. Six titles, one letter a token, of
    which the last two are equal: "ab", "abc", "ad", "xyz", "q", "q".

        node   0  1  2  3  4  5  6  7  8   9   10  11  12   13
        title  "" a  q  x  ab ad q$ xy ab$ abc ad$ xyz abc$ xyz$
        fan    3  2  1  1  2  1  0  1  0   1   0   1   0    0       children
        child  1  4  6  7  8  10 -  11 -   12  -   13  -    -       the first of them
        stop   0  1  6  13 4  10 6  13 8   12  10  13  12   13      where the titles below part

    A leaf is a whole title; leaves are numbered depth first, so that those below a node are neighbours: ab$ 0, abc$ 1,
    ad$ 2, q$ 3, xyz$ 4. Leaf 3 has two items.
    """

    token: Tensor  # (nodes,) the token that leads to the node
    column: Tensor  # (nodes,) the same as a place in columns
    columns: Tensor  # (C,) the tokens of all titles: the part of the model's head that is used
    parent: Tensor  # (nodes,) the node above; the root's is itself
    depth: Tensor  # (nodes,) tokens from the root
    fan: Tensor  # (nodes,) how many children: child .. child + fan - 1
    child: Tensor  # (nodes,) the first of them
    leaf: Tensor  # (nodes,) the first leaf below (or at) the node
    leaves: Tensor  # (nodes,) how many they are: leaf .. leaf + leaves - 1
    stop: Tensor  # (nodes,) the next node below (or at) which titles part, or the leaf's node where there is one title
    start: Tensor  # (leaves + 1,) a leaf's path is path_node[start[leaf] : start[leaf + 1]]
    path_node: Tensor  # (tokens of all leaves,)
    leaf_of_item: Tensor  # (items,) -1 for an item that is no candidate

    def __init__(self, paths: list[np.ndarray]):
        """paths: token ids of every item's title, the end token last; empty for an item that is no candidate."""
        every = [tuple(p.tolist()) for p in paths]
        titles = sorted({*every} - {()})  # the leaves, depth first
        number = {(): -1} | {title: leaf for leaf, title in enumerate(titles)}
        self.leaf_of_item = np.array([number[title] for title in every])
        self.start = np.append(0, np.cumsum([len(title) for title in titles]))
        nodes = [(0, 0, 0, 0)]  # token, parent, depth, leaf of every node, from the root on; depth first for now
        path, path_node = [0], []  # path: the nodes of one title, the root's before them
        for leaf, (before, title) in enumerate(itertools.pairwise([(), *titles])):
            shared = len(os.path.commonprefix((before, title)))  # so many of its nodes are those of the title before
            path = path[: shared + 1]
            for token in title[shared:]:
                nodes.append((token, path[-1], len(path), leaf))
                path.append(len(nodes) - 1)
            path_node += path[1:]
        nodes = np.array(nodes)
        order = np.argsort(nodes[:, 2], kind="stable")  # breadth first
        place = np.argsort(order)  # of a node in that order
        self.token, parent, self.depth, self.leaf = nodes[order].T.copy()
        self.parent, self.path_node = place[parent], place[path_node]
        self.columns, column = np.unique(self.token[1:], return_inverse=True)
        self.column = np.append(0, column)
        self.leaves = np.bincount(self.path_node, minlength=len(nodes))
        self.leaves[0] = len(titles)
        self.fan = np.bincount(self.parent[1:], minlength=len(nodes))
        self.child = np.searchsorted(self.parent[1:], np.arange(len(nodes))) + 1  # parents ascend along the nodes
        self.stop = np.arange(len(nodes))
        for n in np.flatnonzero(self.fan == 1)[::-1]:  # there is one way on; a child comes before its parent here
            self.stop[n] = self.stop[self.child[n]]
        self.stop[0] = 0
        self.n_leaves = len(titles)
        vars(self).update({k: torch.from_numpy(v) for k, v in vars(self).items() if isinstance(v, np.ndarray)})

    def children(self, nodes: Tensor, M: int | None = None) -> tuple[Tensor, Tensor]:
        """nodes (F,) -> row (M,), child (M,): all children, flat; row is the index into nodes. Without M, their number,
        a GPU is waited for."""
        fan = self.fan[nodes]
        row = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), fan, output_size=M)
        first = torch.cumsum(fan, 0) - fan
        return row, self.child[nodes][row] + torch.arange(len(row), device=nodes.device) - first[row]

    def has_leaf(self, node: Tensor, leaf: Tensor) -> Tensor:
        """Whether the leaf is below (or at) the node; of whole tensors, broadcast."""
        return (self.leaf[node] <= leaf) & (leaf < self.leaf[node] + self.leaves[node])

    def to(self, device) -> "Trie":
        """A copy on device, for the model's side; this one stays where batches are made."""
        new = copy.copy(self)
        vars(new).update({name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)})
        return new


# --- Text to tokens -------------------------------------------------------------------------------------------------


def train_tokenizer(titles: list[str]) -> Tokenizer:
    """A byte-level BPE of the catalogue, for models from scratch. <|end|> is token 0; a part of PROMPT is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any title typed by hand can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(titles, trainer)
    tokenizer.add_tokens([x for x in (*PROMPT, *titles * WHOLE_TITLES) if x != "<|end|>"])  # that is one already
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, without what would cut, pad or vary a title."""
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises a bare Exception
        raise InputError(f"{path}: not a tokenizer ({e}); transformers' AutoTokenizer can save one") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    return tokenizer


class Catalogue:
    """The titles as token ids; the trie over those of the candidates (None: all); the prompt around a history, which
    shows the texts of its items (None: their titles)."""

    def __init__(self, titles: list[str], tokenizer: Tokenizer, c: Config, texts=None, candidates=None):
        tokenizer.encode_special_tokens = False  # PROMPT may be a chat template, with tokens as '<|im_start|>'
        (self.instruction,) = encode_all(tokenizer, PROMPT[:1])
        self.separator, self.header = (encode_after(tokenizer, part) for part in PROMPT[1:])
        tokenizer.encode_special_tokens = True  # a title that spells one is text
        texts = titles if texts is None else texts
        self.titles = encode_all(tokenizer, titles)
        shown = self.titles if texts == titles else encode_all(tokenizer, texts)
        self.texts = [t[: TEXT_TOKENS or None] for t in shown]
        probe = tokenizer.encode("a")
        self.bos = np.array(probe.ids[: (*probe.special_tokens_mask, 0).index(0)], int)  # as Llama 3's puts first
        if self.instruction[: len(self.bos)].tolist() == self.bos.tolist():
            self.bos = self.bos[:0]  # a chat template brings its own
        prompt, written = (self.bos, self.instruction, self.separator, self.header), (*self.titles, *self.texts)
        if (most := max(int(tokens.max(initial=0)) for tokens in (*prompt, *written))) >= c.vocab_size:
            raise InputError(f"the tokenizer has a token {most}, but the model has {c.vocab_size}; are they a pair?")
        for text, tokens in zip((*titles, *texts), written, strict=True):
            if not len(tokens) or c.eos_token_id in tokens:
                what = f"holds the end token {c.eos_token_id} of config.json" if len(tokens) else "has no tokens"
                raise InputError(f"{text!r:.60} {what} under the model's tokenizer; give it another title or tokenizer")
        self.text_start = np.cumsum([0] + [len(t) for t in self.texts])  # of a text's tokens, among those of all
        chosen = set(range(len(titles)) if candidates is None else candidates)
        self.trie = Trie([np.append(t, c.eos_token_id) if i in chosen else t[:0] for i, t in enumerate(self.titles)])
        self.target = functools.cache(self.target)  # it is the same in many examples
        self.bearers = [[] for _ in range(self.trie.n_leaves)]  # the items of every leaf
        for i, leaf in enumerate(self.trie.leaf_of_item.tolist()):
            if leaf >= 0:
                self.bearers[leaf].append(i)
        shared = [{titles[i] for i in group} for group in self.bearers if len(group) > 1]
        alike = [sorted(names) for names in shared if len(names) > 1]
        if alike:
            first, n = " and ".join(map(repr, alike[0][:2])), len(alike)
            print(f"warning: {first} are one title to the tokenizer; there are {n:,} such cases", file=sys.stderr)

    def trunk(self, history) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """tokens, item of the instruction and the texts, and how many tokens the first k = 0, 1, .. items take."""
        tokens, item = [self.bos, self.instruction], [np.zeros(len(self.bos) + len(self.instruction), int)]
        ends = [len(item[0])]
        for k, i in enumerate(history, 1):
            gap = self.separator if k > 1 else self.separator[:0]
            tokens += [gap, self.texts[i]]
            item += [np.zeros(len(gap), int), np.full(len(self.texts[i]), k)]
            ends.append(ends[-1] + len(gap) + len(self.texts[i]))
        return np.concatenate(tokens), np.concatenate(item), ends

    def target(self, i: int, trie_only: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What the title of item i adds to a text: tokens, item (t,) of the response header and the title; at, node
        (r,): after which of these tokens a loss stands (-1: after the one before), and the trie node to predict there.

        trie_only: under the masked softmax the only token that can follow has probability 1, so it has no loss. What
        comes after the title is settled is not even fed to the model. The loss and its gradients are the same."""
        trie = self.trie
        leaf = int(trie.leaf_of_item[i])
        a, b = trie.start[leaf : leaf + 2].tolist()
        node = trie.path_node.numpy()[a:b]
        at = np.arange(len(node))
        if trie_only:
            at = np.flatnonzero(trie.fan.numpy()[trie.parent.numpy()[node]] > 1)
        n = at.max(initial=0)  # tokens of the title before the last loss
        fed = trie.token.numpy()[node[:n]]
        item = np.append(0 * self.header, np.full(len(fed), TARGET))
        return np.append(self.header, fed), item, len(self.header) - 1 + at, node[at]

    def prompt(self, history) -> tuple[np.ndarray, np.ndarray]:
        """tokens (T,), item (T,) up to and with the response header."""
        tokens, item, _ = self.trunk(history)
        return np.append(tokens, self.header), np.append(item, np.zeros(len(self.header), int))


def encode_all(tokenizer: Tokenizer, texts) -> list[np.ndarray]:
    """Every text on its own, without special tokens."""
    ids = []
    try:
        for a in range(0, len(texts), 10_000):  # in parts: an encoding holds much more than the ids
            part = tokenizer.encode_batch(texts[a : a + 10_000], add_special_tokens=False)
            ids += [np.array(e.ids, int) for e in part]
    except Exception as e:  # the library raises a bare Exception
        raise InputError(f"the model's tokenizer cannot encode the titles ({e})") from None
    return ids


def encode_after(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a text that follows another one. Alone, SentencePiece would mark where it begins."""
    alone, a, both = encode_all(tokenizer, (text, "a", "a" + text))
    return both[len(a) :] if both[: len(a)].tolist() == a.tolist() else alone


# --- Batches --------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """One history and the targets that are learnt from it: (k, item) follows the first k items of the history."""

    history: list[int]
    targets: list[tuple[int, int]]


def window_examples(windows: list[Window]) -> list[Example]:
    return [Example(w.history, [(len(w.history), w.target)]) for w in windows]


def examples(data: Dataset, targets: str) -> list[Example]:
    """What an epoch goes through. last: an example for every training window, as published. all: every training item
    is a target once, except a user's first. Targets that follow each other share one example and its history. The next
    example starts half of HISTORY later: so each of its targets still has half of HISTORY items before it."""
    if targets == "last":
        return window_examples(data.train)
    out, stride = [], max(1, HISTORY // 2)
    for s in data.sequences:
        first = 1
        while first < len(s):
            last = min(HISTORY if first == 1 else first + stride - 1, len(s) - 1)
            a = max(0, last - HISTORY)
            out.append(Example(s[a:last], [(j - a, s[j]) for j in range(first, last + 1)]))
            first = last + 1
    return out


def encode(cat: Catalogue, e: Example, trie_only: bool) -> dict[str, np.ndarray]:
    """An example as arrays: tokens, item, branch, fork (T,) as in hatllm.layout; at, next (R,): where a loss stands,
    and the trie node of the token to predict there. trie_only: see Catalogue.target."""
    tokens, item, ends = cat.trunk(e.history)
    parts = [dict(tokens=tokens, item=item, branch=0 * item, fork=0 * item, at=item[:0], next=item[:0])]
    length = len(tokens)
    for b, (k, target) in enumerate(e.targets, 1):
        tokens, item, at, node = cat.target(target, trie_only)
        at = np.where(at < 0, ends[k] - 1, length + at)  # without a header the last item's last token writes on
        branch = np.full(len(item), b if len(e.targets) > 1 else 0)  # a single title goes on as trunk
        fork = np.full(len(item), ends[k])
        parts.append(dict(tokens=tokens, item=item, branch=branch, fork=fork, at=at, next=node))
        length += len(item)
    return {name: np.concatenate([part[name] for part in parts]).astype(np.int32) for name in parts[0]}


def longest(cat: Catalogue, examples: list[Example], trie_only: bool) -> int:
    """Tokens of the longest example, as `encode` makes it."""
    shown = [len(t) for t in cat.texts]
    start, gap = len(cat.bos) + len(cat.instruction), len(cat.separator)

    def size(e: Example) -> int:
        branches = sum(len(cat.target(i, trie_only)[0]) for _, i in e.targets)
        return sum(shown[i] + gap for i in e.history) - gap + branches

    return start + max(map(size, examples))


def n_title_tokens(cat: Catalogue, examples: list[Example]) -> int:
    """How many tokens a loss is the mean over: the titles' and their end tokens, also those that are certain."""
    return sum(len(cat.titles[target]) + 1 for e in examples for _, target in e.targets)


@dataclass
class Batch:
    tokens: Tensor  # (B, T) right-padded with 0
    item: Tensor  # (B, T) as in hatllm.Layout, -1 on padding
    branch: Tensor | None  # (B, T), None where every example has one target
    fork: Tensor | None  # (B, T)
    start: Tensor | None  # (B, T), None unless packed
    places: Tensor  # (B, S) see hatllm.needed
    rows: Tensor  # (R,) positions b * T + t that have a loss
    next: Tensor  # (R,) the trie node of the token to predict there
    parents: Tensor  # (U,) the nodes above those, each once: many losses stand at the root
    parent: Tensor  # (R,) which of them stands above a loss's node
    M: int  # children of all parents

    def to(self, device) -> "Batch":
        """A copy on device. A GPU copies in the background, for which the memory here must be pinned."""
        gpu = torch.device(device).type == "cuda"
        with torch.cuda.device(device) if gpu else contextlib.nullcontext():  # a new thread starts on device 0
            tensors = {name: v.pin_memory() if gpu else v for name, v in vars(self).items() if isinstance(v, Tensor)}
            return replace(self, **{name: v.to(device, non_blocking=True) for name, v in tensors.items()})


def pad(rows: list[np.ndarray], value: int, multiple: int = 1) -> Tensor:
    """-> (B, T), value after the end of the shorter ones; T is rounded up."""
    T = round_up(max(map(len, rows)), multiple)
    out = np.full((len(rows), T), value)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return torch.from_numpy(out)


def pack(coded: list[dict], width: int) -> list[dict]:
    """Puts encoded examples one after the other into rows of at most `width` tokens, or of the longest example's. The
    longest come first; each goes into the first row that has room. With one example a row, a third or more of what a
    GPU computes would be padding. start: see layout."""
    coded = sorted(coded, key=lambda c: -len(c["tokens"]))
    width = max(width, len(coded[0]["tokens"]))
    rows, filled = [], []  # the examples of each row; their tokens
    for c in coded:
        n = len(c["tokens"])
        b = next((b for b, there in enumerate(filled) if there + n <= width), len(rows))
        if b == len(rows):
            rows.append([])
            filled.append(0)
        start = filled[b]
        rows[b].append(c | {"start": np.full(n, start), "fork": c["fork"] + start, "at": c["at"] + start})
        filled[b] += n
    return [{name: np.concatenate([c[name] for c in row]) for name in row[0]} for row in rows]


def collate(cat: Catalogue, coded: list[dict], multiple: int = 1) -> Batch:
    """Encoded examples, right-padded. Everything with a size of its own is found here, on the CPU, so that the model
    never waits to learn one."""
    column = {name: [c[name] for c in coded] for name in coded[0]}
    tokens, branch, fork = (pad(column[x], 0, multiple) for x in ("tokens", "branch", "fork"))
    item = pad(column["item"], -1, multiple)
    start = pad(column["start"], tokens.shape[1], multiple) if "start" in column else None  # padding sees nothing
    if not branch.any():
        branch = fork = None
    rows = torch.from_numpy(np.concatenate([b * tokens.shape[1] + at for b, at in enumerate(column["at"])]))
    following = torch.from_numpy(np.concatenate(column["next"])).long()
    parents, parent = torch.unique(cat.trie.parent[following], return_inverse=True)
    M = int(cat.trie.fan[parents].sum())
    places = needed(item, min(multiple, 256))  # few lengths there, too
    return Batch(tokens, item, branch, fork, start, places, rows, following, parents, parent, M)


def collate_prompts(cat: Catalogue, histories: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, item, source (B, T) of prompts that end with the response header, right-padded. source: where an item's
    token stands among the tokens of all texts, one after the other; -1 elsewhere."""
    tokens, item = zip(*(cat.prompt(h) for h in histories), strict=True)
    source = [np.full(len(t), -1) for t in tokens]
    for own, its_item, history in zip(source, item, histories, strict=True):
        own[its_item > 0] = np.concatenate([cat.text_start[i] + np.arange(len(cat.texts[i])) for i in history])
    return pad(tokens, 0), pad(item, -1), pad(source, -1)


def batches(lengths: list[int], budget: int) -> list[np.ndarray]:
    """Indices in batches of at most budget tokens, padding included. The longest texts come first: if the memory is too
    small, the first batch shows it."""
    order, out, a = np.argsort(-np.array(lengths), kind="stable"), [], 0
    while a < len(order):
        b = a + max(1, budget // max(1, lengths[order[a]]))
        out.append(order[a:b])
        a = b
    return out


def ahead(make: Callable, order: Iterable) -> Iterator:
    """make(x) for x in order. Beside a GPU a thread makes each while its predecessor is in use; on a CPU it would take
    the cores from it (a step of tiny took 1.8 times as long)."""
    if not torch.cuda.is_available():
        yield from map(make, order)
        return
    with ThreadPoolExecutor(1) as thread:
        futures = (thread.submit(make, x) for x in order)
        for made, _ in itertools.pairwise(itertools.chain(futures, [None])):  # _: the next one, which has begun
            yield made.result()
