"""From a trained model to recommendations and numbers.

    python eval.py --out out/beauty                                  # HR, NDCG on the test split, beside popularity
    python eval.py --out out/beauty --recommend "title a" "title b"  # what comes next for a history typed by hand
    python eval.py --out out/beauty --histories all                  # for every user: out/beauty/recommendations.tsv

Metrics are functions of where the target stands: `before` items score higher, `ties` score equally high, the target
among them. N windows.
"""

import argparse
import copy
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads spin briefly: 5 times faster on a shared machine
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while importing ends without a traceback

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
from data import Catalogue, Dataset, Window
from decode import Decoder
from hatllm import TARGET, InputError, layout, mask
from model import Llama, adapters, check_type, load, load_lora, merge_lora, read_json, write_json

KS = (1, 5, 10)  # cut-offs of HR and NDCG
NAMES = tuple(f"{metric}@{k}" for metric in ("HR", "NDCG") for k in KS)
CHECKPOINT = re.compile(r"(step|best)-\d{6,}")  # what train.py names so is its own
SEEN = {"0": (0, 0), "1-4": (1, 4), "5-19": (5, 19), "20+": (20, math.inf)}  # slices of the report: times in training
USERS = 4096  # histories of a file that are in memory at a time
TOKENS = 1 << (18 if torch.cuda.is_available() else 14)  # in a batch: hundreds of users on a GPU


# --- Metrics --------------------------------------------------------------------------------------------------------


def hits(before: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """HR@k (N,), the expectation over the orders in which the tied may stand."""
    return np.clip(k - before, 0, ties) / ties


def gains(before: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k (N,) for one relevant item, 1 / log2(1 + rank) up to rank k, expected over the orders of the tied."""
    sums = np.concatenate(([0], np.cumsum(1 / np.log2(2 + np.arange(k)))))
    return (sums[np.minimum(k, before + ties).astype(int)] - sums[np.minimum(k, before).astype(int)]) / ties


def metrics(before: np.ndarray, ties: np.ndarray) -> dict[str, float]:
    """before = inf for a target that is not listed."""
    values = [measure(before, ties, k) for measure in (hits, gains) for k in KS]
    return {name: float(v.mean()) if len(v) else 0.0 for name, v in zip(NAMES, values, strict=True)}


def positions(predictions: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """before, ties (N,) of the targets in predictions: the metrics are a function of that file alone."""
    before, ties = np.full(len(predictions), np.inf), np.ones(len(predictions))
    for n, p in enumerate(predictions):
        listed = list(zip(p["items"], p["scores"], strict=True))
        own = next((score for items, score in listed if p["target"] in items), None)
        if own is not None:
            before[n] = sum(len(items) for items, score in listed if score > own)
            ties[n] = sum(len(items) for items, score in listed if score == own)
    return before, ties


def popularity(d: Dataset, windows: list[Window], candidates=slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """before, ties (N,) under the baseline that recommends to all what occurs most often in training."""
    own, ascending = d.counts[[w.target for w in windows]], np.sort(d.counts[candidates])
    below, not_above = (np.searchsorted(ascending, own, side) for side in ("left", "right"))
    return len(ascending) - not_above, not_above - below


def report(d: Dataset, windows: list[Window], before: np.ndarray, ties: np.ndarray) -> dict:
    """Metrics of all windows and of slices: how often the target occurs in training, how long the history is."""
    seen, length = d.counts[[w.target for w in windows]], np.array([len(w.history) for w in windows])
    slices = {f"target seen {name} times": (seen >= a) & (seen <= b) for name, (a, b) in SEEN.items()}
    slices |= {"history of 1-4 items": length < 5, "history of 5+ items": length >= 5}
    slices = {name: {"n": int(m.sum())} | metrics(before[m], ties[m]) for name, m in slices.items() if m.any()}
    return {"n": len(before)} | metrics(before, ties) | {"slices": slices}


def table(rows: dict[str, dict]) -> str:
    """name -> metrics, as lines; the number of windows where it is known."""
    names = {name: f"{name} ({r['n']:,})" if "n" in r else name for name, r in rows.items()}
    wide = max(map(len, names.values())) + 2
    lines = [" " * wide + "".join(f"{n:>9}" for n in NAMES)]
    return "\n".join(lines + [f"{names[x]:<{wide}}" + "".join(f"{r[n]:9.4f}" for n in NAMES) for x, r in rows.items()])


# --- Windows through the decoder ------------------------------------------------------------------------------------


def out_of_memory(e: RuntimeError) -> bool:
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)


def recommend(decoder: Decoder, cat: Catalogue, histories: list, args, targets: list[int], prompts) -> list[dict]:
    """The items of the k best titles after every history; with targets also the nll of each, -log p of its title.
    prompts: what data.collate_prompts makes of the histories. A title that several items bear lists all of them. A
    batch that is too large for the memory is halved."""
    try:
        return search(decoder, cat, histories, args, targets, prompts)
    except RuntimeError as e:
        if not out_of_memory(e) or len(histories) == 1:
            raise
    torch.cuda.empty_cache()  # after the except block: its traceback kept the failed tensors
    half, found = len(histories) // 2, []
    for at in (slice(half), slice(half, None)):
        found += recommend(decoder, cat, histories[at], args, targets[at], [x[at] for x in prompts])
    return found


def search(decoder: Decoder, cat: Catalogue, histories: list, args, targets: list[int], prompts) -> list[dict]:
    device, k = decoder.model.head.device, args.k + data.HISTORY * args.exclude_history
    tokens, item, source = (x.to(device) for x in prompts)
    target = cat.trie.leaf_of_item[targets].to(device) if targets else None
    k = min(k, cat.trie.n_leaves)
    ranking = decoder.search(tokens, item, k, args.beam, args.patience, source, target)
    out = []
    columns = (x.tolist() for x in (ranking.leaf, ranking.score, ranking.exact, ranking.target))
    for history, leaves, scores, exact, logp in zip(histories, *columns, strict=True):
        hidden = set(history) if args.exclude_history else set()
        items = ([i for i in cat.bearers[leaf] if i not in hidden] for leaf in leaves if leaf >= 0)  # -1 stands last
        found = [(group, score) for group, score in zip(items, scores, strict=False) if group][: args.k]
        out.append({"items": [g for g, _ in found], "scores": [s for _, s in found], "exact": exact})
        if targets:
            out[-1]["nll"] = -logp
    return out


def sample(windows: list[Window], n: int) -> list[Window]:
    """n of the windows, drawn by a fixed seed, in their order; 0: all."""
    chosen = np.random.default_rng(0).permutation(len(windows))[: n or None]
    return [windows[i] for i in np.sort(chosen)]


def predict(decoder: Decoder, cat: Catalogue, d: Dataset, windows: list[Window], args) -> list[dict]:
    """A line of predictions.jsonl for every window, in their order: the files' own user and item ids, and titles.
    Either all windows have a target, or none has."""
    room = 4 * args.beam  # columns for the title tokens, so that the budget bounds the memory
    todo = data.batches([len(cat.prompt(w.history)[0]) + room for w in windows], args.tokens)
    prompts = data.ahead(lambda at: data.collate_prompts(cat, [windows[i].history for i in at]), todo)
    predictions = [None] * len(windows)
    with tqdm(total=len(windows), desc="evaluate", unit="user", leave=False, disable=None) as bar:
        for at, prompt in zip(todo, prompts, strict=True):
            some = [windows[i] for i in at]
            targets = [w.target for w in some if w.target is not None]
            found = recommend(decoder, cat, [w.history for w in some], args, targets, prompt)
            for i, w, p in zip(at, some, found, strict=True):
                own = {"user": w.user, "history": [d.ids[x] for x in w.history]}
                own |= {"target": d.ids[w.target]} if targets else {}
                titles = [" / ".join(dict.fromkeys(d.titles[x] for x in group)) for group in p["items"]]
                items = [[d.ids[x] for x in group] for group in p["items"]]
                predictions[i] = own | p | {"items": items, "titles": titles}
            bar.update(len(at))
    return predictions


# --- A run of train.py ----------------------------------------------------------------------------------------------


def device_and_dtype(dtype: str, scratch: bool) -> tuple[torch.device, torch.dtype]:
    """auto: bfloat16 where the hardware multiplies it faster; for the small model from scratch on a GPU only."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 cannot tell
            fast = not scratch and (has.get("avx512_bf16") or has.get("amx_bf16"))
        dtype = "bfloat16" if fast else "float32"
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # with its number, for threads
        # TF32 for what stays in fp32, as the head's product: exact for numbers out of bfloat16
        torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for half a second, for every new length of a text
    return device, getattr(torch, dtype)


def frozen(model: Llama, dtype: torch.dtype) -> Llama:
    """The model as validation and test compute it: adapters merged, weights in dtype."""
    if model.head.dtype != dtype or adapters(model):
        model = merge_lora(copy.deepcopy(model)).to(dtype)
    return model.eval()


def newest(out: Path, kind: str) -> Path | None:
    """out/KIND-000123 with the highest number; it was renamed to that name when complete."""
    found = [p for p in out.glob("*") if CHECKPOINT.fullmatch(p.name) and p.name.startswith(kind)]
    return max(found, key=lambda p: int(p.name[len(kind) + 1 :]), default=None)


def fingerprint(folder: str | Path) -> str:
    """Of a base's weights, config and tokenizer: what is trained on them belongs to them alone."""
    h, names = hashlib.sha256(), ("*.safetensors", "config.json", "tokenizer.json")
    for file in sorted(path for name in names for path in Path(folder).glob(name)) if folder else ():
        with open(file, "rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()[:16]


def mask_digest(plan: list[str]) -> str:
    """A fingerprint of the masks of these layers, for items of 1 to 10 tokens. A kind may be edited after a run."""
    items = [k for k in range(1, 11) for k in (*[k] * k, 0)]
    lay = layout(torch.tensor([[0, 0, *items, 0, TARGET, TARGET, TARGET]]))
    seen = [(kind, mask(kind, lay.item, lay.sees).tolist()) for kind in sorted(set(plan))]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def read_run(out: Path) -> dict:
    """config.json of a run of train.py."""
    if not (out / "config.json").exists():
        below = ", ".join(sorted(str(file.parent) for file in out.glob("*/config.json")))
        raise InputError(f"--out {out}: no run of train.py is there" + (f", but in {below:.300}" if below else ""))
    if "digest" not in read_json(out / "config.json"):
        raise InputError(f"--out {out}: no run of train.py; a model's folder is given to train.py as --model")
    kinds = dict.fromkeys("split columns data_folder digest dtype plan loss base base_source base_digest".split(), str)
    c = read_json(out / "config.json", kinds | {"core": int, "constants": dict})
    check_type(out / "config.json", "constants.TAU", c["constants"].get("TAU"), float, 1e-12)
    return c


def locate(out: Path, flag: str, given: str, stored: str, proof: str) -> Path:
    """A folder that a run needs: given by a flag, or where it was, or beside the run, which may have been moved."""
    name, out = Path(stored).name, out.resolve()
    places = [Path(given)] if given else [Path(stored), out / name, out.parent / name]
    for place in places:
        if any(place.glob(f"{proof}*")):
            return place
    raise InputError(f"{out} needs {proof} in {' or '.join(map(str, places))}; give its folder with --{flag}")


def load_data(out: Path, c: dict, given: str = "") -> Dataset:
    """The data of the run in out, whose config is c."""
    d = data.load(locate(out, "data", given, c["data_folder"], "items.tsv"), c["split"], c["core"], c["columns"])
    if d.digest != c["digest"]:
        raise InputError(f"{d.folder} is not the data that {out} was trained on: its files differ, or TIES in data.py")
    return d


def find_base(out: Path, c: dict, given: str = "") -> Path:
    """The folder of the base of the run in out, whose config is c."""
    base = locate(out, "base", given, c["base"], "config.json")
    if fingerprint(base) != c["base_digest"]:
        raise InputError(f"{base} is not the base that {out} was trained on: its weights, config or tokenizer differ")
    return base


def load_run(out, folder="", base="", catalogue="", only="", d=None) -> tuple[Llama, Catalogue, Dataset, dict]:
    """The best model of a run of train.py with its adapters merged, the catalogue, the data, the run's config. Paths
    as str or Path. folder, base: where its data and base are now. catalogue: a newer items.tsv. only: a file of ids,
    the candidates among its items. d: its data, if they are loaded already."""
    out = Path(out)
    c = read_run(out)
    was = {name: c["constants"].get(name) for name in ("PROMPT", "HISTORY", "TEXT_TOKENS")}
    edited = [f"{n} = {v!r}" for n, v in was.items() if v != json.loads(json.dumps(getattr(data, n)))]
    if edited:
        raise InputError(f"{out} was trained with {', '.join(edited)}; put that back into data.py to evaluate it")
    d, best = d or load_data(out, c, folder), newest(out, "best")
    if best is None:
        raise InputError(f"--out {out}: no checkpoint yet; train.py writes one at each validation")
    d, candidates = data.renew(d, Path(catalogue), c["columns"]) if catalogue else (d, range(len(d.ids)))
    if only:  # ids, one a line
        lines = map(str.strip, Path(only).read_text("utf-8-sig", "replace").splitlines())
        asked, known = {*lines} - {""}, len(candidates)
        candidates = [i for i in candidates if d.ids[i] in asked]
        print(f"{only}: {len(candidates):,} of its {len(asked):,} ids are among the {known:,} items")
    if not candidates:
        raise InputError(f"{only or catalogue} names no item that has a title and is in the catalogue")
    device, dtype = device_and_dtype(c["dtype"], not c["base"])
    if (best / "adapter_config.json").exists():
        model = load_lora(load(find_base(out, c, base), c["plan"], dtype), best)
    else:
        model = load(best, c["plan"], dtype)
    now = mask_digest(model.plan)
    if c.get("masks", now) != now:  # an older run has none
        raise InputError(f"{out} was trained with other masks of {c['plan']}; put them back into hatllm.py")
    model = frozen(model, dtype).to(device)
    return model, Catalogue(d.titles, data.read_tokenizer(best), model.config, d.texts, candidates), d, c


def make_decoder(model: Llama, cat: Catalogue, config: dict, score: str = "trie") -> Decoder:
    """With the temperature that the model was trained at."""
    return Decoder(model, cat.trie, score, config["constants"]["TAU"] if config["loss"] != "lml" else 1.0)


# --- Programs: flags, processes, errors -----------------------------------------------------------------------------


class World:
    """One process of torchrun's, or the only one."""

    def __init__(self):
        texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        self.rank, self.size = (int(t) if t.isdigit() else -1 for t in texts)
        all_set = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if not 0 <= self.rank < self.size or (self.size > 1 and not all_set):
            raise InputError(f"RANK is {self.rank}, WORLD_SIZE {self.size}: start several processes with torchrun")
        if self.size > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def gather(self, values: list) -> list:
        """The lists of all processes, in turn: the inverse of values[rank::size]."""
        if self.size == 1:
            return values
        parts = [None] * self.size
        dist.all_gather_object(parts, values)
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def sum_(self, t: Tensor):
        """Sums t over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(t)

    def barrier(self):
        if self.size > 1:
            dist.barrier()


def number(kind: type, least: float, most: float = 2**31):
    """A flag's type: a number in [least, most]."""

    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value

    parse.__name__ = f"{'whole ' * (kind is int)}number from {least} to {most}"  # argparse: "invalid NAME value: TEXT"
    return parse


class Parser(argparse.ArgumentParser):
    def __init__(self, **more):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)

    def error(self, message: str):
        raise InputError(message)


def run_main(main):
    """Calls main with the command line; what the user can mend, a full disk included, is a sentence, no traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # titles on a terminal that is not UTF-8; a log file that can be followed
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        done = main(sys.argv[1:])
        sys.stdout.flush()
        return done
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except RuntimeError as e:
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(f"error: --compile does not work here ({str(e).splitlines()[0]:.200}); go on without it")
        if not out_of_memory(e):
            raise
        sys.exit("error: the memory is full; a lower --tokens needs less; a run of train.py goes on with --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- The command line -----------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__)
    add, positive = p.add_argument, number(int, 1)
    add("--out", default="out", help="folder of a run that train.py wrote")
    add("--data", default="", help="its data set's folder, if that has moved")
    add("--base", default="", help="its pretrained model's folder, if that has moved")
    add("--split", default="test", choices=("test", "valid"), help="which windows (default: %(default)s)")
    add("--k", type=positive, default=10, help="how many titles are ranked and written per user (default: %(default)s)")
    add("--beam", type=positive, default=20, help="prefixes of a user that advance in one step (default: %(default)s)")
    add("--patience", type=number(int, 0), default=256,
        help="give up being exact after so many title tokens; 0: a plain beam (default: %(default)s)")  # fmt: skip
    add("--score", default="trie", choices=("trie", "full"),
        help="trie: over what may follow; full: over the whole vocabulary (default: %(default)s)")  # fmt: skip
    add("--exclude_history", action="store_true", help="never recommend the prompt's own items")
    add("--limit", type=number(int, 0), default=0, help="evaluate so many windows only, drawn by a fixed seed; 0: all")
    add("--tokens", type=positive, default=TOKENS, help="tokens in a batch; fewer need less memory")
    add("--catalogue", default="", metavar="FILE", help="a newer items.tsv: its items are the candidates")
    add("--only", default="", metavar="FILE", help="item ids, one a line: the only candidates")
    add("--to", default="", metavar="FILE", help="what --histories writes (default: recommendations.tsv in --out)")
    add = p.add_mutually_exclusive_group().add_argument
    add("--recommend", nargs="+", metavar="TITLE", help="a history, titles or ids, oldest first: print what comes next")
    add("--user", help="print what comes next for a user of the data")
    add("--histories", metavar="FILE", help="user_id, item_ids: write what comes next; all: for the data's users")
    return p


DEFAULTS = make_parser().parse_args([])
ASK = ("recommend", "user", "histories")  # the flags that ask for recommendations


class Recommender:
    """What comes next after a history, under a run of train.py."""

    def __init__(self, out: str | Path, **flags):
        """out: the run's folder. flags: those of the command line, as only="ids.txt" or exclude_history=True."""
        given = {name: value for name, value in flags.items() if value is not False and value not in (None, "")}
        argv = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
        a = self.args = make_parser().parse_args(argv)
        self.model, self.cat, self.d, self.config = load_run(out, a.data, a.base, a.catalogue, a.only)
        self.decoder = make_decoder(self.model, self.cat, self.config, a.score)
        # a name means a title as written, else a title in any case, else an id; of equal titles the first
        self.of_id, numbered = {x: i for i, x in enumerate(self.d.ids)}, [*enumerate(self.d.titles)][::-1]
        self.of_title = {t.lower(): i for i, t in numbered} | {t: i for i, t in numbered}

    def top_k(self, histories: list[list[str]], k: int | None = None) -> list[dict]:
        """histories: titles or item ids, oldest first -> for each the k best titles (None: 10, or the flag), as in
        predictions.jsonl: "titles", "scores" (log-probabilities), and "items", for every title the ids that bear it."""
        args = argparse.Namespace(**vars(self.args) | {"k": self.args.k if k is None else k})
        if args.k < 1:
            raise InputError(f"top_k: k is {k}; 1 is the least")
        return predict(self.decoder, self.cat, self.d, [self.window(h) for h in histories], args)

    def window(self, history: list[str]) -> Window:
        """Of titles or ids. What is neither gets the nearest titles named."""
        if isinstance(history, str) or not history:
            raise InputError("a history is a list of titles or item ids, one at least")
        names = [" ".join(str(name).split()) for name in history]
        items = [self.of_title.get(x, self.of_title.get(x.lower(), self.of_id.get(x))) for x in names]
        if None in items:
            unknown, titles = names[items.index(None)], {t.lower(): t for t in self.d.titles}
            near = [titles[t] for t in difflib.get_close_matches(unknown.lower(), titles)]
            near = near or [t for t in self.d.titles if unknown.lower() in t.lower()][:3]
            near = "near: " + ", ".join(f'"{t}"' for t in near) if near else "none is near"
            raise InputError(f'no item is called "{unknown}"; {near}')
        return Window(items[-data.HISTORY :], None, "", math.inf)

    def asked(self, args) -> Window:
        """What --recommend or --user of the command line asks for."""
        if args.user is not None and args.user not in self.d.future:
            raise InputError(f"--user {args.user}: {self.d.folder.name} has no such user_id, or --core dropped it")
        return self.window(args.recommend) if args.recommend else self.d.future[args.user]


def print_recommendations(r: Recommender, args):
    window = r.asked(args)
    (p,) = predict(r.decoder, r.cat, r.d, [window], args)
    print(f"after {' | '.join(r.d.titles[i] for i in window.history)}\n{'score':>9}  item    title")
    for ids, score, title in zip(p["items"], p["scores"], p["titles"], strict=True):
        print(f"{score:9.3f}  {','.join(ids):<7} {title}")
    if not p["exact"]:
        print("not certain: other titles may score more; a higher --patience looks for them")


def write_recommendations(r: Recommender, args, world: World):
    """A line for every recommended item; those of one title share a rank. The file appears when it is complete, and
    what is wrong in the histories shows before the work. Each process does its share."""
    path = Path(args.to or args.out)
    path = path / "recommendations.tsv" if path.is_dir() else path

    def histories() -> Iterator[Window]:
        own = args.histories == "all"
        return iter(r.d.future.values()) if own else data.read_histories(Path(args.histories), r.d.ids)

    windows, users, certain = histories(), sum(1 for _ in histories()), 0
    part = path.with_name(f"{path.name}.part{world.rank}-{os.getpid()}")
    r.decoder.remember(r.cat.texts)
    try:
        with (
            open(part, "w", encoding="utf-8") as file,
            tqdm(total=users, unit="user", disable=world.rank > 0 or None) as bar,
        ):
            file.write("user_id\trank\titem_id\ttitle\tscore\n")
            while some := list(itertools.islice(windows, USERS)):
                for p in world.gather(predict(r.decoder, r.cat, r.d, some[world.rank :: world.size], args)):
                    certain += p["exact"]
                    for n, ids in enumerate(p["items"]):
                        own = f"{p['titles'][n]}\t{p['scores'][n]:.4f}\n"
                        file.writelines(f"{p['user']}\t{n + 1}\t{i}\t{own}" for i in ids)
                bar.update(len(some))
        if world.rank == 0:
            os.replace(part, path)
            print(f"recommendations for {users:,} users, {certain:,} of them exact (--patience), written to {path}")
    finally:
        part.unlink(missing_ok=True)


def test(decoder: Decoder, cat: Catalogue, d: Dataset, args, out: Path, world: World, base_source: str = ""):
    """The table on the screen, out/results-SPLIT.json and out/predictions-SPLIT.jsonl; each process does its share."""
    decoder.remember(cat.texts)
    candidate, every, start = (cat.trie.leaf_of_item >= 0).numpy(), getattr(d, args.split), time.time()
    windows = [w for w in every if candidate[w.target]]
    dropped, windows = len(every) - len(windows), sample(windows, args.limit)
    if not windows:
        raise InputError(f"no target of the {args.split} windows is a candidate under --catalogue or --only")
    mine = windows[world.rank :: world.size]
    predictions = world.gather(predict(decoder, cat, d, mine, args))
    speed = len(windows) / (time.time() - start)
    if world.rank:
        return
    result = report(d, windows, *positions(predictions)) | {"dropped": dropped}
    result |= {name: float(np.mean([p[name] for p in predictions])) for name in ("nll", "exact")} | {"users/s": speed}
    popular = popularity(d, windows, candidate)
    rows = {"popularity": metrics(*popular), "model": result}
    seen, places = d.counts[[w.target for w in windows]].tolist(), np.stack(popular, 1).tolist()
    predictions = [p | {"seen": n, "popularity": at} for p, n, at in zip(predictions, seen, places, strict=True)]
    name = f"{args.split}{tag(args, (d.ids, d.titles, candidate.tolist()))}"
    write_json(out / f"predictions-{name}.jsonl", predictions)
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "data", "base")}
    saved = {"model": result, "popularity": rows["popularity"], "flags": flags, "base": base_source}
    write_json(out / f"results-{name}.json", saved)
    print(f"{args.split} split, {len(windows):,} windows, ranked among all {sum(map(len, cat.bearers)):,} items"
          + (", items of the history excluded (not for popularity)" if args.exclude_history else "")
          + (f"; {dropped:,} windows dropped, as their target is no candidate" if dropped else ""))  # fmt: skip
    print(table(rows | {"  " + name: r for name, r in result["slices"].items()}))
    over = "tokens that continue a title" if args.score == "trie" else "whole vocabulary"
    print(f"{result['nll']:.4f} nats per item: -log p of the target's title, over the {over} ({args.score} scores)")
    print(f"exact for {result['exact']:.1%} of the users: for them no title beats the {args.k} listed (--patience)")
    print(f"{speed:.1f} users/s{base_source and '; base: ' + base_source}; written to {out / f'results-{name}.json'}")


def tag(args, catalogue) -> str:
    """What differs from the defaults, as a part of a file name: other settings never overwrite a full result."""
    names = "limit k beam patience score exclude_history".split()
    names = [name for name in names if vars(args)[name] != vars(DEFAULTS)[name]]
    among = hashlib.sha256(repr(catalogue).encode()).hexdigest()[:8] if args.catalogue or args.only else ""
    return "".join(f"-{name}{vars(args)[name]}" for name in names) + (among and f"-among{among}")


def main(argv: list[str]):
    args = make_parser().parse_args(argv)
    asked = any(vars(args)[name] is not None for name in ASK)
    if args.k < KS[-1] and not asked:
        raise InputError(f"--k {args.k}: HR@{KS[-1]} needs {KS[-1]} titles at least")
    if args.to and args.histories is None:
        raise InputError("--to says where --histories writes; it goes with no other flag")
    if asked and (args.limit or args.split != DEFAULTS.split):
        raise InputError("--limit and --split are for the test; they go with none of --recommend, --user, --histories")
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "to", *ASK)}
    world, r = World(), Recommender(args.out, **flags)
    if args.histories is not None:
        return write_recommendations(r, args, world)
    if asked:
        return print_recommendations(r, args)
    if world.rank == 0:
        print(r.d.summary())
    test(r.decoder, r.cat, r.d, args, Path(args.out), world, r.config["base_source"])


if __name__ == "__main__":
    run_main(main)
