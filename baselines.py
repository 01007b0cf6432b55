"""What any recommender has to beat: popularity, and SASRec trained with cross-entropy, on the same split.

    python baselines.py                                       # MovieLens-100K
    python baselines.py --data beauty --split loo --seeds 3   # leave one out; mean over three seeds
    python baselines.py --data beauty --hidden 64 --dropout 0.5   # one configuration instead of the grid

SASRec (Kang and McAuley, 2018) with the softmax over all items in place of sampled negatives, as RecBole trains it by
default: item and position embeddings, a causal transformer, the item embeddings again as output. It learns from the
training interactions (Dataset.sequences; every next item is a target) and is asked with the histories that the LLM
gets: the last 10 items. The configuration is chosen by NDCG@10 on validation. All items are ranked, ties count
fairly. Shapes as in model.py: B sequences, T items, H heads, D head width, N items.

On beauty --split loo others report, of all items, for the test targets:
    HR@10 0.083,  NDCG@10 0.042   RecBole's SASRec with its defaults        (RUCAIBox/RecBole, issue 1290)
    HR@10 0.082,  NDCG@10 0.041   the same; 0.103 and 0.050 on validation   (HonghuiBao2000/LETTER, issue 20)
    HR@10 0.092,  NDCG@10 0.053   softmax over 256 negatives, one layer     (blondered/transformer_benchmark, README)
    HR@10 0.0605, NDCG@10 0.032   one sampled negative, as in 2018          (ibid., as papers quote it)
    HR@10 0.083,  NDCG@10 0.042   here: --hidden 64 --dropout 0.5, seed 0; 0.050 on validation
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from common import choose, device_and_dtype, parse_flags, run, write_json
from data import HISTORY, Dataset
from eval import batches, metrics, place, popularity, report, table
from hatllm import InputError

MAX_LEN = 50  # items that SASRec looks back on in training, as published for the Amazon sets
GRID = [(64, 0.5), (64, 0.2), (128, 0.5), (128, 0.2)]  # (hidden, dropout); the first one is RecBole's default
LAYERS, HEADS = 2, 2


@dataclass
class Flags:
    data: str = "ml-100k"  # data set: ml-100k, beauty, office, books, or the path of a folder
    data_dir: str = ""  # where data sets lie; else $HATLLM_DATA, else data/, to which presets are fetched
    split: str = "time"  # time: 8:1:1 by the target's time; loo: leave one out
    core: int = 5  # keep users and items with at least so many interactions; 0: all
    history: int = 10  # items SASRec is asked with: 10 as the LLM; with --split loo up to 50, as published
    exclude_history: bool = False  # SASRec never recommends what it is asked with, as eval.py's flag of that name
    hidden: int = 0  # width; 0: the better one of 64 and 128 on validation
    dropout: float = -1.0  # dropout; -1: the better one of 0.2 and 0.5 on validation
    lr: float = 1e-3  # learning rate of Adam
    tokens: int = 512  # positions in a step, padding included: nearly so many targets
    epochs: int = 100  # passes over the training sequences at most
    patience: int = 5  # stop after so many epochs without a better NDCG@10 on validation
    seeds: int = 1  # train the chosen configuration with the seeds 0 .. so many - 1; the grid is run with seed 0
    out: str = "out"  # folder of baselines-DATA-SPLIT.json (metrics) and .jsonl (SASRec's rank of each target)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """Self-attention and MLP, each normalised after its residual, as published."""

    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.norm1, self.norm2, self.drop = nn.LayerNorm(hidden), nn.LayerNorm(hidden), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        p = self.drop.p if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.drop(self.proj(a)))
        return self.norm2(x + self.drop(self.mlp(x)))


class SASRec(nn.Module):
    """Padding stands at the end, where the causal mask hides it: it may be any item and needs no mask of its own."""

    def __init__(self, n_items: int, hidden: int, dropout: float):
        super().__init__()
        self.item, self.position = nn.Embedding(n_items, hidden), nn.Embedding(MAX_LEN, hidden)
        self.norm, self.drop = nn.LayerNorm(hidden), nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(hidden, dropout) for _ in range(LAYERS)))
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T) items -> (B, T, hidden)"""
        return self.blocks(self.drop(self.norm(self.item(x) + self.position.weight[: x.shape[1]])))

    def loss(self, x: Tensor) -> Tensor:
        """x (B, T + 1) with -1 for padding: mean over the targets of -log p(next item), p a softmax over all items."""
        target = x[:, 1:]
        h = self(x[:, :-1].clamp(min=0))[target >= 0]
        return F.cross_entropy(h @ self.item.weight.T, target[target >= 0])


def pad(rows: list[list[int]]) -> Tensor:
    """-> (B, T), -1 at the end of the shorter ones."""
    out = torch.full((len(rows), max(map(len, rows))), -1)
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.tensor(row)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What is learnt from, what is asked


def pieces(sequences: list[list[int]]) -> list[list[int]]:
    """Sequences cut into pieces of at most MAX_LEN inputs and a target each, counted from the end: the last item of
    one piece begins the next, so that every item but the very first is a target once."""
    return [s[max(0, end - MAX_LEN - 1) : end] for s in sequences for end in range(len(s), 1, -MAX_LEN)]


def histories(d: Dataset, part: str, longest: int) -> list[list[int]]:
    """The last so many items before each target of part, valid or test. Windows hold 10; under leave-one-out, the
    user's training sequence (and for test, the validation target) holds them all."""
    short = getattr(d, part).histories()
    if longest <= HISTORY:
        return [h[-longest:] for h in short]
    users = zip(d.sequences, d.valid.target.tolist(), strict=True)  # in the same order
    full = [s + [v] if part == "test" else s for s, v in users]
    assert [f[-HISTORY:] for f in full] == short
    return [f[-longest:] for f in full]


@torch.no_grad()
def ranks(model: SASRec, asked: list[list[int]], target: np.ndarray, f: Flags) -> tuple[np.ndarray, np.ndarray]:
    """How many items score above each target, and how many as high: before, ties (N,)."""
    model.eval()
    before, ties, device = np.zeros(len(asked)), np.ones(len(asked)), model.item.weight.device
    for at in batches([len(h) for h in asked], f.tokens):
        x, last = pad([asked[i] for i in at]).to(device), torch.tensor([len(asked[i]) - 1 for i in at])
        score = model(x.clamp(min=0))[torch.arange(len(at)), last] @ model.item.weight.T
        if f.exclude_history:
            score.scatter_(1, torch.where(x < 0, x[:, :1], x), -math.inf)
        before[at], ties[at] = place(score.cpu().numpy(), target[at])
    return before, ties


# ---------------------------------------------------------------------------------------------------------------------
# Training


def fit(d: Dataset, f: Flags, hidden: int, dropout: float, seed: int, device="cpu") -> tuple[SASRec, dict]:
    """The epoch with the best NDCG@10 on validation. What is random depends on the seed alone."""
    torch.manual_seed(seed)
    model = SASRec(len(d.ids), hidden, dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=f.lr, fused=True)
    learnt, asked = pieces(d.sequences), histories(d, "valid", f.history)
    best, curve, start = {"valid NDCG@10": -1.0}, [], time.time()
    bar = tqdm(range(f.epochs), desc=f"SASRec {hidden}, {dropout}", unit="epoch", disable=not sys.stderr.isatty())
    for epoch in bar:
        model.train()
        rng, losses = np.random.default_rng((seed, epoch)), []
        order = rng.permutation(len(learnt))
        steps = batches([len(learnt[i]) - 1 for i in order], f.tokens)  # of like length
        for s in rng.permutation(len(steps)):
            loss = model.loss(pad([learnt[i] for i in order[steps[s]]]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise InputError(f"the loss became {loss} in epoch {epoch + 1}; a lower --lr may help")
        valid = metrics(*ranks(model, asked, d.valid.target, f))
        curve.append(valid["NDCG@10"])
        bar.set_postfix_str(f"loss {loss:.3f}, validation NDCG@10 {valid['NDCG@10']:.4f}")
        if valid["NDCG@10"] > best["valid NDCG@10"]:
            best = {"hidden": hidden, "dropout": dropout, "seed": seed, "epoch": epoch + 1, "loss": loss}
            best |= {f"valid {name}": v for name, v in valid.items()}
            weights = {name: w.clone() for name, w in model.state_dict().items()}
        elif epoch + 1 - best["epoch"] >= f.patience:
            break
    bar.close()
    model.load_state_dict(weights)
    best |= {"epochs": epoch + 1, "curve": curve, "seconds": time.time() - start}
    print(f"SASRec hidden {hidden:3}, dropout {dropout}, seed {seed}: validation NDCG@10 {best['valid NDCG@10']:.4f} "
          f"in epoch {best['epoch']} of {best['epochs']}, {best['seconds']:.0f} s", flush=True)  # fmt: skip
    return model, best


def main(argv: list[str]):
    f, start = parse_flags(Flags, argv, __doc__), time.time()
    choose("split", f.split, ("time", "loo"))
    for name in ("history", "lr", "tokens", "epochs", "patience", "seeds"):
        if getattr(f, name) <= 0:
            raise InputError(f"--{name} must be above 0, not {getattr(f, name)}")
    if f.history > (MAX_LEN if f.split == "loo" else HISTORY):
        raise InputError(f"--history {f.history}: at most {HISTORY}, or {MAX_LEN} under --split loo")
    if f.hidden % HEADS or f.hidden < 0 or f.dropout >= 1:
        raise InputError(f"--hidden must be a multiple of {HEADS}, --dropout below 1")
    d, device = data.load(f.data, f.data_dir, f.split, f.core), device_and_dtype("float32")[0]
    print(d.summary(), flush=True)
    if not d.sequences:
        raise InputError(f"{d.name}: no user has two training interactions, so there is nothing to learn from")

    grid = [(f.hidden or h, f.dropout if f.dropout >= 0 else p) for h, p in GRID]
    tried = [fit(d, f, h, p, 0, device) for h, p in dict.fromkeys(grid)]
    best = max(tried, key=lambda t: t[1]["valid NDCG@10"])
    chosen = [best] + [fit(d, f, best[1]["hidden"], best[1]["dropout"], seed, device) for seed in range(1, f.seeds)]

    asked = histories(d, "test", f.history)
    places = [popularity(d, d.test)] + [ranks(model, asked, d.test.target, f) for model, _ in chosen]
    popular, *each = [report(d, d.test, *p) for p in places]
    names = [name for name in popular if "@" in name]
    mean = {name: float(np.mean([r[name] for r in each])) for name in names}
    rows = {"popularity": popular, "SASRec": each[0]}
    if f.seeds > 1:
        rows = {"popularity": popular, f"SASRec, mean of {f.seeds} seeds": mean}
        rows["  standard deviation"] = {name: float(np.std([r[name] for r in each], ddof=1)) for name in names}
    rows |= {"  " + name: r for name, r in each[0]["slices"].items()}
    print(f"test split, {len(d.test):,} windows, ranked among all {len(d.ids):,} items; SASRec (hidden "
          f"{best[1]['hidden']}, dropout {best[1]['dropout']}) is asked with the last {f.history} items; "
          f"slices are of seed 0")  # fmt: skip
    print(table(rows))

    out = Path(f.out) / f"baselines-{d.name}-{f.split}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = [log | {"test": r} for (_, log), r in zip(chosen, each, strict=True)]
    write_json(out, {"flags": vars(f), "digest": d.digest(), "device": str(device), "popularity": popular,
                     "SASRec": mean, "runs": runs, "grid": [log for _, log in tried],
                     "seconds": time.time() - start})  # fmt: skip
    columns = {"user": d.test.user, "target": d.test.target, "before": places[1][0], "ties": places[1][1]}
    lines = np.stack(list(columns.values()), 1).astype(int).tolist()
    write_json(out.with_suffix(".jsonl"), [dict(zip(columns, line, strict=True)) for line in lines])
    print(f"{time.time() - start:.0f} s; {out}")


if __name__ == "__main__":
    run(main)
