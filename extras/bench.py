"""Speed side by side with transformers + peft: the same weights, prompts and beams, the plain plan OR, in turns.

    python -m extras.bench decode --beams 20 --score trie    # Decoder.search against generate()
    python -m extras.bench train --batch 8                   # train.update against LlamaForCausalLM with peft's LoRA
    python -m extras.bench train --batch 8 --lora 0          # the same, full fine-tuning
    python -m extras.bench cache --users 32                  # prefill of the plain LLM and of an efficient plan
    python -m extras.bench parity                            # the logits, in fp32 and bf16
    python -m extras.bench profile --batch 64 --lora 0       # where the time of a training step of ours goes

All check that the answers agree. ratio: how many times as fast as the first side, the median over rounds, so that
others on the machine do little harm. MiB: what a run adds, at its peak, to the weights (both sides share those that are
not trained) and to the optimizer's state. MFU: the share of the card's nominal bf16 FLOP/s that goes into the products
with the layers' weights. The last line is one JSON object with all numbers. Needs requirements-dev.txt.
"""

import argparse
import copy
import ctypes
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType

import data
import train
from decode import Decoder
from eval import Parser, number, run_main, sample
from hatllm import InputError, layout
from model import Llama, adapters, add_lora, hf_name, save_lora

PEAK = {  # dense bf16 FLOP/s as the maker states them, by a part of the card's name; the first that fits counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
}  # fmt: skip


def here() -> dict[str, str]:
    """What numbers of today hold for."""
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "torch": torch.__version__}


def set_up(args, plan: str = "OR") -> tuple[train.Run, list[Tensor], dict]:
    """What train.py makes of these flags, without adapters; tokens, item, source (B, T) of some test users' prompts;
    what the numbers hold for, which is printed."""
    flags = [f"--{name}={vars(args)[name]}" for name in ("data", "model", "dtype", "tokens")]
    flags += ["--lora=0", "--dropout=0", "--loss=lml", f"--plan={plan}", *["--compile"] * args.compile]
    r = train.Run(train.resolve(train.make_parser().parse_args(flags)))
    trained = args.mode == "train" and not args.lora  # such weights stay in fp32, as in train.py
    r.model.to(torch.float32 if trained else r.dtype).eval()
    head = here() | vars(args) | {"dtype": str(r.dtype)[6:], "base_source": r.config["base_source"]}
    print(" | ".join(f"{k} {v}" for k, v in head.items() if v != ""))
    prompts = data.collate_prompts(r.cat, [w.history for w in sample(r.d.test, args.users)])
    return r, [x.to(r.device) for x in prompts], head


def transformers_model(model: Llama):
    """The same Llama by transformers, on the same tensors: none is copied."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    with model.head.device:  # else a CPU draws weights that are thrown away, for half a minute
        theirs = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**model.config.to_json()))
    weights = {hf_name(n): p.data for n, p in model.named_parameters()}
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def memory() -> tuple[float, float]:
    """MiB now, and at the peak since `measure` began (on a GPU, what is allocated); 0 where none is known."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else "VmRSS: 0 VmHWM: 0 "
    return tuple(float(text.split(name)[1].split()[0]) / 1024 for name in ("VmRSS:", "VmHWM:"))


def measure(f, *args) -> tuple[object, float, float]:
    """f(*args) -> its result, seconds, and the MiB that its peak lay above what was there before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    before, start = memory()[0], time.perf_counter()
    out = f(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - start, memory()[1] - before


def in_turns(sides: dict, rounds: int, unit: str, n: float) -> dict[str, tuple[list, dict]]:
    """name -> results, and a row of the table; one call does n units. Every round calls f(round) of all sides, to and
    fro. The first round warms up: its time and memory do not count."""
    runs, out = {name: [] for name in sides}, {}
    for r in range(rounds):
        for name in reversed(sides) if r % 2 else sides:
            runs[name].append(measure(sides[name], r))
    first = [seconds for _, seconds, _ in next(iter(runs.values()))][1:]
    for name, own in runs.items():
        results, (_, *seconds), (_, *mib) = zip(*own, strict=True)
        row = {"": name, f"{unit}/s": n / statistics.median(seconds), "MiB": statistics.median(mib)}
        out[name] = results, row | {"ratio": statistics.median(a / b for a, b in zip(first, seconds, strict=True))}
    return out


def show(rows: list[dict]):
    def text(v) -> str:
        return v if isinstance(v, str) else "" if v is None else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"

    lines = [list(rows[-1]), *([text(r.get(name)) for name in rows[-1]] for r in rows)]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n".join("  ".join([x[0].ljust(wide[0]), *map(str.rjust, x[1:], wide[1:])]) for x in lines))


def generator(model: Llama, cat: data.Catalogue):
    """transformers' constrained beam search, as its users write it: a dict from the title so far to what may follow."""
    from transformers import GenerationConfig

    theirs, eos, leaf_of, allowed = transformers_model(model), model.config.eos_token_id, {}, {}
    for title, leaf in zip(cat.titles, cat.trie.leaf_of_item.tolist(), strict=True):
        path = (*title.tolist(), eos)
        leaf_of[path] = leaf
        for n, token in enumerate(path):
            allowed.setdefault(path[:n], set()).add(token)
    allowed = {prefix: list(tokens) for prefix, tokens in allowed.items()}

    def search(tokens: Tensor, item: Tensor, k: int, beam: int, score: str, scores: bool = True) -> list:
        """Right-padded prompts (B, T) -> [(leaf, score)] per user; scores False: without them, or their memory."""
        T, length = tokens.shape[1], (item >= 0).sum(1, keepdim=True)
        at = (torch.arange(T, device=tokens.device) + length) % T  # the padding comes first
        config = GenerationConfig(
            num_beams=beam, num_return_sequences=k, max_new_tokens=max(map(len, leaf_of)), do_sample=False,
            length_penalty=0.0, early_stopping=False, renormalize_logits=score == "trie", pad_token_id=eos,
            eos_token_id=eos, return_dict_in_generate=True, output_scores=scores,
        )  # fmt: skip
        out = theirs.generate(
            tokens.gather(1, at), attention_mask=(item >= 0).long().gather(1, at), generation_config=config,
            prefix_allowed_tokens_fn=lambda _, ids: allowed.get(tuple(ids[T:].tolist()), [eos]),
        )  # fmt: skip
        titles = [tuple(t[: t.index(eos) + 1] if eos in t else t) for t in out.sequences[:, T:].tolist()]
        values = out.sequences_scores.tolist() if scores else [0.0] * len(titles)
        found = [(leaf_of.get(t, -1), v) for t, v in zip(titles, values, strict=True)]
        return [found[b : b + k] for b in range(0, len(found), k)]

    return search


def agreement(ranking, theirs: list) -> dict:
    """exact: share of users whose list is certainly the best. equal: users with the same list on both sides. common:
    share of titles on both lists. gap: the largest difference of their scores. fed: title tokens read per user."""
    ours = [dict(zip(*x, strict=True)) for x in zip(ranking.leaf.tolist(), ranking.score.tolist(), strict=True)]
    both = list(zip(ours, map(dict, theirs), strict=True))
    gaps = [abs(a[x] - b[x]) for a, b in both for x in a.keys() & b.keys()]
    equal, common = sum(list(a) == list(b) for a, b in both), len(gaps) / sum(map(len, ours))
    exact, fed = (float(x.float().mean()) for x in (ranking.exact, ranking.fed))
    return {"exact": exact, "equal": equal, "common": common, "gap": max(gaps, default=None), "fed": fed}


def compare(ours: Decoder, generate, score: str, prompts: list[Tensor], beam: int, rounds: int) -> list[dict]:
    k = min(10, beam, ours.trie.n_leaves)
    sides = {"transformers": lambda r: generate(*prompts, k, beam, score, scores=r == 0)}
    sides["exact"] = lambda r: ours.search(*prompts, k, beam)
    sides["beam"] = lambda r: ours.search(*prompts, k, beam, patience=0)
    (lists, first), *own = in_turns(sides, rounds, "users", len(prompts[0])).values()
    rows = [first, *(row | agreement(found[0], lists[0]) for found, row in own)]
    return [row | {"": f"{score} {beam} {row['']}"} for row in rows]


def bench_decode(args) -> dict:
    r, (*prompts, _), head = set_up(args)
    generate, rows = generator(r.model, r.cat), []
    for score in args.score:
        ours = Decoder(r.model, r.cat.trie, score)
        for beam in args.beams:
            rows += compare(ours, generate, score, prompts, beam, args.rounds)
            show(rows[-3:])
    print(" ".join(agreement.__doc__.split()))
    return head | {"rows": rows}


def bench_cache(args) -> dict:
    """Prefill of the plain LLM, and of a plan that computes its first layers once a title and its last ones on few
    tokens. gap: to the same plan, all tokens in all layers. KV: MiB of keys and values that a prefill keeps."""
    r, (*prompts, source), head = set_up(args, args.plan)
    plain = Llama(r.model.config, "OR").to(r.device, r.dtype).eval()
    plain.load_state_dict(r.model.state_dict(), assign=True)
    theirs, ours = (Decoder(model, r.cat.trie) for model in (plain, r.model))
    ours.remember(r.cat.texts)
    sides = {"OR": lambda _: theirs.prefill(*prompts)}
    sides |= {"hierarchy": lambda _: ours.prefill(*prompts, source)}
    with torch.inference_mode():
        found = in_turns(sides, args.rounds, "users", len(prompts[0]))
        tokens, item = prompts
        last = (item >= 0).sum(1) - 1
        every = r.model(tokens, layout(item))[torch.arange(len(item)), last]
    for states, row in found.values():
        cache = states[-1][0].cache
        row |= {"KV": sum(t.untyped_storage().nbytes() for t in (*cache.k, *cache.v)) / 2**20, "gap": None}
    row["gap"] = float((states[-1][1] - every).abs().max())
    show(rows := [row for _, row in found.values()])
    return head | {"rows": rows}


def with_peft(r: train.Run, theirs):
    """theirs with the adapters of r, by peft."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        save_lora(r.model, Path(folder))
        return peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True)


def finetuner(r: train.Run, theirs, tokens: int):
    """A step as users of transformers write it: labels outside the target title are -100; gradients of forwards of at
    most so many tokens add up, 0: one forward."""
    model = (with_peft(r, theirs) if adapters(r.model) else theirs).train()
    params, eos = [p for p in model.parameters() if p.requires_grad], r.model.config.eos_token_id
    optimizer = torch.optim.AdamW(params, betas=train.BETAS, weight_decay=train.WEIGHT_DECAY, fused=True)

    def forward(texts: list[np.ndarray], labels: list[np.ndarray]) -> Tensor:
        """-> the mean loss of a forward's labels."""
        mask = data.pad([0 * text + 1 for text in texts], 0)
        ids, labels, mask = (x.to(r.device) for x in (data.pad(texts, eos), data.pad(labels, -100), mask))
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    def step(encoded: list[tuple], lr: float) -> tuple[float, int]:
        """-> the loss, how many tokens were read."""
        (texts, labels), total = zip(*encoded, strict=True), torch.zeros((), device=r.device)
        size, n = [len(text) for text in texts], sum((own >= 0).sum() for own in labels)
        for part in data.batches(size, tokens or len(size) * max(size)):
            own = [labels[i] for i in part]
            loss = forward([texts[i] for i in part], own) * (sum((x >= 0).sum() for x in own) / n)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(params, train.CLIP)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return float(total), sum(size)

    return step


def our_step(r: train.Run, encoded: list[dict], lr: float) -> tuple[float, int]:
    """-> the loss, how many tokens were read. The targets of an example share its history."""
    batch = train.make_step(r, encoded, 1 / sum(len(e["next"]) for e in encoded))
    return float(train.update(r, 0, batch, lr)[0]), batch.tokens


def encode_alone(cat: data.Catalogue, examples: list[data.Example], eos: int) -> list[tuple]:
    """text, labels for every target: it has a prompt of its own."""
    out = []
    for history, target in [(e.history[:k], target) for e in examples for k, target in e.targets]:
        prompt, title = cat.prompt(history)[0], np.append(cat.titles[target], eos)
        out.append((np.append(prompt, title), np.append(0 * prompt - 100, title)))
    return out


def mfu(model: Llama, tokens_per_s: float, machine: str) -> float | None:
    """The share of a card's FLOP/s that training needs; None for an unknown card. For every token each of the layers' N
    weights takes 2 FLOP forward, 2 for the gradient of its input, and, if it is trained, 2 for its own gradient."""
    N = sum(p.numel() for p in model.layers.parameters())
    peak = next((v for name, v in PEAK.items() if name in machine), None)
    return peak and (4 if adapters(model) else 6) * N * tokens_per_s / peak


def bench_train(args) -> dict:
    """last: one target per prompt, and the model learns. all: every item is a target; nothing is learnt."""
    (r, _, head), rows, rng = set_up(args), [], np.random.default_rng(0)
    theirs = transformers_model(r.model if args.lora else copy.deepcopy(r.model))
    if args.lora:  # without dropout, which could not be the same on both sides
        add_lora(r.model, args.lora, train.LORA_ALPHA, 0.0, train.LORA_TARGETS).to(r.device)
    r.model.train()
    r.params = [p for p in r.model.parameters() if p.requires_grad]
    r.optimizer = torch.optim.AdamW(r.params, betas=train.BETAS, weight_decay=train.WEIGHT_DECAY, fused=True)
    name, their_step = "transformers" + " + peft" * (args.lora > 0), finetuner(r, theirs, args.tokens)
    peak = train.RATES["lora" if args.lora else "full"]
    for targets, n, lr in (("last", args.batch, peak), ("all", max(1, args.batch // 4), 0.0)):
        pool = data.examples(r.d, targets)
        chosen = [[pool[i] for i in at] for at in rng.integers(len(pool), size=(args.rounds, n))]
        # both sides encode beforehand, as train.py does while the device works
        alone = [encode_alone(r.cat, part, r.model.config.eos_token_id) for part in chosen]
        shared = [[data.encode(r.cat, e, False) for e in part] for part in chosen]
        sides = {f"{name}, {targets}": lambda i, x=alone, lr=lr: their_step(x[i], lr)}
        sides[f"ours, {targets}"] = lambda i, x=shared, lr=lr: our_step(r, x[i], lr)
        n_targets = sum(len(e.targets) for part in chosen for e in part) / args.rounds
        both = in_turns(sides, args.rounds, "targets", n_targets).values()
        for found, row in both:
            row["tokens/s"] = row["targets/s"] * np.mean([tokens for _, tokens in found]) / n_targets
            row["MFU"] = mfu(r.model, row["tokens/s"], head["machine"])
        (expected, first), (found, row) = both
        gap = max(abs(a - b) for (a, _), (b, _) in zip(expected, found, strict=True))
        row |= {"targets": n_targets, "gap": gap}
        show([first, row])
        rows += [first, row | {"losses": [loss for loss, _ in found]}]
    agree = max(row.get("gap", 0) for row in rows) < (1e-4 if r.dtype == torch.float32 else 2e-2)
    print(f"losses agree: {agree}")
    return head | {"rows": rows, "losses agree": agree}


@torch.inference_mode()
def bench_parity(args) -> dict:
    """Logits of real prompts by this Llama and by transformers'. fp32: within 1e-4. bf16: the mean distance to one's
    own logits in fp32 is at most 1.5 times theirs."""
    result, exact = {}, []
    for dtype in ("float32", "bfloat16"):
        r, (tokens, item, _), head = set_up(argparse.Namespace(**vars(args) | {"dtype": dtype}))
        there, theirs = item >= 0, transformers_model(r.model)
        ours = r.model.logits(r.model(tokens, layout(item))[there])  # (R, V) after all tokens of all prompts
        other = theirs(input_ids=tokens, attention_mask=there.long(), use_cache=False).logits[there].float()
        exact = exact or [ours, other]
        gap = float((ours - other).abs().max())
        lost = [float((a - b).abs().mean()) for a, b in zip((ours, other), exact, strict=True)]
        within = gap < 1e-4 if dtype == "float32" else lost[0] <= 1.5 * lost[1]
        result[dtype] = {"gap": gap, "ours to fp32": lost[0], "theirs to fp32": lost[1], "within": within}
        print(f"{dtype}: gap {gap:.2g}, mean distance to fp32 {lost[0]:.2g}, theirs {lost[1]:.2g}; within: {within}")
    return head | {"dtype": [*result]} | result


def bench_profile(args) -> dict:
    """A training step of HatLLM, all targets: its seconds; idle, the share of them in which the device runs no kernel
    (None on a CPU); the kernels, or on a CPU the operations, that take longest."""
    flags = [f"--{name}={vars(args)[name]}" for name in ("data", "model", "dtype", "lora", "batch", "tokens")]
    flags += ["--targets=all", *["--compile"] * args.compile]
    r = train.Run(train.resolve(train.make_parser().parse_args(flags)))
    r.model.train()
    batch, gpu = train.get_batch(r, 0), r.device.type == "cuda"
    seconds = [measure(train.update, r, 0, batch, 1e-5)[1] for _ in range(5)]
    usual = statistics.median(seconds[2:])  # without the profiler, which slows the CPU down
    asked = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[asked.CPU, asked.CUDA] if gpu else [asked.CPU]) as p:
        measure(train.update, r, 0, batch, 1e-5)
    kind, name = (DeviceType.CUDA, "self_device_time_total") if gpu else (DeviceType.CPU, "self_cpu_time_total")
    events = [e for e in p.key_averages() if e.device_type == kind and not e.is_user_annotation]
    top = [{"name": e.key[:90], "ms": getattr(e, name) / 1000, "calls": e.count} for e in events]
    idle = max(0.0, 1 - sum(e["ms"] for e in top) / 1000 / usual) if gpu and top else None
    top = sorted(top, key=lambda e: -e["ms"])[:15]
    head = here()
    share = mfu(r.model, batch.tokens / usual, head["machine"])
    known = [f", {v:.0%} {name}" for v, name in ((idle, "idle"), (share, "MFU")) if v is not None]
    print(f"a step of {batch.tokens:,} tokens: {usual:.3f} s" + "".join(known))
    print("\n".join(f"{e['ms']:9.2f} ms  {e['calls']:5} x  {e['name']}" for e in top))
    return head | {"seconds": usual, "tokens": batch.tokens, "MFU": share, "idle": idle, "top": top}


MODES = dict(decode=bench_decode, train=bench_train, cache=bench_cache, parity=bench_parity, profile=bench_profile)


def make_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__)
    add, whole = p.add_argument, number(int, 1)
    add("mode", choices=MODES)
    add("--data", default="beauty", help="a preset or a folder (default: %(default)s)")
    add("--model", default="smollm2-135m", help="smollm2-135m; tiny (random weights); or a Hugging Face Llama folder")
    add("--rounds", type=number(int, 2), default=4, help="of each side; the first warms up (default: %(default)s)")
    add("--users", type=whole, default=8, help="decode, cache: test users, one batch (default: %(default)s)")
    add("--beams", type=number(int, 2), nargs="+", default=[10, 20], help="decode: beam widths (default: 10 20)")
    add("--score", nargs="+", default=["trie", "full"], choices=("trie", "full"), help="decode (default: both)")
    add("--plan", default="IN-closed:1/2 OR CR-last:1/4", help="cache: beside the plain LLM (default: %(default)s)")
    add("--batch", type=whole, default=8, help="train: windows in a step, or a quarter as many stretches; profile")
    add("--lora", type=number(int, 0), default=8, help="train, profile: rank; 0: full fine-tuning (default: 8)")
    add("--tokens", type=number(int, 0), default=0,
        help="train: in a forward, on both sides; 0: here as in train.py, there all at once; profile")  # fmt: skip
    add("--dtype", default="float32", choices=("auto", "float32", "bfloat16"), help="as in train.py")
    add("--compile", action="store_true", help="train, profile: our side, as in train.py")
    return p


def main(argv: list[str]):
    args = make_parser().parse_args(argv)
    try:
        print(json.dumps(MODES[args.mode](args)))
    except ModuleNotFoundError as e:
        raise InputError(f"bench compares with {e.name}: pip install -r requirements-dev.txt") from None


if __name__ == "__main__":
    run_main(main)
