"""Which plan is best, by how much, and where a model looks: many runs of train.py, a table, figures.

    python -m extras.ablate run --data books,office --seeds 0,1,2 --max_steps 800   # every plan; ends with the table
    python -m extras.ablate run --data beauty --model smollm2-135m --plans "OR;IN:1/4 OR CR:1/4"
    python -m extras.ablate table --out out/ablate --seen 0 0    # again, of targets that never occur in training alone
    python -m extras.ablate keep out/ablate/books-* --note "commit 1a2b3c4, an A100, 2026-12-01"    # into docs/runs
    python -m extras.ablate table --out docs/runs    # the same table from what is kept; runs and data may be gone
    python -m extras.ablate attention --out out/ablate/books-OR-s0 --plot looks.png
    python -m extras.ablate attention --out out/shop --recommend "title a" "title b"    # what a recommendation looks at
    python -m extras.ablate curves --out out/ablate --plot curves.png

`run` hands every flag that is not its own to train.py. The same command again skips what is finished and resumes the
rest. Several GPUs: start it on each, with other --seeds or --data and the same --out. N: test windows.
"""

import argparse
import base64
import bz2
import gc
import hashlib
import itertools
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import eval
import train
from eval import Parser, load_run, metrics, number
from hatllm import PLAN, TARGET, InputError, layout, mask, split_plan
from model import Llama, load, read_json, rope, write_json

PLANS = (  # the most valuable first: what is finished when time runs out should answer something
    "OR",  # the plain LLM
    PLAN,
    "IN:1/4 OR",  # each half of the method alone
    "OR CR:1/4",
    "CR:1/4 OR IN:1/4",  # swapped: is it the masks, or where they are?
    "IN-closed:1/2 OR CR-last:1/4",  # computes less
)
COLUMNS = (*eval.NAMES, "nll", "valid_NDCG@10", "valid_nll")  # of the table
LEARNT = ("loss", "valid_nll", "valid_NDCG@10")  # what `curves` shows of metrics.jsonl
PAIRED = ("NDCG@10", "nll")  # compared with the plain LLM's window by window
NOTE = """mean ± standard deviation over seeds; nll: nats per item, -log p of the target's title; valid: at the best
validation, of all targets; less OR: by window, over the seeds that both have, and in brackets a 95% bootstrap interval
over users, which says nothing about other seeds: a small one beside a large deviation over seeds proves nothing"""
LOOKS = """Whose attention: header, the token before the title; title, its tokens; history, the items' tokens. What it
goes to: within, the same item (a token is within its own); across, other items (to the header all are); context, the
instruction and separators; first, the text's first token."""
GROUPS = ("header", "title", "history")  # of queries
PARTS = ("within", "across", "context", "first")  # of keys


# --- run: seeds x data sets x plans -----------------------------------------------------------------------------------


def tested(place: Path, c: dict, name: str) -> Path:
    """results.json or predictions.jsonl of the test of the run in place, whose flags are c."""
    return place / name.replace(".", f"-test-limit{c['eval_limit']}." if c["eval_limit"] else "-test.")


def finished(place: Path) -> bool:
    """Whether train.py came to its last step in place and tested it."""
    if not (place / "metrics.jsonl").exists() or not (place / "config.json").exists():
        return False
    c, log = read_json(place / "config.json", {"steps": int, "eval_limit": int}), read_lines(place / "metrics.jsonl")
    return log[-1]["step"] == c["steps"] and tested(place, c, "results.json").exists()


def once(place: Path, argv: list[str]) -> bool:
    """A run of train.py in place, from where it stands -> False if it was asked to stop."""
    gc.collect()  # an optimizer refers to itself, so that the last run holds its memory until now
    torch.cuda.empty_cache()  # train.py looks at what is free
    argv = [*argv, "--out", str(place), *(["--resume"] if (place / "config.json").exists() else [])]
    args = train.resolve(train.make_parser().parse_args(argv))
    if finished(place):
        train.check_same(read_json(place / "config.json"), train.Run(args))
        print("finished already", flush=True)
        return True
    if args.compile:
        torch.compiler.reset()  # else this run's blocks count as recompilations of the last one's
    return train.train_and_test(args)


def run_all(args, theirs: list[str]) -> bool:
    """theirs: flags of train.py -> False if a run was asked to stop. Raises InputError if one failed."""
    plans = [plan for plan in args.plans.split(";") if plan.strip()]
    seeds = [seed.strip() for seed in args.seeds.split(",")]
    for seed in seeds:  # a mistyped flag ends it here, not in every run
        train.make_parser().parse_args([*theirs, "--seed", seed])
    for plan in plans:
        split_plan(plan)
    if own := {"--resume", "--plan", "--seed"} & {word.partition("=")[0] for word in theirs}:
        raise InputError(f"{min(own)} is chosen for every run by --plans, --seeds and what is there already")
    failed, todo = [], list(itertools.product(seeds, map(str.strip, args.data.split(",")), plans))
    for i, (seed, name, plan) in enumerate(todo, 1):
        place = Path(args.out) / f"{Path(name).name}-{train.slug(plan)}-s{seed}"
        print(f"\n[{i}/{len(todo)}] {place}", flush=True)
        try:
            if not once(place, [*theirs, "--data", name, "--plan", plan, "--seed", seed]):
                print("the runs after it do not begin; the same command of extras.ablate goes on")
                return False
        except Exception as e:
            if not isinstance(e, InputError):
                traceback.print_exc()
            failed.append(f"\n  {place.name}: {e or type(e).__name__}")
            print(f"failed: {e}", flush=True)
    if len(failed) < len(todo):
        make_table(argparse.Namespace(out=args.out, seen=None))
    if failed:
        raise InputError(f"{len(failed)} of {len(todo)} runs failed:{''.join(failed)}")
    return True


# --- keep, table: the plans against the plain LLM, and what outlasts the machine --------------------------------------


def read_lines(path: Path) -> list[dict]:
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    needed = ("step", *LEARNT) if path.name == "metrics.jsonl" else ("user", "target", "nll", "seen", "popularity")
    if not lines or any(set(needed) - line.keys() for line in lines):
        raise InputError(f"{path}: empty or old, eval.py writes predictions anew; each line has {', '.join(needed)}")
    return lines


def record(place: Path, note: str = "") -> tuple[dict, dict]:
    """-> all that the table needs of the finished run in place, and what runs on the same data share. The first
    takes 10 to 30 KB, without ids, titles and folders of the machine. A column has a value for every test window."""
    c = read_json(place / "config.json", {"constants": dict})
    predictions = read_lines(tested(place, c, "predictions.jsonl"))
    windows, (before, ties) = [(p["user"], p["target"]) for p in predictions], eval.positions(predictions)
    common = {
        "user": np.unique([user for user, _ in windows], return_inverse=True)[1].tolist(),  # numbered
        "popularity": [(p["seen"], *p["popularity"]) for p in predictions],  # times in training, before, ties
    }
    own = {
        "before": np.minimum(before, 255).astype(int).tolist(),  # 255 where the target is not listed
        "ties": ties.astype(int).tolist(),
        "nll": [round(p["nll"], 3) for p in predictions],  # so that their mean has the table's four digits
    }
    r = {
        "note": note,
        "config": {k: Path(v).name if str(v).startswith("/") else v for k, v in c.items()},
        "log": read_lines(place / "metrics.jsonl"),
        "results": read_json(tested(place, c, "results.json"), {"model": dict})["model"],
        "windows": hashlib.sha256(repr(windows).encode()).hexdigest()[:16],
        "common": f"windows-{hashlib.sha256(json.dumps(common).encode()).hexdigest()[:16]}.bz2",  # named by its text
        "by_window": own,
    }
    return r, common


def pack(columns: dict) -> bytes:
    """Text compresses as well as binary numbers of the same precision."""
    return bz2.compress(json.dumps(columns).encode())


def unpack(packed: bytes) -> dict:
    return json.loads(bz2.decompress(packed))


def keep(args):
    made = [(Path(args.to) / f"{Path(run).resolve().name}.run.json", Path(run)) for run in args.runs]
    for n, (path, place) in enumerate(made):  # all are checked before one is written
        if path.exists() or path in dict(made[:n]):
            raise InputError(f"{path} exists" if path.exists() else f"two runs would be {path}; rename one")
        if not finished(place):
            raise InputError(f"{place}: no finished run of train.py is there")
    Path(args.to).mkdir(parents=True, exist_ok=True)
    for path, place in made:
        r, common = record(place, args.note)
        (path.parent / r["common"]).write_bytes(pack(common))
        write_json(path, r | {"by_window": base64.b64encode(pack(r["by_window"])).decode()})
        print(f"{path}, {path.stat().st_size:,} bytes")


def setting(c: dict) -> str:
    """What the runs of one table have in common: the data set, the model, and what differs from train.py as it is."""
    free = "data model plan seed out tokens compile resume".split()
    free += ["max_steps"] * (c.get("epochs", 0) > 0)  # they decide
    p = train.make_parser()  # what is usual of lr and dropout depends on --lora
    usual = vars(train.resolve(p.parse_args([f"--model={c['model']}", f"--lora={c['lora']}"])))
    usual["lora"] = 0 if c["model"] == "tiny" else p.get_default("lora")
    # a run may be older than a flag
    flags = [f"--{k} {c[k]}" for k, v in usual.items() if k not in free and c.get(k, v) != v]
    now = {k: getattr(train, k, getattr(data, k, v)) for k, v in c["constants"].items()}  # v: there is none today
    edited = [f"{k} = {v}" for k, v in c["constants"].items() if v != json.loads(json.dumps(now[k]))]
    source = [f"({c['base_source']})"] if c["base_source"] != c["base"] else []  # it may be another than its name says
    return " ".join([f"{Path(c['data']).name}, {Path(c['model']).name}", *source, *flags, *edited])


def read_record(path: Path) -> tuple[dict, dict]:
    r = read_json(path, {"config": dict, "log": list, "common": str, "by_window": str})
    try:
        r["by_window"] = unpack(base64.b64decode(r["by_window"]))
        return r, unpack((path.parent / r["common"]).read_bytes())
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{path}: its columns, or {r['common']} beside it, cannot be read ({e})") from None


def read_row(place: Path, least: float, most: float) -> dict | None:
    """What the table needs of a folder or a record, of the windows whose target occurs so often in training; None if
    there is none."""
    r, common = record(place) if place.is_dir() else read_record(place)
    w = {name: np.array(values) for name, values in (common | r["by_window"]).items()}
    some = (w["popularity"][:, 0] >= least) & (w["popularity"][:, 0] <= most)
    if not some.any():
        return None
    w = {name: values[some] for name, values in w.items()}
    at, best = (w["before"], w["ties"]), max(r["log"], key=train.merit)
    valid = {name: best[name] for name in ("valid_NDCG@10", "valid_nll")}
    own = {"place": place, "note": r["note"], "windows": r["windows"], "user": w["user"], "nll": w["nll"]}
    own |= {"NDCG@10": eval.gains(*at, 10), "popularity": metrics(*w["popularity"][:, 1:].T)}
    return r["config"] | own | {"metrics": metrics(*at) | {"nll": w["nll"].mean()} | valid}


def over_seeds(runs: list[dict]) -> dict:
    """name -> mean, std over runs; std is that of a sample, None for one run."""
    values = {name: np.array([r[name] for r in runs]) for name in runs[0]}
    return {k: {"mean": v.mean(), "std": v.std(ddof=1) if len(v) > 1 else None} for k, v in values.items()}


def interval(difference: np.ndarray, users: np.ndarray, resamples: int = 2000) -> list[float]:
    """95% bootstrap interval of the mean of difference (N,), over users: the windows of a user resemble each other."""
    at = np.unique(users, return_inverse=True)[1]
    total, n = np.bincount(at, difference), np.bincount(at)
    rng = np.random.default_rng(0)
    draws = (rng.integers(0, len(n), len(n)) for _ in range(resamples))
    return np.percentile([total[draw].sum() / n[draw].sum() for draw in draws], [2.5, 97.5]).tolist()


def against(runs: list[dict], plain: list[dict], name: str) -> dict | None:
    """A metric of a plan's runs less that of the plain LLM's, window by window, mean over the seeds that both have."""
    pairs = [(a, b) for a in runs for b in plain if a["seed"] == b["seed"] and a is not b]
    for a, b in pairs:
        if a["windows"] != b["windows"]:
            raise InputError(f"{a['place']} and {b['place']} were tested on different windows; evaluate one again")
    if not pairs:
        return None
    each = np.array([a[name] - b[name] for a, b in pairs])  # (seeds, N)
    low, high = interval(each.mean(0), pairs[0][0]["user"])
    seeds = over_seeds([{name: value} for value in each.mean(1)])[name]
    return seeds | {"low": low, "high": high, "seeds": [a["seed"] for a, _ in pairs]}


def rows_of(runs: list[dict], out: Path) -> list[dict]:
    """Popularity, SASRec if extras/sasrec.py tried it on this split, then the plans in the order of PLANS."""
    c, n = runs[0], len(runs[0]["nll"])
    rows = [{"name": "popularity", "seeds": [], "metrics": over_seeds([c["popularity"]])}]
    places = out.resolve(), out.resolve().parent
    kinds = {"flags": dict, "popularity": dict, "runs": list}
    for b in [read_json(path, kinds) for folder in places for path in folder.glob("baselines-*.json")]:
        if b.get("digest") == c["digest"]:
            asked = b["flags"]["history"], b["flags"]["exclude_history"]
            title = "SASRec" if asked == (data.HISTORY, False) else f"SASRec (history, excluded: {asked})"
            title += f" (on {b['popularity']['n']:,} windows)" if b["popularity"]["n"] != n else ""
            each = [{k: r["test"][k] for k in eval.NAMES} for r in b["runs"]]
            rows.append({"name": title, "seeds": [*range(len(each))], "metrics": over_seeds(each)})
    plans = sorted({r["plan"] for r in runs})
    for plan in sorted(plans, key=[*PLANS, *plans].index):
        own, plain = ([r for r in runs if r["plan"] == p] for p in (plan, "OR"))
        row = {"name": plan, "seeds": [r["seed"] for r in own], "metrics": over_seeds([r["metrics"] for r in own])}
        rows.append(row | {"difference": {name: against(own, plain, name) for name in PAIRED}})
    return rows


def mean_std(v: dict | None, form: str = ".4f") -> str:
    return "" if v is None else f"{v['mean']:{form}}" + (f" ± {v['std']:.4f}" if v["std"] is not None else "")


def markdown(made: dict) -> str:
    head = ["plan", "seeds", *COLUMNS, *(f"{name} less OR" for name in PAIRED)]
    title, notes = f"## {made['setting']}\n", "".join(f"; {note}" for note in made["notes"])
    lines = [title, f"{made['n']:,} test windows{notes}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in made["rows"]:
        cells = [r["name"], ", ".join(map(str, r["seeds"]))]
        cells += [mean_std(r["metrics"].get(name)) for name in COLUMNS]
        for x in (r.get("difference", {}).get(name) for name in PAIRED):
            cells.append(f"{mean_std(x, '+.4f')} [{x['low']:+.4f}, {x['high']:+.4f}]" if x else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_table(args):
    """Of the finished runs in a folder, and of the records there."""
    out, groups, made = Path(args.out), {}, []
    least, most = args.seen or (0, np.inf)
    places = [p.parent for p in out.glob("*/metrics.jsonl") if finished(p.parent)]
    for place in sorted([*places, *out.glob("*.run.json")]):
        if r := read_row(place, least, most):
            groups.setdefault((setting(r), r["digest"], r["base_digest"]), []).append(r)
    if not groups:
        such = " that was tested on such targets" if args.seen else ""
        raise InputError(f"--out {out}: no finished run{such} is there; `python -m extras.ablate run` makes them")
    for (title, *_), runs in sorted(groups.items()):
        title += f", targets that occur {least} to {most} times in training" if args.seen else ""
        for a, b in itertools.combinations(runs, 2):
            if (a["plan"], a["seed"]) == (b["plan"], b["seed"]):
                raise InputError(f"{a['place']} and {b['place']} have one plan, seed and setting; move one away")
        runs, notes = sorted(runs, key=lambda r: r["seed"]), sorted({r["note"] for r in runs} - {""})
        made.append({"setting": title, "notes": notes, "n": len(runs[0]["nll"]), "rows": rows_of(runs, out)})
    text = "\n\n".join([*map(markdown, made), NOTE])
    name = f"table-seen-{least}-{most}" if args.seen else "table"
    (out / f"{name}.md").write_text(text + "\n", "utf-8")
    write_json(out / f"{name}.json", {"tables": made})
    print(f"\n{text}\n\n{out}/{name}.md, {out}/{name}.json")


# --- attention, curves: where the model looks, layer by layer; how it learnt ------------------------------------------


@torch.inference_mode()
def attention(model: Llama, tokens: Tensor, item: Tensor) -> Iterator[Tensor]:
    """tokens, item (B, T) of whole texts -> for one layer after the other its attention (B, T, T), mean over heads."""
    lay, x = layout(item), model.embed_tokens(tokens)
    cos_sin = rope(model.config, lay.pos, x.dtype)
    for block in model.layers:
        q, k, _ = (y.double() for y in block.self_attn.qkv(block.input_layernorm(x), cos_sin))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, T, D), as q
        seen = mask(block.kind, lay.item, lay.sees)[:, None]
        z = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
        yield z.softmax(-1).mean(1)
        x = block(x, cos_sin, lay)


def queries(item: Tensor) -> Tensor:
    """item (B, T) of texts that end with a title -> (GROUPS, B, T), 1 where a token is of the group."""
    title = item == TARGET
    return torch.stack((title.roll(-1, 1) & ~title, title, (item > 0) & ~title)).double()


def shares(model: Llama, cat: data.Catalogue, coded: list[dict], budget: int = 4096) -> Tensor:
    """Texts of one target each, as data.encode makes them -> (layers, GROUPS, PARTS), mean over heads and all queries
    of a group. To the header every item is another one, so it has nothing `within`; a token is within its own item."""
    total, n = torch.zeros(len(model.layers), len(GROUPS), len(PARTS)).double(), torch.zeros(len(GROUPS), 1).double()
    for part in data.batches([len(c["tokens"]) for c in coded], budget):
        b = data.collate(cat, [coded[i] for i in part]).to(model.head.device)
        own, other = b.item[:, :, None], b.item[:, None, :]
        within, first = (own > 0) & (own == other), torch.zeros_like(own == other)
        first[:, :, 0] = True
        parts = torch.stack((within, (other > 0) & ~within, (other == 0) & ~first, first)).double()  # (PARTS, B, T, T)
        groups = queries(b.item)
        n += groups.sum((1, 2)).cpu()[:, None]
        for layer, seen in enumerate(attention(model, b.tokens, b.item)):
            total[layer] += torch.einsum("gbq,bqk,pbqk->gp", groups, seen, parts).cpu()
    return total / n


def looks(model: Llama, cat: data.Catalogue, coded: dict) -> dict[str, Tensor]:
    """A text of a history of n items and a target -> for each kind of layer (2, n): the share of the header's and of
    the title's attention that each item of the history has; mean over heads, queries and the layers of the kind."""
    b = data.collate(cat, [coded]).to(model.head.device)
    asking, n = queries(b.item)[:2, 0], int(b.item[b.item < TARGET].max())  # (2, T)
    keys = (b.item[0, :, None] == torch.arange(1, n + 1, device=b.item.device)).double()  # (T, n)
    asking = asking / asking.sum(1, keepdim=True)
    share = torch.stack([asking @ seen[0] @ keys for seen in attention(model, b.tokens, b.item)])  # (layers, 2, n)
    return {kind: share[[k == kind for k in model.plan]].mean(0) for kind in dict.fromkeys(model.plan)}


def models(args, model: Llama, c: dict) -> Iterator[tuple[str, Llama]]:
    """name, model: the trained one; under --base also its base, with the plan OR and with the run's."""
    if args.base is not None and not c["base"]:
        raise InputError(f"--base: {args.out} was trained from scratch, there is no base to compare with")
    yield f"trained, plan {c['plan']}", model
    for plan in dict.fromkeys(("OR", c["plan"])) if args.base is not None else ():
        base = eval.find_base(Path(args.out), c, args.base)
        yield f"base, plan {plan}", load(base, plan, model.head.dtype).to(model.head.device).eval()


def show_attention(args):
    if args.recommend or args.user is not None:
        return show_recommendation(args)
    trained, cat, d, c = load_run(args.out, args.data, args.base or "")
    some = eval.sample(d.test, args.users)
    coded = [data.encode(cat, e, False) for e in data.window_examples(some)]
    panels = {}
    print(f"share of attention, mean over heads and queries, {len(some)} test windows; {setting(c)}")
    for name, model in models(args, trained, c):
        share = shares(model, cat, coded)
        print(f"\n{name}\n{'layer':<14}" + "".join(f"{group:<36}" for group in GROUPS))
        print(" " * 12 + "".join(f"{part:>9}" for part in PARTS * len(GROUPS)))
        for i, (kind, row) in enumerate(zip(model.plan, share.flatten(1).tolist(), strict=True), 1):
            print(f"{i:>2} {kind:<9}" + "".join(f"{v:9.3f}" for v in row))
        for g, group in enumerate(GROUPS):
            lines = [(part, range(1, len(share) + 1), share[:, g, p]) for p, part in enumerate(PARTS)]
            panels[f"{name}: {group}, by layer"] = lines
    if args.plot:
        draw(args.plot, panels, len(GROUPS))


def show_recommendation(args):
    """Which items of a history the best title looks at."""
    r, panels = eval.Recommender(args.out, data=args.data, base=args.base or "", k=1), {}
    window = r.asked(args)
    (p,) = eval.predict(r.decoder, r.cat, r.d, [window], r.args)
    (e,) = data.window_examples([window._replace(target=r.d.ids.index(p["items"][0][0]))])
    print(f"recommended: {p['titles'][0]} (score {p['scores'][0]:.3f})")
    print("share of attention, mean over heads and the layers of a kind; a bar compares it with the table's largest")
    labels = [f"{n} {r.d.titles[i]:.40}" for n, i in enumerate(window.history, 1)]
    for name, model in models(args, r.model, r.config):
        share = looks(model, r.cat, data.encode(r.cat, e, False))
        for g, group in enumerate(("where the title begins", "in the title")):
            columns = [v[g].tolist() for v in share.values()]
            most = max(map(max, columns)) or 1
            print(f"\n{name}: {group}\n{'':<46}" + "".join(f"{kind:<19}" for kind in share))
            for label, *row in zip(labels, *columns, strict=True):
                print(f"{label:<46}" + "".join(f"{v:.4f} {'#' * round(10 * v / most):<12}" for v in row))
            print(f"{'the rest: context, the title itself':<46}" + "".join(f"{1 - sum(v):<19.4f}" for v in columns))
            panels[f"{name}: {group}"] = [(kind, v[::-1], labels[::-1]) for kind, v in zip(share, columns, strict=True)]
    if args.plot:
        draw(args.plot, panels, 2)


def show_curves(args):
    logs = {str(file.parent): read_lines(file) for out in args.out for file in sorted(Path(out).rglob("metrics.jsonl"))}
    if not logs:
        raise InputError(f"--out {' '.join(args.out)}: no metrics.jsonl is there; train.py writes it at a validation")
    for name, log in logs.items():
        print(f"\n{name}\n{'step':>8}" + "".join(f"{title:>15}" for title in LEARNT))
        best = max(log, key=train.merit)
        for m in log:
            print(f"{m['step']:>8}" + "".join(f"{m[title]:15.4f}" for title in LEARNT) + "  best" * (m is best))
    panels = {}
    for title in LEARNT:
        panels[title] = [(name, [m["step"] for m in log], [m[title] for m in log]) for name, log in logs.items()]
    if args.plot:
        draw(args.plot, panels, len(LEARNT))


def draw(path: str, panels: dict[str, list], columns: int):
    """title -> lines (label, x, y), so many panels in a row, into a png file."""
    try:
        from matplotlib import figure, rcParams
    except ImportError:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    rcParams["text.parse_math"] = False  # a title may hold dollars
    fig = figure.Figure(figsize=(13.5, len(panels) / columns * 3.3), layout="constrained")
    for ax, (title, lines) in zip(fig.subplots(len(panels) // columns, columns).flat, panels.items(), strict=True):
        for label, x, y in lines:
            ax.plot(x, y, ".-", label=label)
        ax.set_title(title, fontsize=8)
        ax.legend(fontsize=6)
    path = Path(path).with_suffix(".png")
    fig.savefig(path, dpi=150)
    print(f"drawn into {path}")


def make_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__)
    commands, count = p.add_subparsers(dest="command", required=True), number(int, 0)
    add = commands.add_parser("run", help="train every plan").add_argument
    add("--data", default="ml-100k", help="data sets, separated by commas (default: %(default)s)")
    add("--plans", default=";".join(PLANS), help="separated by semicolons (default: %(default)s)")
    add("--seeds", default="0", help="separated by commas (default: %(default)s)")
    add("--out", default="out/ablate", help="folder of the runs and the table; other flags are those of train.py")
    add = commands.add_parser("keep", help="finished runs as small files").add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a finished run of train.py")
    add("--note", required=True, help="what the run does not know: commit, machine, date; it stands in the table")
    add("--to", default="docs/runs", help="folder for RUN.run.json (default: %(default)s)")
    add = commands.add_parser("table", help="the plans against the plain LLM").add_argument
    add("--out", default="out/ablate", help="folder of runs or of what is kept; baselines-*.json there or beside it")
    add("--seen", nargs=2, type=count, metavar=("LEAST", "MOST"), help="only targets so often in training: 0 0, 1 4")
    looking = commands.add_parser("attention", help="where a model looks, layer by layer", description=LOOKS)
    add = looking.add_argument
    add("--out", default="out", help="folder of a run of train.py")
    add("--data", default="", help="its data set's folder, if that has moved")
    add("--base", nargs="?", const="", metavar="FOLDER", help="also its base, in FOLDER if that has moved")
    add("--plot", help="draw the shares into this png file")
    add = looking.add_mutually_exclusive_group().add_argument
    add("--users", type=number(int, 1), default=64, help="test windows, drawn by a fixed seed (default: %(default)s)")
    add("--recommend", nargs="+", metavar="TITLE", help="a history, titles or ids: what its recommendation looks at")
    add("--user", help="the same for the history of a user of the data")
    add = commands.add_parser("curves", help="loss and validation along the steps").add_argument
    add("--out", nargs="+", default=["out/ablate"], help="runs of train.py, or folders of such runs")
    add("--plot", help="draw them into this png file")
    return p


def main(argv: list[str]) -> bool:
    """-> False if a run was asked to stop."""
    args, theirs = make_parser().parse_known_args(argv)
    if args.command == "run":
        return run_all(args, theirs)
    show = {"keep": keep, "table": make_table, "attention": show_attention, "curves": show_curves}
    show[args.command](make_parser().parse_args(argv))
    return True


if __name__ == "__main__":
    sys.exit(0 if eval.run_main(main) else 130)
