"""Speed side by side with transformers + peft: the same weights, prompts and beams, the plain plan OR, in turns.

    python bench.py decode --beams 10,20 --score trie,full   # Decoder.search against generate(prefix_allowed_tokens_fn)
    python bench.py train --batch 8                          # Trainer.step against LlamaForCausalLM with peft's LoRA
    python bench.py cache --users 32                         # prefill with and without the item cache of IN-closed

All check that the answers agree. A ratio is the median over rounds of one side's time over the other's, so others on
the machine do little harm; --clock cpu does better. Memory is what a run adds, at its peak, to the weights, which both
sides share. The last line is one JSON object with all numbers. Needs requirements-dev.txt.
"""

import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from operator import truediv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
import model as llama
import train as training
from common import World, choose, device_and_dtype, parse_flags, run
from data import Catalogue, Example
from decode import Decoder
from hatllm import InputError
from model import Llama


@dataclass
class Flags:
    data: str = "office"  # data set: a preset or the path of a folder
    data_dir: str = ""  # where data sets lie, as in train.py
    model: str = "smollm2-135m"  # smollm2-135m, tiny (random weights), or the path of a Hugging Face Llama folder
    rounds: int = 3  # times each side runs; the updates in train
    users: int = 8  # decode: test users, one batch
    beams: str = "10,20"  # decode: beam widths
    score: str = "trie,full"  # decode: trie, generate() with renormalize_logits; full, generate() as it comes
    batch: int = 8  # train: windows in a step; a quarter as many histories where all items are targets
    lr: float = 3e-4  # train: of the adapters
    threads: int = 2  # of the CPU
    clock: str = "wall"  # wall; cpu: seconds of all threads together, for a machine that others use
    dtype: str = "float32"  # float32, bfloat16 (autocast in train), or auto, as in train.py


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def setup(flags: Flags, plan: str = "OR") -> tuple[Llama, Catalogue, data.Dataset, dict]:
    """Model, catalogue, data, and what the numbers hold for, which is printed."""
    global clock
    clock = CLOCKS[choose("clock", flags.clock, (*CLOCKS,))]
    device, dtype = device_and_dtype(flags.dtype, flags.model)
    torch.set_num_threads(flags.threads)
    d = data.load(flags.data, flags.data_dir)
    model, tokenizer, _ = training.build(training.Flags(model=flags.model, plan=plan, lora=0), d.titles, device, dtype)
    cat = Catalogue(d.titles, tokenizer, model.config.eos_token_id)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    head = {"date": str(date.today()), "machine": machine, "torch": torch.__version__}
    head |= vars(flags) | {"dtype": str(dtype)[6:]}
    print(" | ".join(f"{k} {v}" for k, v in head.items() if v != ""))
    return model.to(dtype).eval(), cat, d, head


def transformers_model(model: Llama):
    """The same Llama by transformers, on the same tensors: none is copied."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    theirs = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**model.config.to_json()))
    weights = {llama.hf_name(n): p.data for n, p in model.named_parameters() if llama.hf_name(n)}
    theirs.to(model.head.device).load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    return theirs.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def memory(name: str) -> float:
    """VmRSS, or VmHWM, its peak since `measure` began, in bytes (on a GPU, what is allocated); nan without /proc."""
    if torch.cuda.is_available():
        return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[name]()
    status = Path("/proc/self/status")
    return float(status.read_text().split(name + ":")[1].split()[0]) * 1024 if status.exists() else float("nan")


def measure(f, *args) -> tuple[object, float, float]:
    """f(*args) -> its result, seconds, and the MiB that its peak lay above what was there before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    before, start = memory("VmRSS"), now()
    out = f(*args)
    return out, now() - start, (memory("VmHWM") - before) / 2**20


def in_turns(sides: dict, rounds: int) -> dict[str, tuple[list, dict]]:
    """name -> results, medians over the rounds of seconds and MiB, also over those of the first side (MiB: without the
    first round, which may keep more). Every round calls f(round) of all sides, to and fro."""
    runs, out = {name: [] for name in sides}, {}
    for r in range(rounds):
        for name in list(sides)[:: -1 if r % 2 else 1]:
            runs[name].append(measure(sides[name], r))
    _, s0, m0 = zip(*next(iter(runs.values())), strict=True)
    for name, own in runs.items():
        results, s, m = zip(*own, strict=True)
        share = [a / b if b else float("nan") for a, b in zip(m, m0, strict=True)]
        row = {"": name, "s": statistics.median(s), "ratio": statistics.median(map(truediv, s0, s))}
        row |= {"MiB": statistics.median(m[1:] or m), "memory": statistics.median(share[1:] or share)}
        out[name] = results, row
    return out


def split(f, watched: dict) -> dict[str, float]:
    """Seconds of f() in methods, label: (owner, name), less those in other watched methods that they call."""
    seconds, inside = dict.fromkeys(watched, 0.0), [0.0]

    def watch(label: str, method):
        def timed(*args, **more):
            start, before = now(), inside[0]
            out = method(*args, **more)
            took = now() - start
            seconds[label] += took - (inside[0] - before)
            inside[0] = before + took
            return out

        return timed

    for label, (owner, name) in watched.items():
        setattr(owner, name, watch(label, getattr(owner, name)))
    f()
    for owner, name in watched.values():
        delattr(owner, name)
    return seconds


def show(rows: list[dict]):
    def text(v) -> str:
        return v if isinstance(v, str) else "" if v is None else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"

    lines = [list(rows[0]), *([text(v) for v in r.values()] for r in rows)]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n".join("  ".join([x[0].ljust(wide[0]), *map(str.rjust, x[1:], wide[1:])]) for x in lines))


# ---------------------------------------------------------------------------------------------------------------------
# decode


class Generate:
    """transformers' constrained beam search, as its users write it: a dict from the title so far to what may follow."""

    def __init__(self, theirs, cat: Catalogue, eos: int):
        self.theirs, self.eos, self.leaf, self.fed, allowed = theirs, eos, {}, [], defaultdict(set)
        for title, leaf in zip(cat.titles, cat.trie.leaf_of_item.tolist(), strict=True):
            path = (*title.tolist(), eos)
            self.leaf[path] = leaf
            for n, token in enumerate(path):
                allowed[path[:n]].add(token)
        self.allowed = {prefix: list(tokens) for prefix, tokens in allowed.items()}
        theirs.register_forward_pre_hook(
            lambda m, a, more: self.fed.append(more["input_ids"].numel()), with_kwargs=True
        )

    def search(self, tokens: Tensor, item: Tensor, k: int, beam: int, score: str, scores: bool = True) -> list:
        """Right-padded prompts (B, T) -> [(leaf, score)] per user; scores False: without them, or their memory."""
        from transformers import GenerationConfig

        T, length, self.fed = tokens.shape[1], (item >= 0).sum(1, keepdim=True), []
        at = (torch.arange(T, device=tokens.device) + length) % T  # the padding comes first
        config = GenerationConfig(
            num_beams=beam, num_return_sequences=k, max_new_tokens=max(map(len, self.leaf)), do_sample=False,
            length_penalty=0.0, early_stopping=False, renormalize_logits=score == "trie", pad_token_id=self.eos,
            eos_token_id=self.eos, return_dict_in_generate=True, output_scores=scores,
        )  # fmt: skip
        out = self.theirs.generate(
            tokens.gather(1, at), attention_mask=(item >= 0).long().gather(1, at), generation_config=config,
            prefix_allowed_tokens_fn=lambda _, ids: self.allowed.get(tuple(ids[T:].tolist()), [self.eos]),
        )  # fmt: skip
        titles = [tuple(t[: t.index(self.eos) + 1] if self.eos in t else t) for t in out.sequences[:, T:].tolist()]
        values = out.sequences_scores.tolist() if scores else [float("nan")] * len(titles)
        found = [(self.leaf.get(t, -1), v) for t, v in zip(titles, values, strict=True)]
        return [found[b : b + k] for b in range(0, len(found), k)]


def agreement(ranking, theirs: list) -> dict:
    """Users with the same list, the share of titles in common and the largest difference of their scores, and by how
    much the titles of ours score higher on the mean (below 0 theirs do: what a search has missed)."""
    ours = [dict(zip(*x, strict=True)) for x in zip(ranking.leaf.tolist(), ranking.score.tolist(), strict=True)]
    both = list(zip(ours, map(dict, theirs), strict=True))
    gaps = [abs(a[x] - b[x]) for a, b in both for x in a.keys() & b.keys()]
    higher = ranking.score.mean() - torch.tensor([[score for _, score in x] for x in theirs]).mean()
    equal, common = sum(list(a) == list(b) for a, b in both), len(gaps) / sum(map(len, ours))
    return {"exact": float(ranking.exact.float().mean()), "equal": equal, "common": common,
            "gap": max(gaps, default=float("nan")), "higher": float(higher)}  # fmt: skip


def limit(model: Llama, tokens: int) -> tuple[float, float]:
    """FLOPs of the layers' matrices on so many tokens, and the FLOP/s that these matrices reach there by themselves."""
    x, gates = model.head.new_ones(tokens, model.config.hidden_size), [b.mlp.gate_proj for b in model.layers]
    with torch.inference_mode():
        seconds = statistics.median([measure(lambda: [gate(x) for gate in gates][:0])[1] for _ in range(5)][1:])
    rate = 2 * tokens * sum(gate.weight.numel() for gate in gates) / seconds
    return 2 * tokens * sum(p.numel() for p in model.layers.parameters()), rate


def decode(flags: Flags) -> dict:
    model, cat, d, head = setup(flags)
    device, k, rows = model.head.device, min(10, cat.trie.n_leaves), []
    windows = d.test[np.random.default_rng(0).permutation(len(d.test))[: flags.users]]
    tokens, item = (x.to(device) for x in data.collate_prompts(cat, windows.histories())[:2])
    n, prompt = len(item), int((item >= 0).sum())
    theirs = Generate(transformers_model(model), cat, model.config.eos_token_id)
    for score in flags.score.split(","):
        x = Decoder(model, cat.trie, choose("score", score, ("trie", "full")))
        x.search(tokens[:1], item[:1], 1, 2), theirs.search(tokens[:1], item[:1], 1, 2, score)  # warm up
        watched = {"prefill s": (x, "prefill"), "steps s": (x, "feed"), "lm_head s": (model, "logits")}
        watched |= {"trie s": (x, "expand"), "rest s": (x, "search")}
        for beam in map(int, flags.beams.split(",")):
            args = tokens, item, k, beam
            sides = {"transformers": lambda r, a=args, s=score: theirs.search(*a, s, scores=r == 0)}
            for name in ("exact", "beam"):
                sides[f"ours, {name}"] = lambda r, a=args, x=x, e=name == "exact": x.search(*a, exact=e)
            for name, (found, row) in in_turns(sides, flags.rounds).items():
                row = {"": name, "scores": score, "beam": beam, "users/s": n / row["s"]} | row
                if name == "transformers":
                    lists, row = found[0], row | {"prompt": theirs.fed[0] / n, "title": sum(theirs.fed[1:]) / n}
                else:
                    parts = split(lambda f=sides[name]: f(1), watched)
                    row |= {"prompt": prompt / n, "title": x.fed / n}
                    row |= agreement(found[0], lists) | parts
                rows.append(row)
    rows = [{key: row.get(key) for key in rows[-1]} for row in rows]
    flops, rate = limit(model, prompt)
    best = max(row["users/s"] for row in rows if row[""] != "transformers")
    show(rows)
    print(f"""ratio, memory: over transformers'; prompt, title: tokens fed per user (transformers' with pads, beams)
exact: share of users; equal: users with transformers' list; common: share of titles, gap: their largest difference in
score; higher: mean score, ours less theirs
limit: {flops / n / 1e9:.3g} GFLOP of prefill per user at {rate / 1e9:.0f} GFLOP/s of
matmul are {rate / flops * n:.3g} users/s, the best row is at {best * flops / n / rate:.0%}""")
    return head | {"rows": rows, "matmul GFLOP/s": rate / 1e9, "limit users/s": rate / flops * n}


def cache(flags: Flags) -> dict:
    """Prefill under IN-closed:1/4 OR CR:1/4, all layers for every user against the closed ones once a title."""
    model, cat, d, head = setup(flags, "IN-closed:1/4 OR CR:1/4")
    windows = d.test[np.random.default_rng(0).permutation(len(d.test))[: flags.users]]
    prompts = [v.to(model.head.device) for v in data.collate_prompts(cat, windows.histories())]
    x = Decoder(model, cat.trie)
    _, once, mib = measure(x.remember, cat.titles)
    sides = {"all layers": lambda r: x.prefill(*prompts[:2]), "item cache": lambda r: x.prefill(*prompts)}
    with torch.inference_mode():
        runs = in_turns(sides, flags.rounds)
    tokens, titles = int((prompts[1] >= 0).sum()), int((prompts[1] > 0).sum())
    share = {"all layers": 1.0, "item cache": 1 - titles / tokens * x.closed / len(model.layers)}
    rows = [
        row | {"users/s": len(windows) / row["s"], "tokens x layers": share[name]} for name, (_, row) in runs.items()
    ]
    gap = float((runs["all layers"][0][0] - runs["item cache"][0][0]).abs().max())
    show(rows)
    n = sum(map(len, cat.titles))
    print(f"""tokens x layers: share of the prefill's work; the {n:,} tokens of all titles went through {x.closed} of
{len(model.layers)} layers once: {once:.3g} s, {mib:,.0f} MiB; largest difference of the states {gap:.0e}""")
    return head | {"rows": rows, "once s": once, "once MiB": mib, "gap": gap}


# ---------------------------------------------------------------------------------------------------------------------
# train


class Finetune:
    """A LoRA step as users of transformers + peft write it: labels outside the target title are -100."""

    def __init__(self, theirs, ours: Llama, cat: Catalogue, f: training.Flags):
        import peft

        self.cat, self.f, self.eos = cat, f, ours.config.eos_token_id
        with tempfile.TemporaryDirectory() as folder:
            llama.save_lora(ours, Path(folder))
            self.model = peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True).train()
        self.params, self.dtype = [p for p in self.model.parameters() if p.requires_grad], ours.head.dtype
        self.optimizer = torch.optim.AdamW(self.params, lr=f.lr, betas=(0.9, 0.95), weight_decay=f.weight_decay)

    def step(self, examples: list[Example], lr: float, *_) -> tuple[float, bool]:
        """As Trainer.step, on examples with one target each."""
        texts, labels, device = [], [], self.params[0].device
        for e in examples:
            prompt, title = self.cat.prompt(e.history)[0], np.append(self.cat.titles[e.targets[0][1]], self.eos)
            texts.append(torch.from_numpy(np.append(prompt, title)))
            labels.append(torch.from_numpy(np.append(0 * prompt - 100, title)))
        mask = pad_sequence([torch.ones_like(t) for t in texts], True).to(device)
        ids, labels = pad_sequence(texts, True, self.eos).to(device), pad_sequence(labels, True, -100).to(device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.f.clip)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), False


def train(flags: Flags) -> dict:
    model, cat, d, head = setup(flags)
    tokens = training.resolve(training.Flags()).tokens
    f = training.Flags(batch=flags.batch, lr=flags.lr, lora_dropout=0.0, tokens=tokens, loss="lml")
    torch.manual_seed(0)
    theirs, device, dtype, rows = transformers_model(model), model.head.device, model.head.dtype, []
    llama.add_lora(model, f.lora, f.lora_alpha, 0.0, f.lora_targets).to(device).train()
    theirs, f_msl = Finetune(theirs, model, cat, f), training.Flags(**vars(f) | {"loss": "msl"})
    ours, msl = (training.Trainer(x, model, cat, World(), device, dtype) for x in (f, f_msl))
    pool, every, few = data.examples(d), data.examples(d, "all"), training.Flags(batch=max(1, flags.batch // 4))
    last = [[pool[i] for i in training.step_examples(pool, r, f)] for r in range(flags.rounds)]
    shared = [[every[i] for i in training.step_examples(every, r, few)] for r in range(flags.rounds)]
    single = [[Example(e.history[:k], [(k, t)]) for e in part for k, t in e.targets] for part in shared]
    tables = (  # trainer, batches, learning rate: what is only timed changes no weights
        {"transformers + peft": (theirs, last, f.lr), "ours, lml": (ours, last, f.lr), "ours, msl": (msl, last, 0.0)},
        {"transformers + peft, all": (theirs, single, 0.0), "ours, lml, all, separate": (ours, single, 0.0),
         "ours, lml, all, shared": (ours, shared, 0.0), "ours, msl, all, shared": (msl, shared, 0.0)},
    )  # fmt: skip
    for t in (theirs, ours, msl):  # warm up
        t.step(last[0][:1], 0.0, 0, False)
    for table in tables:
        sides = {name: lambda r, t=t, pool=pool, lr=lr: t.step(pool[r], lr, 0, False)[0]
                 for name, (t, pool, lr) in table.items()}  # fmt: skip
        runs = in_turns(sides, flags.rounds)
        for name, (losses, row) in runs.items():
            t, examples = table[name][0], [e for part in table[name][1] for e in part]
            n = sum(len(e.targets) for e in examples) / flags.rounds
            tokens = sum(len(data.encode(cat, e, t is msl)["tokens"]) for e in examples) / flags.rounds
            row |= {"targets": n, "tokens/target": tokens / n, "tokens/s": tokens / row["s"], "targets/s": n / row["s"]}
            gap = max(abs(a - b) for a, b in zip(losses, next(iter(runs.values()))[0], strict=True))
            rows.append(row | {"loss": losses[-1], "gap": None if t is msl else gap})
    show(rows)
    worst, bound = max(row["gap"] or 0 for row in rows), 1e-4 if dtype == torch.float32 else 2e-2
    print(f"""all: every item of a history is a target, in its own prompt or in one forward; tokens: fed, without pads
(ours pads forwards of like length, the other side the whole step)
ratio, memory: over those of transformers + peft on the same targets
losses {"agree" if worst < bound else "DIFFER"}: at most {worst:.0e} apart""")
    return head | {"rows": rows, "losses agree": worst < bound}


def main(argv: list[str]):
    modes = {"decode": decode, "cache": cache, "train": train}
    if not argv or argv[0] not in (*modes, "--help"):
        raise InputError("python bench.py decode, train or cache, then flags; see python bench.py --help")
    try:
        print(json.dumps(modes.get(argv[0], decode)(parse_flags(Flags, argv[argv[0] in modes :], __doc__))))
    except ModuleNotFoundError as e:
        raise InputError(f"bench.py compares with {e.name}: pip install -r requirements-dev.txt") from None


if __name__ == "__main__":
    run(main)
