"""From files to token batches: data sets, splits, the catalogue's trie, the prompt.

A data set is a folder with items.tsv[.gz] (item_id, title; more columns are allowed) and either
    sequences.tsv[.gz]   user_id, item_ids in time order separated by spaces, their times likewise, or
    windows.tsv[.gz]     split (train, valid, test), user_id, item_ids of which the last is the target, its time: a
                         published split, used as it is.
Each has a header line. Shapes as in model.py, plus N windows and R rows: the positions that have a loss.
"""

import copy
import difflib
import gzip
import hashlib
import math
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import fetch
from hatllm import InputError

PRESETS = ("ml-100k", "beauty", "office", "books")
HISTORY = 10  # items in a prompt: the last ones (BIGRec, MSL)
STRIDE = 5  # --targets all: a history longer than HISTORY is cut into chunks that start every STRIDE items
CORE = 5  # every user and item has at least so many interactions (published sets: the 5-core)
PROMPT = (  # before the history, between its titles, after it; titles are encoded alone, so that their spans are exact
    "The user bought, oldest first:\n",
    "\n",
    "\nNext:\n",
)


# ---------------------------------------------------------------------------------------------------------------------
# Reading: what is wrong gets a sentence that names file and line


def read_table(folder: Path, name: str, columns: int, first: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """folder/name.tsv[.gz], whose header begins with column `first` -> header, rows as (where, fields); at least so
    many fields each."""
    path = next((p for p in (folder / f"{name}.tsv.gz", folder / f"{name}.tsv") if p.exists()), None)
    if path is None:
        raise InputError(f"{folder} has no {name}.tsv or {name}.tsv.gz; see 'Your own data' in README.md")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e}); is the file complete, and UTF-8?") from None
    rows = [(f"{path}, line {i}", line.rstrip("\r").split("\t")) for i, line in enumerate(lines, 1) if line.strip()]
    if len(rows) < 2:
        raise InputError(f"{path} is empty: a header line and at least one row are needed")
    if rows[0][1][0] != first:
        raise InputError(f"{rows[0][0]}: the header must begin with {first}, not with '{rows[0][1][0]}'")
    for where, fields in rows:
        if len(fields) < columns:
            raise InputError(f"{where}: {len(fields)} tab-separated columns, but {columns} are needed")
    return rows[0][1], rows[1:]


def read_items(folder: Path) -> tuple[list[str], list[str]]:
    """ids, titles ('' where an item has none)."""
    header, rows = read_table(folder, "items", 2, "item_id")
    if "title" not in header:
        raise InputError(f"{folder}/items.tsv: no column is called 'title', only {', '.join(header)}")
    seen, titles = {}, []
    for where, fields in rows:
        if fields[0] in seen:
            raise InputError(f"{where}: item_id {fields[0]} is already that of {seen[fields[0]]}")
        if len(fields) < len(header):
            raise InputError(f"{where}: {len(fields)} columns, but the header has {len(header)}")
        seen[fields[0]] = where
        titles.append(" ".join(fields[header.index("title")].split()))
    return list(seen), titles


def read_numbers(where: str, text: str) -> list[float]:
    try:
        if all(map(math.isfinite, numbers := [float(t) for t in text.split()])):
            return numbers
        raise ValueError
    except ValueError:
        raise InputError(f"{where}: '{text[:40]}' is not made of numbers (times, as seconds or days)") from None


def read_ids(where: str, text: str, index: dict[str, int], least: int) -> list[int]:
    ids = text.split()
    if unknown := [i for i in ids if i not in index]:
        raise InputError(f"{where}: item {unknown[0]} is not in items.tsv")
    if len(ids) < least:
        raise InputError(f"{where}: {len(ids)} items, but {least} are needed")
    return [index[i] for i in ids]


def read_sequences(folder: Path, index: dict[str, int]) -> dict[str, list[tuple[int, float]]]:
    """user -> [(item, time)] in time order."""
    users = {}
    for where, (user, items, times, *_) in read_table(folder, "sequences", 3, "user_id")[1]:
        items, times = read_ids(where, items, index, 1), read_numbers(where, times)
        if len(items) != len(times):
            raise InputError(f"{where}: {len(items)} items, but {len(times)} times")
        if any(a > b for a, b in zip(times, times[1:], strict=False)):
            raise InputError(f"{where}: the times of user {user} are not in ascending order")
        if user in users:
            raise InputError(f"{where}: user {user} stands in the file already; one line a user")
        users[user] = list(zip(items, times, strict=True))
    return users


# ---------------------------------------------------------------------------------------------------------------------
# Windows: a history and the item that came next


@dataclass
class Windows:
    """N examples. history (N, HISTORY) with -1 after its end, target (N,), user (N,), time (N,): the target's."""

    history: np.ndarray
    target: np.ndarray
    user: np.ndarray
    time: np.ndarray

    @staticmethod
    def of(rows: list[tuple[list[int], int, int, float]]) -> "Windows":
        history = np.full((len(rows), HISTORY), -1)
        for i, (h, *_) in enumerate(rows):
            history[i, : len(h)] = h
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        return Windows(history, *(np.array(c, d) for c, d in zip(columns[1:], (int, int, float), strict=True)))

    def __len__(self) -> int:
        return len(self.target)

    def histories(self) -> list[list[int]]:
        return [[i for i in h if i >= 0] for h in self.history.tolist()]

    def __getitem__(self, at) -> "Windows":
        return Windows(self.history[at], self.target[at], self.user[at], self.time[at])


@dataclass
class Dataset:
    """Items are numbered 0 .. N-1 in the catalogue's order; ids and titles are the files' own."""

    name: str
    ids: list[str]
    titles: list[str]
    train: Windows
    valid: Windows
    test: Windows
    sequences: list[list[int]]  # the training interactions, in order, a user (or a stretch of one) a list

    @property
    def counts(self) -> np.ndarray:
        """(items,) how often each item occurs in the training interactions: popularity, and who is cold."""
        return np.bincount([i for s in self.sequences for i in s], minlength=len(self.ids))

    def digest(self) -> str:
        """A fingerprint of the catalogue and the split, so that a resumed run and its evaluation see the same."""
        h = hashlib.sha256("\n".join(self.titles).encode())
        for w in (self.train, self.valid, self.test):
            h.update(w.history.tobytes() + w.target.tobytes())
        return h.hexdigest()[:16]

    def summary(self) -> str:
        sizes = f"{len(self.train):,} / {len(self.valid):,} / {len(self.test):,}"
        n = len(set(np.concatenate([w.user for w in (self.train, self.valid, self.test)]).tolist()))
        return f"{self.name}: {n:,} users, {len(self.ids):,} items, {sizes} train / valid / test windows"


def core(users: dict, k: int) -> dict:
    """Drops users and items with fewer than k interactions until none is left that has (the k-core)."""
    while True:
        count = Counter(i for s in users.values() for i, _ in s)
        kept = {u: [(i, t) for i, t in s if count[i] >= k] for u, s in users.items()}
        kept = {u: s for u, s in kept.items() if len(s) >= max(k, 2)}
        if sum(map(len, kept.values())) == sum(map(len, users.values())):
            return kept
        users = kept


def window(sequence: list[tuple[int, float]], at: int, user: int) -> tuple:
    return [i for i, _ in sequence[max(0, at - HISTORY) : at]], sequence[at][0], user, sequence[at][1]


def split_time(users: list[list[tuple[int, float]]]) -> tuple[list, list, list]:
    """One window per item that has HISTORY items before it, or the last item of a shorter user (BIGRec, MSL); all
    windows in order of the target's time, 8:1:1. Ties in time keep the order of the files."""
    rows = [window(s, at, u) for u, s in enumerate(users) for at in range(min(HISTORY, len(s) - 1), len(s))]
    rows.sort(key=lambda r: r[3])
    a, b = int(0.8 * len(rows)), int(0.8 * len(rows)) + int(0.1 * len(rows))
    return rows[:a], rows[a:b], rows[b:]


def split_loo(users: list[list[tuple[int, float]]]) -> tuple[list, list, list]:
    """Leave one out (SASRec, TIGER): a user's last item is for test, the one before for validation."""
    long = [(u, s) for u, s in enumerate(users) if len(s) >= 3]
    rest = [(u, s[:-2]) for u, s in long]
    train = [window(s, at, u) for u, s in rest for at in range(min(HISTORY, len(s) - 1), len(s)) if at]
    return train, [window(s, len(s) - 2, u) for u, s in long], [window(s, len(s) - 1, u) for u, s in long]


def before_held_out(users: list, train: list, held_out: list) -> list[list[int]]:
    """What may be learnt from under split_time: interactions no later than the last training target, none held out."""
    last = max((r[3] for r in train), default=0)
    held = Counter(r[2] for r in held_out)  # a user's last ones
    return [[i for i, t in s[: len(s) - held[u]] if t <= last] for u, s in enumerate(users)]


def chain(train: list) -> list[list[int]]:
    """The sequences along which published training windows slid: a window that fits continues its user's last one."""
    open_, done = {}, []
    for history, target, user, _ in sorted(train, key=lambda r: r[3]):
        s = open_.get(user)
        if s is not None and s[-len(history) :] == history:
            s.append(target)
        else:
            done.append([*history, target])
            open_[user] = done[-1]
    return done


def read_windows(folder: Path, index: dict[str, int], titles: list[str]) -> dict[str, list]:
    """split -> rows for Windows. Untitled items leave the histories; a window with an untitled target is dropped."""
    rows, users = {"train": [], "valid": [], "test": []}, {}
    for where, (split, user, items, time, *_) in read_table(folder, "windows", 4, "split")[1]:
        if split not in rows:
            raise InputError(f"{where}: split '{split}' is none of train, valid, test")
        *history, target = read_ids(where, items, index, 2)
        history = [i for i in history if titles[i]][-HISTORY:]
        t, *more = read_numbers(where, time) or [0.0]
        if more:
            raise InputError(f"{where}: one time, the target's, is needed, not '{time}'")
        if titles[target] and history:
            rows[split].append((history, target, users.setdefault(user, len(users)), t))
    if not rows["train"] or not rows["test"]:
        raise InputError(f"{folder}/windows.tsv: no window of split {'test' if rows['train'] else 'train'}")
    if not rows["valid"]:  # published without one: the latest ninth of the training windows
        rows["train"].sort(key=lambda r: r[3])
        cut = len(rows["train"]) * 8 // 9
        rows["train"], rows["valid"] = rows["train"][:cut], rows["train"][cut:]
    return rows


def find(name: str, data_dir: str | None) -> Path:
    """The folder of a data set: a path, else NAME in --data_dir, $HATLLM_DATA or data/, else it is fetched to data/."""
    places = [Path(p) / name for p in (data_dir, os.environ.get("HATLLM_DATA"), "data") if p]
    for place in [Path(name), *places]:
        if any(place.glob("items.tsv*")):
            return place
    if name in fetch.KNOWN and name in PRESETS:
        return fetch.dataset(name, Path(data_dir or "data"))
    near = difflib.get_close_matches(name, PRESETS, 1)
    hint = (
        f"did you mean '{near[0]}'?"
        if near and near[0] != name
        else f"presets that can be fetched: {', '.join(PRESETS[:2])}"
    )
    raise InputError(f"--data {name}: no items.tsv[.gz] in {', '.join(map(str, [name, *places]))}; {hint}")


def load(name: str, data_dir: str | None = None, split: str = "time", k: int = CORE) -> Dataset:
    """The data set of that name or folder, split by time or loo; a published split (windows.tsv) stays as it is."""
    folder = find(name, data_dir)
    ids, titles = read_items(folder)
    index = {x: i for i, x in enumerate(ids)}
    if any(folder.glob("windows.tsv*")):
        if split != "time":
            raise InputError(f"--split {split}: {folder} is a published split, which is used as it is")
        rows = read_windows(folder, index, titles)
        sequences = chain(rows["train"])
    else:
        users = {u: [(i, t) for i, t in s if titles[i]] for u, s in read_sequences(folder, index).items()}
        users = list(core(users, k).values())
        if not users:
            raise InputError(
                f"{folder}: no user is left of the {k}-core (items without a title leave first); try --core 0"
            )
        rows = dict(zip(("train", "valid", "test"), (split_loo if split == "loo" else split_time)(users), strict=True))
        held_out = rows["valid"] + rows["test"]
        sequences = (
            [[i for i, _ in s[:-2]] for s in users]
            if split == "loo"
            else before_held_out(users, rows["train"], held_out)
        )
    return catalogued(folder.name, ids, titles, rows, sequences)


def catalogued(name: str, ids: list[str], titles: list[str], rows: dict, sequences: list[list[int]]) -> Dataset:
    """Renumbers the items that occur, in the order of items.tsv: they are the catalogue."""
    occur = {i for s in sequences for i in s} | {i for part in rows.values() for h, t, *_ in part for i in (*h, t)}
    kept = sorted(occur)
    new = {old: i for i, old in enumerate(kept)}
    parts = {k: Windows.of([([new[i] for i in h], new[t], u, s) for h, t, u, s in part]) for k, part in rows.items()}
    sequences = [[new[i] for i in s] for s in sequences if s]
    return Dataset(name, [ids[i] for i in kept], [titles[i] for i in kept], sequences=sequences, **parts)


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue as a trie of title tokens


class Trie:
    """All titles, each with its end token, as arrays. Nodes are numbered breadth first, so that a node's children are
    neighbours: child[n] .. child[n] + fan[n] - 1. Node 0 is the root. A leaf ends one title; several items may bear it.
    Built without a Python loop over nodes, in about 80 bytes a node: 100,000 titles, 1.6 million nodes, in 1.3 s."""

    def __init__(self, paths: list[np.ndarray]):
        """paths: token ids of every item's title, the end token last (so that no title is the beginning of another)."""
        size = np.array([len(p) for p in paths])
        table = np.full((len(paths), size.max() + 1), -1, np.int64)  # -1 after the end
        table[np.arange(table.shape[1]) < size[:, None]] = np.concatenate(paths)
        table, leaf_of = np.unique(table, axis=0, return_inverse=True)  # sorted: a subtree is a run of rows
        leaf_of = leaf_of.reshape(-1)
        size = (table >= 0).sum(1)
        new = np.ones(table[:, :-1].shape, bool)  # does row r start a node at depth d + 1?
        new[1:] = np.logical_or.accumulate(table[1:, :-1] != table[:-1, :-1], axis=1)
        new &= table[:, :-1] >= 0
        rank = np.cumsum(new, 0) - 1 + np.concatenate(([1], 1 + np.cumsum(new.sum(0))[:-1]))  # breadth first, root is 0
        nodes = np.where(table[:, :-1] >= 0, rank, -1)  # (leaves, depth) node of every prefix
        self.n_nodes, self.n_leaves = int(new.sum()) + 1, len(table)
        row, depth = np.nonzero(new)
        node = nodes[row, depth]
        self.token, self.parent, self.depth, self.fan, self.child, self.leaf, self.leaves = np.zeros(
            (7, self.n_nodes), int
        )
        self.token[node], self.depth[node] = table[row, depth], depth + 1
        self.parent[node] = np.where(depth > 0, nodes[row, depth - 1], 0)
        self.fan += np.bincount(self.parent[1:], minlength=self.n_nodes)
        self.child[:] = np.searchsorted(self.parent[1:], np.arange(self.n_nodes)) + 1  # parents ascend along the nodes
        self.leaf[node] = row  # the first of the leaves below a node
        self.leaves[0] = self.n_leaves  # how many they are
        np.add.at(self.leaves, nodes[nodes >= 0], 1)
        self.start = np.concatenate(([0], np.cumsum(size)))  # leaf -> its range in path_token, path_node
        self.path_token, self.path_node = table[table >= 0], nodes[nodes >= 0]
        self.leaf_of_item = leaf_of
        self.stop = np.arange(self.n_nodes)  # where the titles below a node part, or its leaf where there is one title
        for d in range(self.depth.max() - 1, 0, -1):
            n = np.flatnonzero((self.depth == d) & (self.fan == 1))
            self.stop[n] = self.stop[self.child[n]]
        self.items = np.argsort(leaf_of, kind="stable")  # items in the order of their leaves
        self.first_item = np.searchsorted(leaf_of[self.items], np.arange(self.n_leaves + 1))
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, torch.from_numpy(np.ascontiguousarray(value)))

    def to(self, device) -> "Trie":
        """A copy on device, for the model's side; this one stays where batches are made."""
        new = copy.copy(self)
        vars(new).update({name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)})
        return new


# ---------------------------------------------------------------------------------------------------------------------
# Text to token batches


def train_tokenizer(titles: list[str], vocab_size: int = 4096) -> Tokenizer:
    """A byte-level BPE of the catalogue (and the prompt), for models from scratch; <|end|> is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # any title typed by hand can be encoded
    special = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*titles, *PROMPT], special)
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{path} is missing; a model's folder holds config.json, tokenizer.json and *.safetensors")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises a bare Exception
        raise InputError(f"{path}: not a tokenizer ({e})") from None


class Catalogue:
    """The titles as token ids, the trie over them, and the prompt around a history."""

    def __init__(self, titles: list[str], tokenizer: Tokenizer, eos: int):
        tokenizer.encode_special_tokens = True  # a title that spells '<|endoftext|>' is text
        self.bos = np.array(tokenizer.encode("").ids, int)  # what the tokenizer itself puts first, as Llama 3's does
        self.head, self.separator, self.header = (self.encode(tokenizer, text) for text in PROMPT)
        self.titles = [self.encode(tokenizer, t) for t in titles]
        self.first = np.cumsum([0] + [len(t) for t in self.titles])
        self.trie = Trie([np.append(t, eos) for t in self.titles])
        items, first = self.trie.items.tolist(), self.trie.first_item.tolist()
        self.bearers = [items[a:b] for a, b in zip(first, first[1:], strict=False)]  # the items of every leaf

    @staticmethod
    def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, int)

    def trunk(self, history) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """tokens, item of the instruction and the titles, and how many tokens the first k = 0, 1, .. items take."""
        tokens, item, ends = [self.bos, self.head], [np.zeros(len(self.bos) + len(self.head), int)], [0]
        ends[0] = len(item[0])
        for k, i in enumerate(history, 1):
            gap = self.separator if k > 1 else self.separator[:0]
            tokens += [gap, self.titles[i]]
            item += [np.zeros(len(gap), int), np.full(len(self.titles[i]), k)]
            ends.append(ends[-1] + len(gap) + len(self.titles[i]))
        return np.concatenate(tokens), np.concatenate(item), ends

    def prompt(self, history) -> tuple[np.ndarray, np.ndarray]:
        """tokens (T,), item (T,) up to and with the response header."""
        tokens, item, _ = self.trunk(history)
        return np.append(tokens, self.header), np.append(item, np.zeros(len(self.header), int))


@dataclass
class Example:
    """One history and the targets that are learnt from it: (k, item) follows the first k items of the history."""

    history: list[int]
    targets: list[tuple[int, int]]


def window_examples(windows: Windows) -> list[Example]:
    return [Example(h, [(len(h), t)]) for h, t in zip(windows.histories(), windows.target.tolist(), strict=True)]


def examples(data: Dataset, targets: str = "last", share: bool = True) -> list[Example]:
    """What an epoch goes through. last: a training window an example, the published recipe. all: every item of the
    training part that has one before it is a target once; those of a stretch of HISTORY items share one example (the
    next stretch starts STRIDE later, so that no history is cut to less than HISTORY - STRIDE), or, to compare, none."""
    if targets == "last":
        return window_examples(data.train)
    out = []
    for s in data.sequences:
        first = 1
        while first < len(s):
            last = min(HISTORY if first == 1 else first + STRIDE - 1, len(s) - 1)
            a = max(0, last - HISTORY)
            out.append(Example(s[a:last], [(j - a, s[j]) for j in range(first, last + 1)]))
            first = last + 1
    return out if share else [Example(e.history[:k], [(k, t)]) for e in out for k, t in e.targets]


@dataclass
class Batch:
    tokens: Tensor  # (B, T) right-padded with 0
    item: Tensor  # (B, T) as in hatllm.Layout, -1 on padding
    branch: Tensor | None  # (B, T), None where every example has one target
    fork: Tensor | None  # (B, T)
    rows: Tensor  # (R,) positions b * T + t that have a loss
    next: Tensor  # (R,) the token to predict there
    node: Tensor  # (R,) trie node of the title so far: its children are what may follow

    def to(self, device) -> "Batch":
        return Batch(*(v if v is None else v.to(device, non_blocking=True) for v in vars(self).values()))


def encode(cat: Catalogue, e: Example, trie_only: bool) -> dict[str, np.ndarray]:
    """An example as arrays: tokens, item, branch, fork (T,), at, next, node (R,), and n_tokens, the number
    of title tokens with the end tokens, those without a row included: what a loss is a mean of.

    trie_only: under the masked softmax a token that alone can follow has probability 1, so it has no row; and what
    comes after the title is settled is not even fed to the model. The loss and its gradients are the same."""
    trie, single = cat.trie, len(e.targets) == 1
    tokens, item, ends = cat.trunk(e.history)
    assert not single or e.targets[0][0] == len(e.history), "a lone target follows the whole history"
    parts = {"tokens": [tokens], "item": [item], "branch": [0 * item], "fork": [0 * item]}
    at, follow, nodes, n_tokens, offset = [], [], [], 0, len(tokens)
    for b, (k, target) in enumerate(e.targets, 1):
        leaf = trie.leaf_of_item[target]
        path = slice(trie.start[leaf], trie.start[leaf + 1])
        title, node = trie.path_token[path].numpy(), np.append(0, trie.path_node[path][:-1].numpy())
        n_tokens += len(title)
        row = np.arange(len(title))
        fed = title[:-1]
        if trie_only:
            row = np.flatnonzero(trie.fan.numpy()[node] > 1)
            fed = title[: row[-1] if len(row) else 0]
        new = np.append(cat.header, fed)
        parts["tokens"].append(new)
        parts["item"].append(np.append(0 * cat.header, np.full(len(fed), k + 1)))
        parts["branch"].append(np.full(len(new), 0 if single else b))
        parts["fork"].append(np.full(len(new), ends[k]))
        at.append(offset + len(cat.header) - 1 + row)
        follow.append(title[row])
        nodes.append(node[row])
        offset += len(new)
    out = {"at": at, "next": follow, "node": nodes} | parts
    return {name: np.concatenate(v) for name, v in out.items()} | {"n_tokens": n_tokens}


def collate(coded: list[dict]) -> Batch:
    """Encoded examples, right-padded."""
    B, T = len(coded), max(len(c["tokens"]) for c in coded)
    grid = {name: np.full((B, T), -1 if name == "item" else 0) for name in ("tokens", "item", "branch", "fork")}
    for b, c in enumerate(coded):
        for name, values in grid.items():
            values[b, : len(c[name])] = c[name]
    flat = {name: torch.from_numpy(np.concatenate([c[name] for c in coded])) for name in ("at", "next", "node")}
    flat["at"] += torch.repeat_interleave(torch.arange(B) * T, torch.tensor([len(c["at"]) for c in coded]))
    tokens, item, branch, fork = (torch.from_numpy(v) for v in grid.values())
    if not branch.any():
        branch = fork = None
    return Batch(tokens, item, branch, fork, flat["at"], flat["next"], flat["node"])


def collate_prompts(cat: Catalogue, histories: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, item, source (B, T) of prompts that end with the response header, right-padded. source: where a title's
    token stands among the tokens of all titles, one title after the other; -1 elsewhere."""
    coded = [(*cat.prompt(h), h) for h in histories]
    tokens, item, source = np.zeros((3, len(coded), max(len(t) for t, *_ in coded)), int)
    item, source = item - 1, source - 1
    for b, (t, i, history) in enumerate(coded):
        tokens[b, : len(t)], item[b, : len(i)] = t, i
        places = [np.arange(cat.first[x], cat.first[x] + len(cat.titles[x])) for x in history]
        source[b, np.flatnonzero(i > 0)] = np.concatenate(places) if places else []
    return torch.from_numpy(tokens), torch.from_numpy(item), torch.from_numpy(source)
