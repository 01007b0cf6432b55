"""Which plan is best, by how much, and where a model looks: many runs of train.py, a table, figures.

python ablate.py run --data books,office --seeds 0,1,2 --max_steps 800   # every plan; ends with the table
python ablate.py run --data beauty --model smollm2-135m --limit 10000 --plans "OR;IN:1/4 OR CR:1/4"
python ablate.py table --out out/ablate --metrics HR@10,NDCG@10          # the table again, into out/ablate/table.md
python ablate.py table --out out/ablate --seen 0                         # of targets that are not in training alone
python ablate.py attention --out out/ablate/books-OR-s0 --plot looks.png # attention within items and across
python ablate.py curves --out out/ablate --plot curves.png               # loss and validation of all the runs

`run` hands every flag that is not its own to train.py. It may be stopped at any time: the same command skips what is
finished and resumes the rest. Several GPUs: start it once on each, with other --seeds or --data and the same --out.
`COMMAND --help` explains the flags. Shapes as in model.py, plus N test windows.
"""

import gc
import json
import os
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
import data
import eval as evaluation
import hatllm
import model as llama
import train
from common import choose, parse_flags, write_json
from eval import KS, gains, metrics, positions
from hatllm import PLAN, InputError, layout, parse_plan

PLANS = (  # the most valuable first: what is finished when time runs out should answer something
    "OR",  # the plain LLM
    PLAN,
    "IN:1/4 OR",  # each half of the method alone
    "OR CR:1/4",
    "CR:1/4 OR IN:1/4",  # swapped: is it the masks, or where they are?
    "IN-closed:1/4 OR CR:1/4",
    "IN:1/6 OR CR:1/6",  # fewer and more masked layers
    "IN:1/3 OR CR:1/3",
    "IN-closed:1/4 OR",
)
RESAMPLES = 2000  # of the bootstrap
NAMES = tuple(f"{m}@{k}" for m in ("HR", "NDCG") for k in KS)
VALID = ("valid NDCG@10", "valid nll")
COLUMNS = (*NAMES, "nll", *VALID)
PAIRED = ("NDCG@10", "nll")  # compared with the plain LLM's window by window
GROUPS = ("header", "title", "history")  # queries: the token before the title, the title's, the history items'
PARTS = ("within", "across", "context", "first")  # keys: the same item, other items, context, the text's first token
COLOURS = np.array(((0.13, 0.35, 0.6), (0.95, 0.6, 0.2), (0.8, 0.8, 0.8), (0.5, 0.5, 0.5)))  # of PARTS


# ---------------------------------------------------------------------------------------------------------------------
# run: seeds x data sets x plans


@dataclass
class Run:
    data: str = "ml-100k"  # data sets, separated by commas
    plans: str = ";".join(PLANS)  # plans, separated by semicolons, the most valuable first
    seeds: str = "0"  # seeds, separated by commas
    out: str = "out/ablate"  # folder of the runs, table.md and table.json. The other flags are those of train.py


def slug(plan: str) -> str:
    """A plan as a part of a file name; another plan has another one."""
    return "_".join(plan.split()).replace(":", "").replace("/", "of")


def share_out(argv: list[str]) -> tuple[list[str], list[str]]:
    """argv -> what is ours, what is train.py's. Each flag takes along the values that follow it."""
    ours, theirs = [], []
    to = ours
    for word in argv:
        flag, name = word.startswith("--") or word == "-h", word.lstrip("-").partition("=")[0]
        if flag and name in ("plan", "seed", "resume", "overwrite"):
            raise InputError(
                f"--{name} is chosen for every run by ablate.py; its own flags are --plans, --seeds, --out"
            )
        if flag:
            to = ours if name in (*Run.__dataclass_fields__, "h", "help") else theirs
        to.append(word)
    return ours, theirs


def distinct(plans: list[str], f: train.Flags) -> list[str]:
    """The plans, less those that at this model's depth round to an earlier one. Raises if one does not fit."""
    places = [Path(f.model), Path(os.environ.get("HATLLM_WEIGHTS", "weights")) / f.model]
    configs = [p / "config.json" for p in places if (p / "config.json").exists()]
    if f.model != "tiny" and not configs:  # not fetched yet
        return list(dict.fromkeys(plans))
    depth = train.TINY["num_hidden_layers"] if f.model == "tiny" else llama.Config.read(configs[0]).num_hidden_layers
    first = {}
    for plan in plans:
        same = first.setdefault(tuple(parse_plan(plan, depth)), plan)
        if same != plan:
            print(f"plan '{plan}' is left out: with {depth} layers it is '{same}'")
    return list(first.values())


def once(place: Path, argv: list[str]):
    """A run of train.py in place, from where it stands. Raises InputError if a run with other flags is there."""
    argv = [*argv, "--resume", "--out", str(place)]
    f = parse_flags(train.Flags, argv, train.__doc__)
    if (place / "results-test.json").exists():
        train.prepare_out(f, place, vars(train.resolve(f)))
        return print("finished already", flush=True)
    gc.collect()  # what a failed run left behind
    if f.compile:
        torch.compiler.reset()  # else this run's blocks count as recompilations of the last one's
    train.main(argv)


def run(argv: list[str]):
    ours, theirs = share_out(argv)
    f = parse_flags(Run, ours, __doc__)
    flags = parse_flags(train.Flags, theirs, train.__doc__)  # a mistyped flag ends it here, not in every run
    plans = distinct([" ".join(p.split()) for p in f.plans.split(";") if p.strip()], flags)
    names, seeds = ([x.strip() for x in text.split(",") if x.strip()] for text in (f.data, f.seeds))
    if not (plans and names and seeds and all(s.isdigit() for s in seeds)):
        raise InputError("--plans, --data and --seeds each need a value; seeds are whole numbers: --seeds 0,1,2")
    todo, failed = [(seed, name, plan) for seed in seeds for name in names for plan in plans], []
    for i, (seed, name, plan) in enumerate(todo, 1):
        place = Path(f.out) / f"{Path(name).name}-{slug(plan)}-s{seed}"
        print(f"\n[{i}/{len(todo)}] {place}", flush=True)
        try:
            once(place, [*theirs, "--data", name, "--plan", plan, "--seed", seed])
        except Exception as e:
            if str(e).startswith("stopped after"):  # train.py was asked to stop, and so are we
                raise InputError(f"{place.name}: stopped, nothing is lost; the same command goes on") from None
            if not isinstance(e, InputError):
                traceback.print_exc()
            failed.append(f"\n  {place.name}: {e or type(e).__name__}")
            print(f"failed: {e}", flush=True)
    if any(Path(f.out).glob("*/results-test.json")):
        table(["--out", f.out])
    if failed:
        raise InputError(f"{len(failed)} of {len(todo)} runs failed, the others are done:{''.join(failed)}")


# ---------------------------------------------------------------------------------------------------------------------
# table: the plans against the plain LLM


@dataclass
class Table:
    out: str = "out/ablate"  # folder of the runs; baselines-*.json are looked for in it and beside it
    metrics: str = ",".join(COLUMNS)  # columns, separated by commas
    seen: str = ""  # only the test windows whose target occurs so often in training: 0, 1-4, 1+; empty: all


def read(path: Path):
    """A JSON file, or one of JSON lines as a list."""
    try:
        text = path.read_text()
        return json.loads(text if path.suffix == ".json" else f"[{','.join(text.splitlines())}]")
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None


def setting(c: dict, used: dict) -> str:
    """Data set, model, and the flags of train.py and eval.py that are not the default: what one table has in common."""
    free = "data data_dir model plan seed out tokens test_limit resume overwrite checkpointing".split()
    usual = vars(train.resolve(train.Flags(model=c["model"])))
    flags = {k: c[k] for k, v in usual.items() if k not in free and c.get(k, v) != v}
    for k in ("k", "beam", "exact", "score", "exclude_history", "limit"):
        if used[k] != evaluation.Flags.__dataclass_fields__[k].default:
            flags["test_limit" if k == "limit" else k] = used[k]
    return " ".join([f"{Path(c['data']).name}, {Path(c['model']).name}", *(f"--{k} {v}" for k, v in flags.items())])


def so_often(seen: str, n: np.ndarray) -> np.ndarray:
    """Which of the counts n are in the range that seen spells: '0', '1-4', '1+'."""
    found = re.fullmatch(r"(\d+)(\+|-(\d+))?", seen)
    if not found:
        raise InputError(f"--seen {seen}: give a number, a range or a least number, like 0, 1-4 or 1+")
    low, high = int(found[1]), np.inf if found[2] == "+" else int(found[3] or found[1])
    return (n >= low) & (n <= high)


def read_run(place: Path, seen: str, loaded: dict) -> dict:
    """What the table needs of a run, of the windows whose target occurs `seen` in training; '': of all. loaded: the
    data sets by digest, each read once for all of its runs."""
    c, result = read(place / "config.json"), read(place / "results-test.json")
    predictions = read(place / "predictions-test.jsonl")
    if seen:
        if c["digest"] not in loaded:
            loaded[c["digest"]] = evaluation.load_data(place, c)
        d = loaded[c["digest"]]
        keep = np.flatnonzero(so_often(seen, d.counts[[p["target"] for p in predictions]]))
        if not len(keep):
            raise InputError(f"--seen {seen}: {place} has no test window with such a target")
        predictions = [predictions[i] for i in keep]
        result["popularity"] = metrics(*evaluation.popularity(d, d.test[keep]))
    at = positions(predictions)
    own = {k: c[k] for k in ("plan", "seed", "digest")} | {"data": Path(c["data"]).name, "place": place}
    own |= {"setting": setting(c, result["flags"]), "popularity": result["popularity"]}
    own["windows"] = np.array([(p["user"], p["target"]) for p in predictions])
    if not all("nll" in p for p in predictions):
        again = f"python eval.py --out {place} --dtype {c['dtype']}"  # as train.py tested it
        raise InputError(f"{place} was tested by an older version, without nll; `{again}` mends it")
    own |= {"NDCG@10": gains(*at, 10), "nll": np.array([p["nll"] for p in predictions])}
    best = max(read(place / "metrics.jsonl"), key=train.merit)
    return own | {"metrics": metrics(*at) | {"nll": own["nll"].mean()} | {x: best[x.replace(" ", "_")] for x in VALID}}


def over_seeds(runs: list[dict]) -> dict:
    """name -> mean, std over runs; std is that of a sample, None for one run."""
    values = {name: np.array([r[name] for r in runs]) for name in runs[0]}
    return {k: {"mean": v.mean(), "std": v.std(ddof=1) if len(v) > 1 else None} for k, v in values.items()}


def interval(difference: np.ndarray, user: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """95% bootstrap interval of the mean of difference (N,). Users are drawn, each with all of their windows, because
    the windows of a user are not independent."""
    _, at = np.unique(user, return_inverse=True)
    total, n = np.bincount(at, difference), np.bincount(at)
    rng, means = np.random.default_rng(seed), []
    chunk = max(1, 4_000_000 // len(n))  # 32 MB at a time
    for a in range(0, resamples, chunk):
        draw = rng.integers(0, len(n), (min(chunk, resamples - a), len(n)))
        means.append(total[draw].sum(1) / n[draw].sum(1))
    return np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()


def against(runs: list[dict], plain: list[dict], name: str) -> dict | None:
    """A metric of a plan's runs less that of the plain LLM's, window by window, mean over the seeds that both have."""
    pairs = [(a, b) for a in runs for b in plain if a["seed"] == b["seed"] and a is not b]
    for a, b in pairs:
        if not np.array_equal(a["windows"], b["windows"]):
            raise InputError(f"{a['place']} and {b['place']} were tested on different windows; evaluate one again")
    if not pairs:
        return None
    difference = np.mean([a[name] - b[name] for a, b in pairs], 0)
    low, high = interval(difference, pairs[0][0]["windows"][:, 0])
    return {"mean": difference.mean(), "low": low, "high": high, "seeds": [a["seed"] for a, _ in pairs]}


def rows_of(runs: list[dict], folders: tuple) -> list[dict]:
    """The lines of a table: baselines, the plain LLM, the other plans in the order of PLANS."""
    rows = [{"name": "popularity", "seeds": [], "metrics": over_seeds([runs[0]["popularity"]])}]
    for path in sorted(p for folder in folders for p in folder.glob(f"baselines-{runs[0]['data']}-*.json")):
        b = read(path)
        if b.get("digest") == runs[0]["digest"]:  # the same catalogue and split
            n, each = b["popularity"]["n"], [{k: r["test"][k] for k in NAMES} for r in b["runs"]]
            name = "SASRec" + (f" (on {n:,} windows)" if n != len(runs[0]["windows"]) else "")
            rows.append({"name": name, "seeds": [*range(len(each))], "metrics": over_seeds(each)})
    plain = next((r["plan"] for r in runs if {x.partition(":")[0] for x in r["plan"].split()} == {"OR"}), None)
    order = [plain, *PLANS, *sorted(r["plan"] for r in runs)]
    for plan in sorted({r["plan"] for r in runs}, key=order.index):
        own = sorted((r for r in runs if r["plan"] == plan), key=lambda r: r["seed"])
        row = {"name": plan, "seeds": [r["seed"] for r in own], "metrics": over_seeds([r["metrics"] for r in own])}
        baseline = [r for r in runs if r["plan"] == plain]
        rows.append(row | {"difference": {name: against(own, baseline, name) for name in PAIRED}})
    return rows


def markdown(title: str, n: int, rows: list[dict], names: list[str], seen: str = "") -> str:
    of = f", of targets that occur {seen} times in training" if seen else ""
    head = ["plan", "seeds", *names, *(f"{name} - all-OR" for name in PAIRED)]
    lines = [f"## {title}\n\n{n:,} test windows{of}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        values = [r["metrics"].get(name) for name in names]
        cells = [r["name"], ", ".join(map(str, r["seeds"]))]
        cells += [
            f"{v['mean']:.4f}" + (f" ± {v['std']:.4f}" if v["std"] is not None else "") if v else "" for v in values
        ]
        differences = [r.get("difference", {}).get(name) for name in PAIRED]
        cells += [f"{x['mean']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]" if x else "" for x in differences]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(argv: list[str]):
    f = parse_flags(Table, argv, __doc__)
    out, names = Path(f.out), [choose("metrics", x.strip(), COLUMNS) for x in f.metrics.split(",")]
    done = sorted(p.parent for p in out.glob("*/results-test.json"))
    if not done:
        raise InputError(f"--out {out}: no finished run is there; `ablate.py run` makes them")
    tables, loaded = {}, {}
    for place in done:
        r = read_run(place, f.seen, loaded)
        tables.setdefault((r["setting"], r["digest"]), []).append(r)
    made = [(key[0], len(own[0]["windows"]), rows_of(own, (out, out.parent))) for key, own in sorted(tables.items())]
    parts = [markdown(*m, names, f.seen) for m in made] + [
        "mean ± standard deviation over seeds; nll: -log p of the target, in nats; valid: at the best validation;\n"
        f"- all-OR: by window, mean over seeds, 95% interval over users ({RESAMPLES:,} bootstrap resamples), which\n"
        "says nothing about what other seeds would change"
    ]
    if waiting := sorted(p.parent.name for p in out.glob("*/config.json") if p.parent not in done):
        parts.append(f"not finished: {', '.join(waiting)}")
    text = "\n\n".join(parts) + "\n"
    (out / "table.md").write_text(text)
    write_json(out / "table.json", {"tables": [dict(zip(("setting", "n", "rows"), m, strict=True)) for m in made]})
    print(f"\n{text}\n{out}/table.md, {out}/table.json")


# ---------------------------------------------------------------------------------------------------------------------
# attention: where the model looks, layer by layer


@dataclass
class Attention:
    out: str = ""  # folder of a run of train.py
    users: int = 64  # test windows, drawn by a fixed seed
    base: bool = False  # also the base before training, under plan OR and under the run's plan
    plot: str = ""  # draw the masks and the shares by layer into this file (png, pdf, svg)
    tokens: int = 4096  # tokens in a forward, padding included: less needs less memory
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 where it is faster; tiny: on a GPU only


def parts_of(item: Tensor) -> Tensor:
    """item (B, T) -> (PARTS, B, T, T) bool: what a key is to a query."""
    q, k, first = item[:, :, None], item[:, None, :], torch.arange(item.shape[1], device=item.device) == 0
    within = (q > 0) & (q == k)
    kinds = within, (k > 0) & ~within, (k == 0) & ~first, first
    return torch.stack([kind.expand_as(within) for kind in kinds])


def looks(block: llama.Block, x: Tensor, rope, mask: Tensor) -> Tensor:
    """x (B, T, d) before a block -> (B, T, T) how its queries spread their attention over the keys, mean over heads."""
    q, k = (y.float() for y in block.self_attn.qk(block.input_layernorm(x), rope))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    z = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~mask, -torch.inf)
    return z.softmax(-1).mean(1)


@torch.inference_mode()
def shares(model: llama.Llama, coded: list[dict], budget: int = 4096) -> Tensor:
    """Texts of one target each, as data.encode makes them -> (layers, GROUPS, PARTS), mean over heads and all queries
    of a group. To the header every item is another one, so it has nothing `within`; a token is within its own item."""
    device = model.head.device
    total = torch.zeros(len(model.layers), len(GROUPS), len(PARTS), dtype=torch.float64, device=device)
    n = torch.zeros(len(GROUPS), 1, dtype=torch.float64, device=device)
    for b in train.micro_batches(coded, budget):
        b = b.to(device)
        item, lay, parts = b.item, layout(b.item), parts_of(b.item)
        predicts = torch.zeros_like(item).view(-1).index_fill(0, b.rows, 1).view_as(item)
        title = item == item.amax(1, keepdim=True)
        groups = torch.stack((predicts * (item == 0), title, (item > 0) & ~title)).double()  # (GROUPS, B, T)
        n += groups.sum((1, 2))[:, None]
        x, rope = model.embed_tokens(b.tokens), model.rope(lay.pos)
        for layer, block in enumerate(model.layers):
            a = looks(block, x, rope, lay.mask(block.kind))
            total[layer] += torch.einsum("gbt,pbt->gp", groups, torch.stack([(a * p).sum(-1) for p in parts]).double())
            x = block(x, rope, lay, None)
    return (total / n).cpu()


def draw_shares(name: str, plan: list[str], share: Tensor) -> str:
    lines = [name, f"{'layer':<16}" + "   ".join(f"{g:<36}" for g in GROUPS)]
    lines += [" " * 12 + "   ".join("".join(f"{p:>9}" for p in PARTS) for _ in GROUPS)]
    for i, (kind, row) in enumerate(zip(plan, share.tolist(), strict=True), 1):
        lines.append(f"{i:>2} {kind:<9}" + "   ".join("".join(f"{v:9.3f}" for v in g) for g in row))
    ratio = [f"{g} {share[:, i, 1].sum() / share[:, i, 0].sum():.2f}" for i, g in enumerate(GROUPS) if i]
    return "\n".join([x.rstrip() for x in lines] + ["across / within, over all layers: " + ", ".join(ratio)])


def attention(argv: list[str]):
    f = parse_flags(Attention, argv, __doc__)
    if f.users <= 0 or f.tokens <= 0:
        raise InputError("--users and --tokens must be above 0")
    if f.plot:
        figure(1, 1)  # a missing package shows before the work, not after it
    model, cat, d, c = evaluation.load_run(Path(f.out), f.dtype)
    device, dtype = model.head.device, model.head.dtype
    if f.base and not c["base"]:
        raise InputError(f"--base: {f.out} was trained from scratch, there is no base to compare with")
    some = d.test[np.sort(np.random.default_rng(0).permutation(len(d.test))[: f.users])]
    coded = [data.encode(cat, e, False) for e in data.window_examples(some)]
    found = [(f"trained, plan {c['plan']}", model.plan, shares(model, coded, f.tokens))]
    for plan in dict.fromkeys(("OR", c["plan"])) if f.base else ():
        model = llama.load(Path(c["base"]), plan, dtype).to(device).eval()
        found.append((f"base, plan {plan}", model.plan, shares(model, coded, f.tokens)))
    print(f"share of attention, mean over heads and queries, {len(some)} test windows of {d.name}")
    for row in found:
        print("\n" + draw_shares(*row))
    saved = [{"model": name, "layers": plan, "share": s.tolist()} for name, plan, s in found]
    write_json(Path(f.out) / "attention.json", {"groups": GROUPS, "parts": PARTS, "n": len(some), "models": saved})
    if f.plot:
        plot_attention(Path(f.plot), found)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@dataclass
class Curves:
    out: str = "out/ablate"  # runs of train.py, or folders of such runs, separated by commas
    plot: str = "curves.png"  # file to draw into (png, pdf, svg)


def figure(rows: int, columns: int):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    fig = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def save(fig, path: Path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=150)
    except (OSError, ValueError) as e:  # ValueError: a format that matplotlib does not know
        raise InputError(f"--plot {path}: cannot be written ({e})") from None
    print(path)


def plot_attention(path: Path, found: list[tuple[str, list[str], Tensor]]):
    """The masks of hatllm.py's example on top, then for every model a row of shares by layer."""
    fig, axes = figure(1 + len(found), len(GROUPS))
    kinds, words, item, _ = hatllm.draw.__defaults__
    item, at = torch.tensor([item]), range(len(words))
    for ax, kind in zip(axes[0], kinds, strict=True):
        seen = parts_of(item)[:, 0] & layout(item).mask(kind)[0]  # (PARTS, T, T)
        ax.imshow(np.einsum("pqk,pc->qkc", seen, COLOURS) + ~seen.any(0).numpy()[:, :, None])  # hidden: white
        ax.set(title=kind, xticks=at, yticks=at, yticklabels=words)
        ax.set_xticklabels(words, rotation=90)
    for row, (name, plan, share) in zip(axes[1:], found, strict=True):
        for ax, group, values in zip(row, GROUPS, share.unbind(1), strict=True):
            base = 0 * values[:, 0]
            for part, colour, v in zip(PARTS, COLOURS, values.unbind(1), strict=True):  # bars, as layers are discrete
                ax.bar(range(1, len(plan) + 1), v, 1, base, color=colour, label=part)
                base = base + v
            for i in (i for i in range(1, len(plan)) if plan[i] != plan[i - 1]):
                ax.axvline(i + 0.5, color="black", linewidth=0.8, linestyle=":")  # layers of another kind begin
            ax.set(xlabel="layer", ylim=(0, 1), xlim=(0.5, len(plan) + 0.5))
            ax.set_title(f"{name}: {group}", fontsize=8)
    axes[1, 0].set_ylabel("share of attention")
    axes[1, 0].legend(fontsize=7, loc="lower left")
    save(fig, path)


def curves(argv: list[str]):
    f = parse_flags(Curves, argv, __doc__)
    folders = [Path(p.strip()) for p in f.out.split(",") if p.strip()]
    files = [x for p in folders for x in (*p.glob("metrics.jsonl"), *sorted(p.glob("*/metrics.jsonl")))]
    if not files:
        raise InputError(f"--out {f.out}: no metrics.jsonl is there; train.py writes one at each validation")
    fig, (axes,) = figure(1, 3)
    for path in files:
        log = read(path)
        for ax, name in zip(axes, ("loss", "valid_nll", "valid_NDCG@10"), strict=True):
            ax.plot([m["step"] for m in log], [m[name] for m in log], ".-", label=path.parent.name, linewidth=1)
    axes[0].set(title="training loss, nats per token", xlabel="step")
    axes[1].set(title="validation, nats per item", xlabel="step")
    axes[2].set(title="validation, NDCG@10", xlabel="step")
    axes[2].legend(fontsize=6)
    save(fig, Path(f.plot))


COMMANDS = {"run": run, "table": table, "attention": attention, "curves": curves}


def main(argv: list[str]):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in COMMANDS:
        raise InputError(f"'{argv[0]}' is none of the commands {', '.join(COMMANDS)}")
    else:
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    common.run(main)
