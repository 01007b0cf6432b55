"""Trains a Llama with HatLLM's masks to write the title of what a user buys next.

    python train.py                                            # MovieLens-100K, a tiny Llama from scratch: minutes
    python train.py --data beauty --model smollm2-135m         # LoRA on SmolLM2-135M
    python train.py --data beauty --plan OR                    # the plain LLM, to compare with
    torchrun --nproc_per_node=8 train.py --data beauty --model path/to/Llama-3.2-1B

Everything random depends on the seed, the step and the process alone, so a run can stop anywhere and resume to the
same end, and a CPU run repeats bit by bit. Shapes as in model.py.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads spin briefly: 5 times faster on a shared machine
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while importing ends without a traceback

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import eval
from data import Batch, Catalogue, Dataset, Tokenizer, Trie
from eval import World, newest, number
from hatllm import PLAN, InputError, layout, round_up
from model import Config, Llama, adapters, add_lora, load, read_json, read_safetensors, save, save_lora, write_json

# Constants, to be edited; config.json of a run records them all.
TAU = 1.0  # temperature of the masked softmax
LORA_ALPHA = 16.0  # adapters are scaled by LORA_ALPHA / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ["q_proj", "v_proj"]  # linear layers that get adapters
RATES = {"scratch": 1e-3, "full": 1e-4, "lora": 3e-4}  # peak learning rate
DROPOUT = {"scratch": 0.1, "full": 0.0, "lora": 0.0}  # on the embeddings and both branches of a block
WARMUP = 0.05  # share of the steps in which the learning rate rises; then it falls as a cosine to a tenth
BETAS = [0.9, 0.999]  # of AdamW: the second lets rare tokens move further than 0.95 does
WEIGHT_DECAY = 0.01  # on matrices
CLIP = 1.0  # norm of the gradient at most
VALID_WINDOWS = 2000  # in a validation, drawn by a fixed seed: with few, the choice of the best is noise
ROW = 1024  # tokens in a row on a GPU; a row holds one or more texts
LOOK_EVERY = 50  # steps between two looks at the loss, for which a GPU must wait; if none was finite, a run ends
TINY = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=1, num_key_value_heads=1)

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for a parameter


def make_parser() -> argparse.ArgumentParser:
    p = eval.Parser(description=__doc__)
    add, count, share = p.add_argument, number(int, 0), number(float, 0, 0.99)
    add("--data", default="ml-100k", help="ml-100k, beauty, office, books, or a folder (default: %(default)s)")
    add("--split", default="time", choices=("time", "loo"), help="8:1:1 by the target's time, or leave one out")
    add("--core", type=count, default=5, help="keep users and items with at least so many interactions (default: 5)")
    add("--columns", default="title", help="of items.tsv, that a history shows: title,brand; the target is the title")
    add("--targets", default="auto", choices=("auto", "last", "all"),
        help="last: one a window, as published; all: every training item; auto: all for tiny")  # fmt: skip
    add("--limit", type=count, default=0, help="train on so many examples only, the same for every seed; 0: all")
    add("--model", default="tiny", help="tiny: from scratch; smollm2-135m; or a Hugging Face folder")
    add("--plan", default=PLAN, help="kinds of the layers; OR alone is the plain LLM (default: %(default)s)")
    add("--dropout", type=share, help="on the embeddings and both branches of a block (default: 0.1 for tiny, else 0)")
    add("--label_smoothing", type=share, default=0.0, help="for many passes; the loss shown includes it (default: 0)")
    add("--lora", type=count, default=8, help="rank of the adapters; 0: full tuning, as always for tiny (default: 8)")
    add("--loss", default="msl", choices=tuple(LOSSES),
        help="msl: over the tokens that continue some title; lml: over the whole vocabulary")  # fmt: skip
    add("--lr", type=number(float, 0, 1), default=0.0, help="peak learning rate; 0: see RATES in train.py")
    add("--max_steps", type=number(int, 1), default=4000, help="steps of the schedule (default: %(default)s)")
    add("--epochs", type=number(float, 0, 10**6), default=0.0, help="passes over the examples, in place of max_steps")
    add("--batch", type=number(int, 1), default=16, help="examples in a step, on any hardware (default: %(default)s)")
    add("--seed", type=count, default=0, help="of the initial weights, the order of the examples, dropout")
    add("--tokens", type=count, default=0, help="tokens in a forward; 0: as many as fit a GPU, 1024 on a CPU")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where it is faster")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile each block")
    add("--eval_every", type=number(int, 1), default=1000, help="steps between two validations, each with a checkpoint")
    add("--eval_limit", type=count, default=0, help=f"windows drawn to validate and to test; 0: {VALID_WINDOWS}, all")
    add("--out", default="", help="folder of the run; default: out/ and what decides the result, where it is unusual")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return p


def parse(argv: list[str]):
    """--resume takes the flags that are not given from the run."""
    p = make_parser()
    args = p.parse_args(argv)
    if not (args.resume and args.out):
        return args
    c = eval.read_run(Path(args.out))
    p.set_defaults(**{name: c[name] for name in vars(args) if name in c})
    return p.parse_args(argv)


def resolve(args):
    """Fills in the defaults that depend on the model and on the machine."""
    args.plan = " ".join(args.plan.split())
    if not args.out:
        free = "data model tokens dtype compile eval_every eval_limit out resume".split()
        usual = make_parser().parse_args([])
        other = {n: v for n, v in vars(args).items() if n not in free and v != getattr(usual, n)}
        more = [slug(v) if n == "plan" else f"{n}{slug(v)}" for n, v in other.items()]
        args.out = "-".join([f"out/{Path(args.data).resolve().name}", Path(args.model).name, *more])
    scratch = args.model == "tiny"
    args.lora = 0 if scratch else args.lora
    args.targets = args.targets if args.targets != "auto" else "all" if scratch else "last"
    kind = "scratch" if scratch else "lora" if args.lora else "full"
    args.lr = args.lr or RATES[kind]
    args.dropout = DROPOUT[kind] if args.dropout is None else args.dropout
    return args


def slug(value) -> str:
    """A flag's value as a part of a file name: 'IN:1/4 OR' -> 'IN1of4_OR'."""
    return "_".join(str(value).split()).replace(":", "").replace("/", "of")


# --- The losses -----------------------------------------------------------------------------------------------------


def trie_nll(model: Llama, trie: Trie, h: Tensor, b: Batch, smoothing: float = 0.0) -> Tensor:
    """Masked softmax (MSL, SIGIR 2025, eq. 5): (R,) -log of the next token among those that continue some title, after
    h (R, d). smoothing: the share of the mean over all that may follow."""
    z, target = model.logits(h, trie.columns) / TAU, trie.column[b.next]  # (R, C), (R,)
    row, child = trie.children(b.parents, b.M)
    hidden = torch.ones(len(b.parents), z.shape[1], dtype=torch.bool, device=z.device)  # (U, C)
    hidden.index_put_((row, trie.column[child]), hidden.new_zeros(()))  # `= False` would make a GPU wait for it
    hidden = hidden[b.parent]  # (R, C)
    nll = F.cross_entropy(z.masked_fill(hidden, -torch.inf), target, reduction="none")
    if smoothing:  # the mean of -log p less -log p of the target is the target's logit less the mean logit
        mean = z.masked_fill(hidden, 0).sum(1) / trie.fan[b.parents][b.parent]
        nll = nll + smoothing * (z.gather(1, target[:, None])[:, 0] - mean)
    return nll


def full_nll(model: Llama, trie: Trie, h: Tensor, b: Batch, smoothing: float = 0.0) -> Tensor:
    """(R,) -log of the next token among the whole vocabulary, after h (R, d)."""
    return F.cross_entropy(model.logits(h), trie.token[b.next], reduction="none", label_smoothing=smoothing)


LOSSES = {"msl": trie_nll, "lml": full_nll}  # all but lml look only at what the trie allows


# --- What a run is made of ------------------------------------------------------------------------------------------


class Run:
    """What a run is made of: data, model, examples, optimizer, and where they compute."""

    def __init__(self, args):
        self.args, self.out, self.world = args, Path(args.out).resolve(), World()
        self.device, self.dtype = eval.device_and_dtype(args.dtype, args.model == "tiny")
        self.d = data.load(args.data, args.split, args.core, args.columns)
        self.model, self.tokenizer, self.base = build(args, self.d, self.device, self.dtype)
        self.model.dtype = self.dtype
        gpu = self.device.type == "cuda"
        if gpu or args.compile:
            torch._dynamo.config.recompile_limit = 64  # sizes; what is called with further ones would not be compiled
        if args.compile:
            torch._dynamo.config.optimize_ddp = False  # it would cut the blocks in pieces, and fail
            for block in self.model.layers:  # a CPU has rows of many lengths
                block.compiled = torch.compile(block.compute, dynamic=not gpu)
        self.net = self.model if self.world.size == 1 else DDP(self.model, gradient_as_bucket_view=True)
        self.cat = Catalogue(self.d.titles, self.tokenizer, self.model.config, self.d.texts)
        self.trie, self.coded = self.cat.trie.to(self.device), {}
        self.pool, self.trie_only = data.examples(self.d, args.targets), args.loss != "lml"  # see Catalogue.target
        if args.limit:
            self.pool = [self.pool[i] for i in np.random.default_rng(0).permutation(len(self.pool))[: args.limit]]
        self.per_epoch = math.ceil(len(self.pool) / args.batch)
        self.steps = math.ceil(args.epochs * self.per_epoch) or args.max_steps
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        longest = data.longest(self.cat, self.pool, self.trie_only) if gpu or self.base else 0
        most = self.model.config.max_position_embeddings
        if self.base and longest > most and self.world.rank == 0:
            what = f"the longest text has {longest:,} tokens, the model was made for {most:,}; see HISTORY"
            print(f"warning: {what}", file=sys.stderr)
        self.pack = gpu  # several texts in a row
        if gpu:  # all rows are of one length, of whole blocks of 128: the kernel is compiled for every length
            self.tokens = args.tokens or fitting_tokens(self)
            self.look_every = LOOK_EVERY if self.world.size == 1 else 5  # torchrun waits 30 s after Ctrl-C, then kills
            self.row = round_up(max(min(ROW, self.tokens), longest), 128)
        else:  # a CPU takes small forwards of texts that are about as long as each other
            self.tokens, self.look_every = args.tokens or 1024, 1
            self.row = 64 if args.compile else 1  # the length of rows is a multiple of it, for few shapes
        matrices, others = [p for p in self.params if p.dim() > 1], [p for p in self.params if p.dim() <= 1]
        groups = [dict(params=matrices, weight_decay=WEIGHT_DECAY), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
        self.config = make_config(self)


def fitting_tokens(run: Run) -> int:
    """Tokens of a forward on a GPU: a layer keeps 20 to 32 d numbers a token, and at least a third stays free."""
    c, trained = run.model.config, sum(p.numel() for p in run.params)
    free = torch.cuda.mem_get_info()[0] - 12 * trained  # gradients, AdamW's two moments
    return max(1, free // (48 * run.dtype.itemsize * c.hidden_size * c.num_hidden_layers))


def build(args, d: Dataset, device: torch.device, dtype: torch.dtype) -> tuple[Llama, Tokenizer, str]:
    """-> the model, its tokenizer, the folder of its base ('' from scratch)."""
    torch.manual_seed(args.seed)
    if args.model == "tiny":
        tokenizer = data.train_tokenizer([*dict.fromkeys([*d.titles, *d.texts])])
        c = Config(**TINY, vocab_size=tokenizer.get_vocab_size(), eos_token_id=0)
        return Llama(c, args.plan, args.dropout).init_weights().to(device), tokenizer, ""
    folder = find_model(args.model)
    # frozen weights can be stored in half precision; what is trained stays in single
    model = load(folder, args.plan, dtype if args.lora else torch.float32, args.dropout)
    if args.lora:  # drawn on the CPU, so that a seed means the same on every device
        add_lora(model, args.lora, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS)
    return model.to(device), data.read_tokenizer(folder), str(folder.resolve())


def find_model(name: str) -> Path:
    """A model's folder: a path, else NAME in $HATLLM_WEIGHTS or weights/, to which smollm2-135m is fetched."""
    root = Path(os.environ.get("HATLLM_WEIGHTS", "weights"))
    for folder in (Path(name), root / name):
        if (folder / "config.json").exists():
            return folder
    if name == "smollm2-135m":
        from extras import fetch

        return fetch.fetch(name, root)
    raise InputError(f"--model {name}: no config.json in {name} or {root / name}; known by name: tiny, smollm2-135m")


def make_config(run: Run) -> dict:
    """All that a run depends on: its flags, the constants of train.py and data.py, the data, the base."""
    named = {n: v for module in (data, sys.modules[__name__]) for n, v in vars(module).items() if n.isupper()}
    constants = {n: v for n, v in named.items() if isinstance(v, int | float | str | list | tuple | dict)}
    for name in ("PLAN", "PRESETS", "TIMES", "TARGET", "MOMENTS", "ROW", "LOSSES"):  # their values change no model
        del constants[name]
    source = Path(run.base) / "source.json"
    origin = read_json(source, {"holds": str})["holds"] if run.base and source.exists() else run.base
    return vars(run.args) | {
        "constants": json.loads(json.dumps(constants)),  # as JSON has it: a tuple is a list
        "masks": eval.mask_digest(run.model.plan),
        "data_folder": str(run.d.folder.resolve()),
        "digest": run.d.digest,
        "base": run.base,
        "base_source": origin,
        "base_digest": eval.fingerprint(run.base),
        "steps": run.steps,
    }


# --- The loop -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    forwards: list[Batch]  # of this process, on its device
    scale: float  # of their summed losses: 1 / target tokens of all processes
    tokens: int  # that this process reads


def get_batch(run: Run, step: int) -> Step:
    """What a step learns from. Every epoch is a permutation of its own, cut into steps; processes share a step."""
    order = np.random.default_rng((run.args.seed, step // run.per_epoch)).permutation(len(run.pool))
    chosen = order[step % run.per_epoch * run.args.batch :][: run.args.batch].tolist()
    mine = chosen[run.world.rank :: run.world.size]
    some = mine or chosen[:1]  # DDP needs a forward of every process
    run.coded |= {i: data.encode(run.cat, run.pool[i], run.trie_only) for i in some if i not in run.coded}
    n = data.n_title_tokens(run.cat, [run.pool[i] for i in chosen])
    return make_step(run, [run.coded[i] for i in some], 1 / n if mine else 0.0)


def make_step(run: Run, coded: list[dict], scale: float) -> Step:
    """Forwards of at most run.tokens tokens, longest first."""
    n = sum(len(c["tokens"]) for c in coded)
    coded = data.pack(coded, run.row) if run.pack else coded
    size = [round_up(len(c["tokens"]), run.row) for c in coded]
    parts = [[coded[i] for i in part] for part in data.batches(size, run.tokens)]
    return Step([data.collate(run.cat, part, run.row).to(run.device) for part in parts], scale, n)


def loss_of(run: Run, b: Batch) -> Tensor:
    """Sum of -log p over the target tokens of a batch. Logits are computed where there is a target only."""
    h = run.net(b.tokens, layout(b.item, b.branch, b.fork, b.places, b.start), rows=b.rows)
    return LOSSES[run.args.loss](run.model, run.trie, h, b, run.args.label_smoothing).sum()


def update(run: Run, step: int, batch: Step, lr: float) -> Tensor:
    """One step of the optimizer -> (2,): this process's part of the loss, which is a mean over all target tokens, and
    the gradient's norm. If that is not finite, the weights stay as they were. Nothing here waits for the device."""
    torch.manual_seed((run.args.seed * 1_000_003 + step) * 1009 + run.world.rank)  # dropout
    loss = torch.zeros((), device=run.device)
    for i, b in enumerate(batch.forwards, 1):
        run.net.require_backward_grad_sync = i == len(batch.forwards)  # DDP sums the gradients of processes once
        part = loss_of(run, b) * batch.scale
        (part * run.world.size).backward()  # DDP takes the mean over processes
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.params, CLIP)
    run.optimizer.found_inf = 1 - norm.isfinite().float()  # 1: AdamW leaves this update out, as for torch's GradScaler
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    return torch.stack((loss, norm))


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, the peak at its last step, then a cosine to a tenth of the peak at the very last."""
    rise, at = max(1, int(WARMUP * total)), step + 1
    if at <= rise:
        return peak * at / rise
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (at - rise) / (total - rise))))


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """NDCG@10, and nats per item: mean -log p of a target. Computed as eval.py does."""
    windows = eval.sample(run.d.valid, run.args.eval_limit or VALID_WINDOWS)
    decoder = eval.make_decoder(eval.frozen(run.model, run.dtype), run.cat, run.config)
    mine = windows[run.world.rank :: run.world.size]
    found = run.world.gather(eval.predict(decoder, run.cat, run.d, mine, eval.DEFAULTS))
    run.model.train()
    nll = float(np.mean([p["nll"] for p in found]))
    return {"valid_nll": nll, "valid_NDCG@10": eval.metrics(*eval.positions(found))["NDCG@10"]}


def train(run: Run) -> bool:
    """Trains to the last step -> True, or until it is asked to stop -> False. In out: best-STEP, the model with the
    best NDCG@10 on validation (nats decide between equals); metrics.jsonl, the log; step-STEP, where to go on."""
    state = {"step": 0, "losses": [], "seconds": 0.0, "log": []}
    if run.args.resume:
        state = load_step(run, state)
    first, before, tokens, recent, start = state["step"], state["seconds"], 0, [], time.time()
    off = run.world.rank > 0 or None  # None: where stderr is no terminal
    run.model.train()
    with stop_signals() as asked, tqdm(total=run.steps, initial=first, desc="train", unit="step", disable=off) as bar:
        batches = data.ahead(lambda i: get_batch(run, i), range(first, run.steps))
        for done, batch in enumerate(batches, first + 1):  # done: steps, with this one
            lr = learning_rate(done - 1, run.steps, run.args.lr)
            recent.append(update(run, done - 1, batch, lr))
            tokens += batch.tokens * run.world.size
            bar.update()
            due = done == run.steps or done % run.args.eval_every == 0
            stopped = asked and run.world.size == 1  # several processes must look together
            if not (due or stopped or done % run.look_every == 0):
                continue
            losses, stop = look(run, recent, bool(asked))
            state["losses"] += losses
            recent, last = [], state["losses"][-LOOK_EVERY:]
            loss = mean_of_finite(last)
            # lost: none of LOOK_EVERY is finite, or none in the last two stretches between validations
            lost_before = not state["log"] or math.isnan(state["log"][-1]["loss"])
            if math.isnan(loss) and (len(last) == LOOK_EVERY or (due and lost_before)):
                raise InputError(f"no loss is finite any more; what {run.out} holds is sound; a lower --lr may help")
            seconds = time.time() - start
            state |= {"step": done, "seconds": before + seconds}
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
            if due:
                log(run, state, {"lr": lr, "seconds": state["seconds"], "tokens/s": tokens / seconds})
                start = time.time() - seconds  # seconds and tokens/s are of the training alone
            if due or stop:  # a stop between two validations leaves no trace in the log, so that the end is the same
                save_step(run, state)
            if stop:
                return False
    return True


def look(run: Run, recent: list[Tensor], asked: bool) -> tuple[list[float], bool]:
    """Waits for the device. recent: what `update` returned -> the losses of these steps, NaN for an update that was
    left out; whether any process was asked to stop."""
    told = torch.stack([*recent, torch.full_like(recent[0], asked)])  # (n + 1, 2)
    run.world.sum_(told)
    *values, (asked, _) = told.tolist()
    found = [loss if math.isfinite(norm) else math.nan for loss, norm in values]
    if (lost := sum(map(math.isnan, found))) and run.world.rank == 0:
        tqdm.write(f"{lost} of the last {len(found)} updates had a loss or a gradient that is not finite: left out")
    return found, asked > 0


def mean_of_finite(losses: list[float]) -> float:
    """NaN where none is finite."""
    return float(np.mean([loss for loss in losses if math.isfinite(loss)] or [math.nan]))


def merit(line: dict) -> list[float]:
    """What the best validation has most of: NDCG@10, and among equals -nll."""
    return [line["valid_NDCG@10"], -line["valid_nll"]]


def log(run: Run, state: dict, speed: dict):
    """Validates; adds a line to state["log"] and to metrics.jsonl; saves the model if it is the best one."""
    line = {"step": state["step"], "loss": mean_of_finite(state["losses"])} | validate(run) | speed
    better = all(merit(line) > merit(old) for old in state["log"])
    state |= {"losses": [], "log": [*state["log"], line]}
    if run.world.rank == 0:
        found = f"validation NDCG@10 {line['valid_NDCG@10']:.4f}, {line['valid_nll']:.4f} nats per item"
        if better:
            save_best(run, line["step"])
        write_json(run.out / "metrics.jsonl", state["log"])  # all of it: a run that was killed logs no step twice
        tqdm.write(f"step {line['step']:6}  loss {line['loss']:.4f} per token  {found}" + "  best" * better)


@contextmanager
def stop_signals() -> Iterator[list]:
    """Ctrl-C and SIGTERM fill the list, so that the training ends after the step; a second Ctrl-C ends it at once."""
    asked = []

    def ask(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# --- Checkpoints: complete under their final name, or not there at all ----------------------------------------------


def write_folder(place: Path, write):
    """write(folder) into a folder beside place, everything on disk, then renamed to place."""
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        for file in [*part.iterdir(), part]:
            sync(file)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)
        sync(place.parent)  # before the caller removes what this folder replaces
    except Exception as e:  # a full disk reaches us as OSError or as safetensors' own error
        shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{place} could not be written ({e}); what was saved before is intact") from e


def sync(path: Path):
    """Waits until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def save_step(run: Run, state: dict):
    """Weights, optimizer and state.json in out/step-STEP. Older checkpoints go once the newer ones are complete."""
    names = {p: n for n, p in run.model.named_parameters() if p.requires_grad}

    def write(folder: Path):
        moments = {f"{names[p]}:{k}": v.contiguous() for p, s in run.optimizer.state.items() for k, v in s.items()}
        save_file({n: p.detach().contiguous() for p, n in names.items()}, folder / "weights.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        write_json(folder / "state.json", state)

    if run.world.rank == 0:
        write_folder(run.out / f"step-{state['step']:06d}", write)
        best = max(state["log"], key=merit, default=state)["step"]
        kept = f"step-{state['step']:06d}", f"best-{best:06d}"
        for p in run.out.iterdir():  # only what this program names so is its own, a save that was killed included
            if eval.CHECKPOINT.fullmatch(p.name.removesuffix(".part")) and p.name not in kept:
                shutil.rmtree(p, ignore_errors=True)
    run.world.barrier()


def load_step(run: Run, fresh: dict) -> dict:
    """The newest checkpoint's weights and optimizer; returns its state, which has the keys of fresh, or fresh."""
    place = newest(run.out, "step")
    if place is None:
        print(f"{run.out} holds no step-STEP, so it begins at step 0")
        return fresh
    state = read_json(place / "state.json", {name: type(value) for name, value in fresh.items()})
    if state["step"] < 0 or not all(isinstance(loss, float) for loss in state["losses"]):
        raise InputError(f"{place}/state.json: damaged; its step or its losses are no numbers that can be")
    own = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    shapes = {f"{n}:{k}": () if k == "step" else p.shape for n, p in own.items() for k in MOMENTS}
    files = {"weights": {n: p.shape for n, p in own.items()}, "optimizer": shapes}
    found = {name: read_safetensors(place / f"{name}.safetensors") for name in files}
    for name, expected in files.items():
        if {k: v.shape for k, v in found[name].items()} != expected:
            raise InputError(f"{place}/{name}.safetensors is not of the model that this run trains")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(found["weights"][name])
            run.optimizer.state[p] = {k: found["optimizer"][f"{name}:{k}"].to(p.device) for k in MOMENTS}
    return state


def save_best(run: Run, step: int):
    def write(folder: Path):
        save_lora(run.model, folder, run.base) if adapters(run.model) else save(run.model, folder)
        run.tokenizer.save(str(folder / "tokenizer.json"))

    write_folder(run.out / f"best-{step:06d}", write)


# --- The output folder ----------------------------------------------------------------------------------------------


def prepare_out(run: Run) -> int:
    """Makes the run's folder with its config.json, or finds that the one there is this run's -> its lock. Nothing that
    is there is ever deleted."""
    if run.args.resume:
        check_same(eval.read_run(run.out), run)
    elif run.out.exists() and any(run.out.iterdir()):
        raise InputError(f"{run.out} is not empty: --resume goes on with a run; else give another --out")
    run.out.mkdir(parents=True, exist_ok=True)
    held = lock(run.out)
    write_json(run.out / "config.json", run.config)
    return held


def lock(out: Path) -> int:
    """One run per folder -> what holds the lock until it is closed, or the process ends."""
    held = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another run is writing to {out}; wait for its end or choose another --out") from None
    return held


def check_same(old: dict, run: Run):
    """--resume goes on with the same run only. What may change: where things lie, how much fits into the memory,
    --compile."""
    free = "constants resume out data data_folder model base base_source tokens compile".split()
    usual = vars(make_parser().parse_args([]))  # a run may be older than a flag or a constant
    was, now = (usual | c | c["constants"] for c in (old, run.config))
    changed = [f"{n} was {was.get(n)}, now it is {v}" for n, v in now.items() if n not in free and was.get(n, v) != v]
    if changed:
        what = f"{'; '.join(changed)} (digest: the files of the data or base)"
        further = ". To train a finished model on: --model best-STEP --lora 0, the rest as it was"
        raise InputError(f"--resume: {what}. Flags need not be given again{'' if run.args.lora else further}")


# --- The command line -----------------------------------------------------------------------------------------------


def main(argv: list[str]) -> bool:
    return train_and_test(resolve(parse(argv)))


def train_and_test(args) -> bool:
    """-> whether the run came to its end."""
    run = Run(args)
    held = None
    if run.world.rank == 0:
        held = prepare_out(run)
        print_start(run)
    try:
        done = train(run)
        if done:
            test_best(run)
        elif run.world.rank == 0:
            print(f"stopped, nothing is lost; go on with: train.py --resume --out {run.args.out}")
    finally:
        if held is not None:
            os.close(held)
    return done


def print_start(run: Run):
    every, trained = (sum(p.numel() for p in params) for params in (run.model.parameters(), run.params))
    targets = sum(len(e.targets) for e in run.pool)
    print(f"{run.d.summary()}\nplan {' '.join(run.model.plan)}")
    print(f"{every:,} parameters, {trained:,} trained, on {run.device} in {str(run.dtype)[6:]}")
    learnt, passes = f"{targets:,} targets in {len(run.pool):,} examples", run.steps / run.per_epoch
    print(f"{learnt}, {run.steps:,} steps of {run.args.batch} ({passes:.1f} passes); {run.args.out}")


def test_best(run: Run):
    """The table at the end: the best checkpoint on the test split, beside popularity."""
    model, cat, d, c = eval.load_run(run.out, d=run.d)
    args = eval.make_parser().parse_args(["--limit", str(run.args.eval_limit)])
    eval.test(eval.make_decoder(model, cat, c), cat, d, args, run.out, run.world, c["base_source"])


if __name__ == "__main__":
    sys.exit(0 if eval.run_main(main) else 130)
