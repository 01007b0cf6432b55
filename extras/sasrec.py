"""What any recommender has to beat: popularity, and SASRec trained with a softmax over items, on the same split.

    python -m extras.sasrec                                            # MovieLens-100K
    python -m extras.sasrec --data beauty --split loo --seeds 3        # leave one out; mean over three seeds
    python -m extras.sasrec --hidden 64 128 --dropout 0.5 0.2          # the best of a grid, by validation

SASRec (Kang and McAuley, 2018) with a sampled softmax instead of one negative per target: item and position embeddings,
a causal transformer, the item embeddings again as output. Every next item of the training interactions is a target.
Configuration and epoch are chosen by NDCG@10 on validation. All items are ranked.
Shapes: B sequences, T items, N targets.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from eval import NAMES, Parser, device_and_dtype, metrics, number, popularity, report, run_main, table
from hatllm import InputError
from model import write_json

MAX_LEN = 50  # items that SASRec looks back on in training, as published for the Amazon sets
LAYERS = 1
TOKENS = 1024  # positions in a step, padding included
EVERY = 5  # epochs from one validation to the next; on a CPU it takes as long as an epoch
PATIENCE = 4  # stop after so many validations without a better NDCG@10


class Block(nn.Module):
    """Self-attention of one head and MLP, each normalised after its residual, as published."""

    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.norm1, self.norm2, self.drop = nn.LayerNorm(hidden), nn.LayerNorm(hidden), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)  # (B, T, hidden) each
        p = self.drop.p if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
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

    def loss(self, x: Tensor, negatives: int = 0) -> Tensor:
        """x (B, T + 1) with -1 for padding: mean over the targets of -log p(next item), p a softmax over all items.
        negatives: estimate its denominator from so many random items, drawn for the whole step; 0: use all items."""
        target, n_items = x[:, 1:], len(self.item.weight)
        h, target = self(x[:, :-1].clamp(min=0))[target >= 0], target[target >= 0]  # (N, hidden), (N,)
        if not 0 < negatives < n_items:
            return F.cross_entropy(h @ self.item.weight.T, target)
        drawn = torch.randint(n_items, (negatives,), device=x.device)
        own = (h * self.item(target)).sum(1, keepdim=True)  # (N, 1)
        other = h @ self.item(drawn).T + math.log(n_items / negatives)  # each stands for so many items
        other = other.masked_fill(drawn == target[:, None], -math.inf)
        return F.cross_entropy(torch.cat((own, other), 1), torch.zeros_like(target))


def pieces(sequences: list[list[int]]) -> list[list[int]]:
    """Sequences cut into pieces of at most MAX_LEN inputs and a target each, counted from the end: the last item of
    one piece begins the next, so that every item but the very first is a target once."""
    return [s[max(0, end - MAX_LEN - 1) : end] for s in sequences for end in range(len(s), 1, -MAX_LEN)]


def histories(d: data.Dataset, part: str, longest: int) -> list[list[int]]:
    """The last so many items before each target of part, valid or test. Windows hold HISTORY; under leave-one-out the
    user's training sequence holds them all, and for test the validation target is one more."""
    if longest <= data.HISTORY:
        return [w.history[-longest:] for w in getattr(d, part)]
    both = zip(d.sequences, d.valid, strict=True)  # the same users in the same order
    return [(s + [w.target] * (part == "test"))[-longest:] for s, w in both]


@torch.no_grad()
def ranks(model: SASRec, d: data.Dataset, part: str, args) -> tuple[np.ndarray, np.ndarray]:
    """How many items score above each target of part, and how many as high, itself among them: before, ties (N,)."""
    model.eval()
    asked, windows, device = histories(d, part, args.history), getattr(d, part), model.item.weight.device
    before, ties = np.zeros(len(asked)), np.ones(len(asked))
    for at in data.batches([len(h) for h in asked], TOKENS):
        x, last = data.pad([asked[i] for i in at], -1).to(device), torch.tensor([len(asked[i]) - 1 for i in at])
        score = model(x.clamp(min=0))[torch.arange(len(at)), last] @ model.item.weight.T  # (B, items)
        if args.exclude_history:
            score.scatter_(1, torch.where(x < 0, x[:, :1], x), -math.inf)
        own = score.gather(1, torch.tensor([[windows[i].target] for i in at], device=device))
        before[at], ties[at] = (score > own).sum(1).cpu(), (score == own).sum(1).cpu()
    return before, ties


def train_epoch(model: SASRec, optimizer, learnt: list[list[int]], rng: np.random.Generator, negatives: int) -> float:
    """One pass -> the mean of its steps' losses. A step has sequences of like length."""
    model.train()
    order, losses = rng.permutation(len(learnt)), []
    steps = data.batches([len(learnt[i]) - 1 for i in order], TOKENS)
    for s in tqdm(rng.permutation(len(steps)), "epoch", leave=False, disable=None):
        x = data.pad([learnt[i] for i in order[steps[s]]], -1).to(model.item.weight.device)
        loss = model.loss(x, negatives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def fit(d: data.Dataset, args, hidden: int, dropout: float, seed: int, device="cpu") -> tuple[SASRec, dict]:
    """The epoch with the best NDCG@10 on validation. What is random depends on the seed alone."""
    torch.manual_seed(seed)
    model = SASRec(len(d.ids), hidden, dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    learnt, best, curve = pieces(d.sequences), {"valid NDCG@10": -1.0}, []
    for epoch in tqdm(range(args.epochs), f"SASRec {hidden}, {dropout}", disable=None):
        loss = train_epoch(model, optimizer, learnt, np.random.default_rng((seed, epoch)), args.negatives)
        if not math.isfinite(loss):
            raise InputError(f"the loss became {loss} in epoch {epoch + 1}; a lower --lr may help")
        if (epoch + 1) % EVERY and epoch + 1 < args.epochs:
            continue
        valid = metrics(*ranks(model, d, "valid", args))
        curve.append(valid["NDCG@10"])
        if curve[-1] > best["valid NDCG@10"]:
            best = {"hidden": hidden, "dropout": dropout, "seed": seed, "epoch": epoch + 1, "loss": loss}
            best |= {f"valid {name}": v for name, v in valid.items()}
            weights = {name: w.clone() for name, w in model.state_dict().items()}
        elif len(curve) - curve.index(max(curve)) > PATIENCE:
            break
    model.load_state_dict(weights)
    best |= {"epochs": epoch + 1, "curve": curve}
    print(f"SASRec {hidden}, {dropout}, seed {seed}: validation NDCG@10 {max(curve):.4f} in epoch {best['epoch']}")
    return model, best


def make_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__)
    add, whole = p.add_argument, number(int, 1)
    add("--data", default="ml-100k", help="ml-100k, beauty, office, books, or a folder (default: %(default)s)")
    add("--split", default="time", choices=("time", "loo"), help="8:1:1 by the target's time, or leave one out")
    add("--core", type=number(int, 0), default=5, help="as in train.py (default: %(default)s)")
    usual = min(data.HISTORY, MAX_LEN)
    add("--history", type=number(int, 1, MAX_LEN), default=usual, help="items it is asked with; loo: up to 50")
    add("--exclude_history", action="store_true", help="never recommend what the history holds")
    add("--hidden", type=number(int, 1), nargs="+", default=[64], help="widths that are tried (default: 64)")
    add("--dropout", type=number(float, 0, 0.99), nargs="+", default=[0.5], help="tried (default: 0.5)")
    add("--negatives", type=number(int, 0), default=256, help="random items in a step's softmax; 0: all items (256)")
    add("--lr", type=number(float, 1e-9, 1), default=1e-3, help="of Adam (default: %(default)s)")
    add("--epochs", type=whole, default=100, help="at most (default: %(default)s)")
    add("--seeds", type=whole, default=1, help="train what the grid chose with seeds 0 .. so many - 1; 0 is the grid's")
    add("--out", default="out", help="folder of baselines-DATA-SPLIT.json (default: %(default)s)")
    return p


def main(argv: list[str]):
    args = make_parser().parse_args(argv)
    if args.history > data.HISTORY and args.split != "loo":
        raise InputError(f"--history {args.history}: at most {data.HISTORY}, or {MAX_LEN} under --split loo")
    d, device = data.load(args.data, args.split, args.core), device_and_dtype("float32", True)[0]
    print(d.summary())
    protocol = [f"core{args.core}"] * (args.core != 5) + [f"history{args.history}"] * (args.history != data.HISTORY)
    protocol += [f"ties_{data.TIES}"] * (data.TIES != "file")
    name = "-".join(["baselines", d.folder.name, args.split, *protocol, *["exclude_history"] * args.exclude_history])
    out = Path(args.out) / f"{name}.json"
    if out.exists():
        raise InputError(f"{out} exists; move it away or choose another --out")
    tried = [fit(d, args, hidden, dropout, 0, device) for hidden in args.hidden for dropout in args.dropout]
    best = max(tried, key=lambda t: t[1]["valid NDCG@10"])
    chosen = [best] + [fit(d, args, best[1]["hidden"], best[1]["dropout"], s, device) for s in range(1, args.seeds)]
    popular = report(d, d.test, *popularity(d, d.test))
    each = [report(d, d.test, *ranks(model, d, "test", args)) for model, _ in chosen]
    mean = {name: float(np.mean([r[name] for r in each])) for name in NAMES}
    rows = {"popularity": popular, f"SASRec, mean over {args.seeds} seeds" if args.seeds > 1 else "SASRec": mean}
    print(f"{len(d.test):,} test windows, {len(d.ids):,} items, asked with the last {args.history}\n{table(rows)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = [log | {"test": r} for (_, log), r in zip(chosen, each, strict=True)]
    saved = {"flags": vars(args), "digest": d.digest, "popularity": popular, "SASRec": mean, "runs": runs}
    write_json(out, saved | {"grid": [log for _, log in tried]})
    print(f"written to {out}")


if __name__ == "__main__":
    run_main(main)
