"""From a trained model to recommendations and numbers.

python eval.py --out out/beauty                                  # HR, NDCG on the test split, beside popularity
python eval.py --out out/beauty --recommend "title a" "title b"  # what comes next for a history typed by hand
"""

import difflib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as llama
from common import DTYPES, World, choose, device_and_dtype, newest, parse_flags, run, write_json
from data import Catalogue, Dataset, Windows
from decode import Decoder
from hatllm import InputError
from model import Llama

KS = (1, 5, 10)  # cut-offs of HR and NDCG
SEEN = ((0, 4), (5, 19), (20, 10**9))  # slices of the report: how often the target occurs in training


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: pure functions of where the target stands


def hits(before: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """HR@k (N,): before (N,) items score higher than the target, ties (N,) equally high, the target among them; the
    expectation over the orders in which the tied may stand."""
    return np.clip(k - before, 0, ties) / ties


def gains(before: np.ndarray, ties: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k (N,) for one relevant item, 1 / log2(1 + rank) up to rank k, expected over the orders of the tied."""
    sums = np.concatenate(([0], np.cumsum(1 / np.log2(2 + np.arange(k)))))
    return (sums[np.minimum(k, before + ties).astype(int)] - sums[np.minimum(k, before).astype(int)]) / ties


def metrics(before: np.ndarray, ties: np.ndarray) -> dict[str, float]:
    """before = inf for a target that is not listed."""
    table = {f"HR@{k}": hits(before, ties, k) for k in KS} | {f"NDCG@{k}": gains(before, ties, k) for k in KS}
    return {name: float(values.mean()) for name, values in table.items()} if len(before) else dict.fromkeys(table, 0.0)


def place(score: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """score (N, items), target (N,) -> before, ties."""
    own = np.take_along_axis(score, target[:, None], 1)
    return (score > own).sum(1), (score == own).sum(1)


def popularity(d: Dataset, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """The baseline that recommends to all what occurs most often in training: before, ties (N,)."""
    c = d.counts
    return (c > c[windows.target, None]).sum(1), (c == c[windows.target, None]).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# A split through the decoder


def batches(lengths: list[int], budget: int) -> list[np.ndarray]:
    """Indices in batches of at most budget tokens, padding included, longest texts first: if the memory is too small,
    the first batch says so."""
    order, out, a = np.argsort(-np.array(lengths), kind="stable"), [], 0
    while a < len(order):
        b = a + max(1, budget // max(1, lengths[order[a]]))
        out.append(order[a:b])
        a = b
    return out


def recommend(
    decoder: Decoder, cat: Catalogue, histories: list, flags: "Flags", targets: list[int] | None = None
) -> list[dict]:
    """The items of the k best titles for every history, as predictions.jsonl has them; with targets also the nll of
    each, -log p of its title. A title that several items bear lists all of them. exclude_history leaves out what is in
    it. A batch that is too large for the memory is halved."""
    device, n = decoder.model.head.device, flags.k + data.HISTORY * flags.exclude_history
    try:
        tokens, item, source = (x.to(device) for x in data.collate_prompts(cat, histories))
        own = cat.trie.leaf_of_item[torch.tensor(targets)].to(device) if targets else None
        limit = flags.patience or 1 << 40
        ranking = decoder.search(tokens, item, min(n, cat.trie.n_leaves), flags.beam, flags.exact, limit, source, own)
    except torch.OutOfMemoryError:
        if len(histories) == 1:
            raise InputError(
                "one user alone does not fit into the memory; lower --beam or use a smaller model"
            ) from None
        torch.cuda.empty_cache()
        half = len(histories) // 2
        first, second = (
            recommend(decoder, cat, histories[at], flags, targets and targets[at])
            for at in (slice(half), slice(half, None))
        )
        return first + second
    out = []
    columns = (x.tolist() for x in vars(ranking).values())
    for history, leaves, scores, sure, logp in zip(histories, *columns, strict=True):
        seen = set(history) if flags.exclude_history else set()
        groups = [
            ([i for i in cat.bearers[x] if i not in seen], s) for x, s in zip(leaves, scores, strict=True) if x >= 0
        ]
        groups = [g for g in groups if g[0]][: flags.k]
        out.append({"items": [g for g, _ in groups], "scores": [s for _, s in groups], "exact": sure})
        out[-1] |= {"nll": -logp} if targets else {}
    return out


def positions(predictions: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """before, ties (N,) of the targets in predictions: the metrics are a function of that file alone."""
    before, ties = np.full(len(predictions), np.inf), np.ones(len(predictions))
    for n, p in enumerate(predictions):
        sizes = [len(g) for g in p["items"]]
        for g, group in enumerate(p["items"]):
            if p["target"] in group:
                same = [s == p["scores"][g] for s in p["scores"]]
                before[n] = sum(sizes[: same.index(True)])
                ties[n] = sum(size for size, tied in zip(sizes, same, strict=True) if tied)
    return before, ties


def evaluate(decoder: Decoder, cat: Catalogue, windows: Windows, flags: "Flags") -> list[dict]:
    """A prediction per window, in the order of windows: user, history, target, and what `recommend` found."""
    histories = windows.histories()
    tree = 4 * flags.beam  # columns for the title tokens, so that the budget bounds the memory
    todo = batches([len(cat.prompt(h)[0]) + tree for h in histories], flags.tokens)
    predictions = [None] * len(windows)
    with tqdm(total=len(windows), desc="evaluate", unit="user", disable=not sys.stderr.isatty()) as bar:
        for at in todo:
            found = recommend(decoder, cat, [histories[i] for i in at], flags, windows.target[at].tolist())
            for i, p in zip(at, found, strict=True):
                own = {"user": int(windows.user[i]), "history": histories[i], "target": int(windows.target[i])}
                predictions[i] = own | p
            bar.update(len(at))
    return predictions


def report(d: Dataset, windows: Windows, before: np.ndarray, ties: np.ndarray) -> dict:
    """Metrics of all windows and of slices: how often the target occurs in training, how long the history is."""
    seen, length = d.counts[windows.target], (windows.history >= 0).sum(1)
    slices = {f"target seen {a}-{b} times".replace("-1000000000", "+"): (seen >= a) & (seen <= b) for a, b in SEEN}
    slices |= {"history of 1-4 items": length < 5, "history of 5+ items": length >= 5}
    slices = {name: {"n": int(m.sum())} | metrics(before[m], ties[m]) for name, m in slices.items() if m.any()}
    return {"n": len(before)} | metrics(before, ties) | {"slices": slices}


def table(rows: dict[str, dict]) -> str:
    """name -> metrics, as lines."""
    names = [f"{m}@{k}" for m in ("HR", "NDCG") for k in KS]
    wide = max(map(len, rows)) + 2
    lines = [" " * wide + "".join(f"{n:>9}" for n in names)]
    return "\n".join(lines + [f"{name:<{wide}}" + "".join(f"{r[n]:9.4f}" for n in names) for name, r in rows.items()])


def against(decoder: Decoder, cat: Catalogue, windows: Windows, negatives: int, budget: int) -> np.ndarray:
    """(N, 3): per window, the target against so many other titles, drawn without replacement and by the window's user
    and target alone: AUC, the share of them that score below it, a tie counts half; before, ties: the items that score
    higher, and equally high, itself among them. All titles where there are no more: the full ranking."""
    trie, device = cat.trie, decoder.model.head.device
    histories, size = windows.histories(), torch.tensor([len(x) for x in cat.bearers])
    n = min(negatives, trie.n_leaves - 1)
    todo = batches([len(cat.prompt(h)[0]) + 4 * n for h in histories], budget)
    result = np.zeros((len(windows), 3))
    for at in tqdm(todo, desc="AUC", unit="batch", disable=not sys.stderr.isatty()):
        own = trie.leaf_of_item[torch.from_numpy(windows.target[at])][:, None]
        rngs = [np.random.default_rng((windows.user[i], windows.target[i])) for i in at]
        others = torch.from_numpy(np.stack([rng.choice(trie.n_leaves - 1, n, replace=False) for rng in rngs]))
        leaves = torch.cat((own, others + (others >= own)), 1)  # skips the target
        tokens, item, _ = data.collate_prompts(cat, [histories[i] for i in at])
        score = decoder.score(tokens.to(device), item.to(device), leaves.to(device)).cpu()
        more, same = score > score[:, :1], score == score[:, :1]
        won = 1 - (more.sum(1) + (same.sum(1) - 1) / 2) / n
        result[at] = torch.stack((won, (more * size[leaves]).sum(1), (same * size[leaves]).sum(1)), 1).numpy()
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def load_data(out: Path, c: dict) -> Dataset:
    """The data of the run in out, whose config is c."""
    d = data.load(c["data"], c["data_dir"], c["split"], c["core"])
    if d.digest() != c["digest"]:
        raise InputError(f"{c['data']} is not the data that {out} was trained on: its files have changed since")
    return d


def load_run(out: Path, dtype: str = "auto") -> tuple[Llama, Catalogue, Dataset, dict]:
    """The best model of a run of train.py with its adapters merged, the catalogue, the data, the run's config."""
    try:
        c = json.loads((out / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise InputError(f"--out {out}: no run of train.py is there ({e})") from None
    device, dtype = device_and_dtype(dtype, c["model"])
    d = load_data(out, c)
    best = newest(out, "best")
    if best is None:
        raise InputError(f"--out {out}: no checkpoint yet; train.py writes one at each validation")
    if (best / "adapter_config.json").exists():
        m = llama.merge_lora(llama.load_lora(llama.load(Path(c["base"]), c["plan"]), best))
    else:
        m = llama.load(best, c["plan"])
    cat = Catalogue(d.titles, data.read_tokenizer(best), m.config.eos_token_id)
    return m.to(device, dtype).eval(), cat, d, c


def make_decoder(model: Llama, cat: Catalogue, config: dict, score: str = "trie") -> Decoder:
    """With the temperature that the model was trained at."""
    return Decoder(model, cat.trie, score, config["tau"] if config["loss"] == "msl" else 1.0)


def look_up(titles: tuple[str, ...], d: Dataset) -> list[int]:
    """Titles typed by hand -> items; a title that no item bears gets the nearest ones named."""
    index = {t.lower(): i for i, t in reversed(list(enumerate(d.titles)))}
    for t in titles:
        if t.lower() not in index:
            near = [d.titles[index[n]] for n in difflib.get_close_matches(t.lower(), index, 3, 0.4)]
            near = near or [x for x in d.titles if t.lower() in x.lower()][:3]
            raise InputError(
                f'no item is called "{t}"; '
                + ("near: " + ", ".join(f'"{n}"' for n in near) if near else "none is near")
            )
    return [index[t.lower()] for t in titles][-data.HISTORY :]


@dataclass
class Flags:
    out: str = ""  # folder of a run that train.py wrote
    split: str = "test"  # which windows: test or valid
    k: int = 10  # how many titles are ranked and written per user
    beam: int = 20  # prefixes of a user that advance in one step
    exact: bool = True  # keep what a step leaves over, so that the top k is exact; false: a plain beam search
    patience: int = 256  # give up being exact after so many title tokens a user (a model that knows nothing); 0: never
    score: str = "trie"  # trie: renormalised over what may follow; full: over the whole vocabulary
    exclude_history: bool = False  # never recommend what the history holds
    limit: int = 0  # evaluate the first so many windows only; 0: all
    tokens: int = 16384  # tokens in a batch: less needs less memory
    auc: int = 0  # also the AUC of the target against so many random titles; as many as there are: its exact rank
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 where it is faster; tiny: on a GPU only
    recommend: tuple = ()  # titles of a history, oldest first: print what comes next


def main(argv: list[str]):
    flags = parse_flags(Flags, argv, __doc__)
    for name, known in (("split", ("test", "valid")), ("score", ("trie", "full")), ("dtype", DTYPES)):
        choose(name, getattr(flags, name), known)
    for name in ("k", "beam", "tokens"):
        if getattr(flags, name) <= 0:
            raise InputError(f"--{name} must be above 0, not {getattr(flags, name)}")
    for name in ("limit", "auc", "patience"):
        if getattr(flags, name) < 0:
            raise InputError(f"--{name} must not be below 0, but is {getattr(flags, name)}")
    if flags.k < KS[-1] and not flags.recommend:
        raise InputError(f"--k {flags.k}: HR@{KS[-1]} needs {KS[-1]} titles at least")
    out, world = Path(flags.out or "out"), World()
    model, cat, d, config = load_run(out, flags.dtype)
    decoder = make_decoder(model, cat, config, flags.score)
    if flags.recommend:
        history = look_up(flags.recommend, d)
        (r,) = recommend(decoder, cat, [history], flags)
        print(f"after {' | '.join(d.titles[i] for i in history)}\n{'score':>9}  item    title")
        for group, score in zip(r["items"], r["scores"], strict=True):
            print(f"{score:9.3f}  {','.join(d.ids[i] for i in group):<7} {d.titles[group[0]]}")
        return
    if world.rank == 0:
        print(d.summary())
    test(decoder, cat, d, flags, out, world)


def test(decoder: Decoder, cat: Catalogue, d: Dataset, flags: Flags, out: Path, world: World):
    """The table on the screen, out/results-SPLIT.json and out/predictions-SPLIT.jsonl; each process does its share."""
    decoder.remember(cat.titles)
    windows, start = getattr(d, flags.split)[: flags.limit or None], time.time()
    mine = windows[world.rank :: world.size]
    predictions = world.gather(evaluate(decoder, cat, mine, flags))
    speed = len(windows) / (time.time() - start)
    ranked = world.gather(against(decoder, cat, mine, flags.auc, flags.tokens).tolist()) if flags.auc else []
    if world.rank:
        return
    result = report(d, windows, *positions(predictions))
    result |= {k: float(np.mean([p[k] for p in predictions])) for k in ("nll", "exact")} | {"users/s": speed}
    rows = {"popularity": metrics(*popularity(d, windows)), "model": result}
    if ranked:
        won, before, ties = np.array(ranked).T
        result["auc"] = float(won.mean())
        if flags.auc >= cat.trie.n_leaves - 1:  # all titles
            rows["model, full ranking"] = result["full ranking"] = metrics(before, ties)
            predictions = [
                p | {"before": int(b), "ties": int(t)} for p, b, t in zip(predictions, before, ties, strict=True)
            ]
    print(f"{flags.split} split, {len(windows):,} windows, ranked among all {len(d.ids):,} items, {flags.score} scores"
          + (", items of the history excluded (not for popularity)" if flags.exclude_history else ""))  # fmt: skip
    print(table(rows | {"  " + name: r for name, r in result["slices"].items()}))
    if ranked:
        print(f"AUC against {min(flags.auc, cat.trie.n_leaves - 1)} random titles: {result['auc']:.4f}")
    print(
        f"{result['nll']:.4f} nats per item; top {flags.k} exact for {result['exact']:.1%} of the users; "
        f"{speed:.1f} users/s; {out}/results-{flags.split}.json"
    )
    write_json(out / f"predictions-{flags.split}.jsonl", predictions)
    result = {"model": result, "popularity": rows["popularity"], "flags": vars(flags)}
    write_json(out / f"results-{flags.split}.json", result)


if __name__ == "__main__":
    run(main)
