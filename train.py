"""Trains a Llama with HatLLM's masks to write the title of what a user buys next.

    python train.py                                            # MovieLens-100K, a tiny Llama from scratch: minutes
    python train.py --data beauty --model smollm2-135m         # LoRA on SmolLM2-135M
    python train.py --data beauty --plan OR                    # the plain LLM, to compare with
    torchrun --nproc_per_node=8 train.py --data beauty --model path/to/Llama-3.2-1B

Everything random depends on the seed and the step alone, so a run can stop anywhere and resume to the same end, and a
CPU run repeats bit by bit. Shapes as in model.py.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
import eval as evaluation
import fetch
import model as llama
from common import World, choose, device_and_dtype, newest, parse_flags, run, write_folder, write_json
from data import Batch, Catalogue, Example, Windows
from decode import full_nll, trie_nll
from hatllm import PLAN, InputError, layout
from model import Config, Llama


@dataclass
class Flags:
    # what
    data: str = "ml-100k"  # data set: ml-100k, beauty, office, books, or the path of a folder
    data_dir: str = ""  # where data sets lie; else $HATLLM_DATA, else data/, to which presets are fetched
    split: str = "time"  # time: 8:1:1 by the target's time; loo: leave one out
    core: int = 5  # keep users and items with at least so many interactions; 0: all
    targets: str = "auto"  # last: one a window, the published recipe; all: every training item; auto: all for tiny
    share_history: bool = True  # under targets all, the targets of one history share one forward
    limit: int = 0  # train on so many examples only, the same for every seed; 0: all
    model: str = "tiny"  # tiny: from scratch; smollm2-135m; or the path of a Hugging Face Llama folder
    plan: str = PLAN  # kinds of the layers, first to last: IN, OR, CR, IN-closed; OR alone is the plain LLM
    # how
    loss: str = "msl"  # lml: cross-entropy over the vocabulary; msl: over the tokens that continue some title
    tau: float = 1.0  # temperature of msl
    dropout: float = 0.0  # tiny: on the embeddings and on both branches of every block
    lora: int = 8  # rank of the adapters; 0: full fine-tuning, as always for tiny
    lora_alpha: float = 16  # adapters are scaled by lora_alpha / lora
    lora_dropout: float = 0.05  # on the input of the adapters
    lora_targets: str = "q_proj,v_proj"  # linear layers that get adapters
    lr: float = 0.0  # peak learning rate; 0: 1e-3 from scratch, 1e-4 for full fine-tuning, 3e-4 for LoRA
    max_steps: int = 1600  # steps of the schedule
    epochs: float = 0.0  # passes over the training examples, instead of max_steps; 0: max_steps counts
    batch: int = 16  # examples in a step, whatever the hardware
    warmup: float = 0.05  # share of the steps in which the learning rate rises; then it falls as a cosine to a tenth
    weight_decay: float = 0.01  # on matrices
    clip: float = 1.0  # norm of the gradient at most
    seed: int = 0  # of the initial weights, the order of the examples, dropout
    # hardware
    tokens: int = 0  # in a forward, padding included: less needs less memory; 0: 8192 on a GPU, 2048 on a CPU
    dtype: str = "auto"  # float32, bfloat16 (autocast), or auto: bfloat16 where it is faster; tiny: on a GPU only
    compile: bool = False  # torch.compile each block
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    # output
    out: str = ""  # folder of the run; default out/DATA-MODEL
    eval_every: int = 400  # steps between two validations, each with a checkpoint
    valid_limit: int = 2000  # windows in a validation, drawn by a fixed seed: with few, the choice of the best is noise
    test_limit: int = 0  # test windows in the table at the end; 0: all
    resume: bool = False  # go on from the last checkpoint in the output folder
    overwrite: bool = False  # replace the output folder


TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for a parameter
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s, for MFU


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of the loop


def build(f: Flags, titles: list[str], device: torch.device, dtype: torch.dtype) -> tuple[Llama, data.Tokenizer, str]:
    """The model to be trained, on device; its tokenizer; the folder of its base ('' from scratch)."""
    torch.manual_seed(f.seed)
    if f.model == "tiny":
        tokenizer = data.train_tokenizer(titles)
        model = Llama(Config(**TINY, vocab_size=tokenizer.get_vocab_size()), f.plan, f.dropout).init_weights()
        return model.to(device), tokenizer, ""
    root = Path(os.environ.get("HATLLM_WEIGHTS", "weights"))
    folder = next((p for p in (Path(f.model), root / f.model) if (p / "config.json").exists()), None)
    if folder is None:
        choose("model", f.model, ("tiny", "smollm2-135m", "the path of a folder with config.json"))
        folder = fetch.weights(f.model, root)
    # frozen weights can be stored in half precision; what is trained stays in single
    model = llama.load(folder, f.plan, dtype if f.lora else torch.float32).to(device)
    if f.lora:
        llama.add_lora(model, f.lora, f.lora_alpha, f.lora_dropout, f.lora_targets).to(device)
    return model, data.read_tokenizer(folder), str(folder)


def micro_batches(coded: list[dict], budget: int) -> list[Batch]:
    """Forwards of at most budget tokens, longest first; the sum of their losses is the loss of all."""
    return [
        data.collate([coded[i] for i in at]) for at in evaluation.batches([len(c["tokens"]) for c in coded], budget)
    ]


def step_examples(pool: list[Example], step: int, f: Flags) -> np.ndarray:
    """The indices of a step's examples: every epoch is a permutation of its own, cut into steps."""
    per_epoch = math.ceil(len(pool) / f.batch)
    order = np.random.default_rng((f.seed, step // per_epoch)).permutation(len(pool))
    return order[step % per_epoch * f.batch :][: f.batch]


def learning_rate(step: int, total: int, f: Flags) -> float:
    """Linear warm-up, the peak at its last step, then a cosine to a tenth of the peak at the very last."""
    rise, at = max(1, int(f.warmup * total)), step + 1
    if at <= rise:
        return f.lr * at / rise
    return f.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (at - rise) / (total - rise))))


class Trainer:
    """What a step needs: the model and its optimizer, how it computes, who else computes."""

    def __init__(self, f: Flags, model: Llama, cat: Catalogue, world: World, device: torch.device, dtype: torch.dtype):
        self.f, self.model, self.cat, self.world, self.device, self.dtype = f, model, cat, world, device, dtype
        self.trie, self.params = cat.trie.to(device), [p for p in model.parameters() if p.requires_grad]
        flat = [p for p in self.params if p.dim() == 1]
        groups = [dict(params=[p for p in self.params if p.dim() > 1], weight_decay=f.weight_decay)]
        groups += [dict(params=flat, weight_decay=0.0)] if flat else []
        self.optimizer = torch.optim.AdamW(groups, lr=f.lr, betas=(0.9, 0.95), fused=True)

    def nll(self, b: Batch) -> Tensor:
        """Sum of -log p over the target tokens of a batch; rows of logits are computed where there is a target only."""
        b, f, amp = b.to(self.device), self.f, self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=amp):
            h = self.model(b.tokens, layout(b.item, b.branch, b.fork), rows=b.rows)
            if f.loss == "msl":
                return trie_nll(self.model, self.trie, h, b.node, b.next, f.tau).sum()
            return full_nll(self.model, h, b.next).sum()

    def shard(self, examples: list[Example]) -> tuple[list[Batch], int]:
        """This process's forwards, and the number of target tokens of all processes."""
        coded = [data.encode(self.cat, e, self.f.loss == "msl") for e in examples]
        self.fed = sum(len(c["tokens"]) for c in coded)
        mine = coded[self.world.rank :: self.world.size]
        return micro_batches(mine, self.f.tokens), sum(c["n_tokens"] for c in coded)

    def step(self, examples: list[Example], lr: float, seed: int, asked: bool) -> tuple[float, bool]:
        """One update -> the loss, a mean over all target tokens of the step, and whether any process should stop."""
        torch.manual_seed(seed)  # dropout
        loss = torch.zeros(1, device=self.device)
        batches, n_tokens = self.shard(examples)
        for b in batches:
            nll = self.nll(b) / n_tokens
            nll.backward()
            loss += nll.detach()
        for p in self.params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        stop = torch.tensor([float(asked)], device=self.device)
        self.world.sum_([p.grad for p in self.params] + [loss, stop])
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.f.clip)
        if not math.isfinite(loss + norm):  # a finite loss may have a gradient that would make the weights NaN
            return float(loss + norm), False
        for g in self.optimizer.param_groups:
            g["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), bool(stop)

    @torch.no_grad()
    def validate(self, windows: Windows) -> dict[str, float]:
        """valid_nll: mean -log p of a target, in nats per item; and NDCG@10 of a beam search."""
        self.model.eval()
        total, decoder = torch.zeros(1, device=self.device), evaluation.make_decoder(self.model, self.cat, vars(self.f))
        for b in self.shard(data.window_examples(windows))[0]:
            total += self.nll(b)
        self.world.sum_([total])
        flags = evaluation.Flags(exact=False)
        found = evaluation.evaluate(decoder, self.cat, windows[self.world.rank :: self.world.size], flags)
        found = evaluation.metrics(*evaluation.positions(self.world.gather(found)))
        self.model.train()
        return {"valid_nll": float(total) / max(1, len(windows)), "valid_NDCG@10": found["NDCG@10"]}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: complete under their final name, or not there at all


def save_step(out: Path, step: int, model: Llama, optimizer, state: dict):
    names = {p: n for n, p in model.named_parameters()}
    moments = {f"{names[p]}:{k}": v.contiguous() for p, s in optimizer.state.items() for k, v in s.items()}
    weights = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}

    def write(folder: Path):
        save_file(weights, folder / "weights.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(state | {"step": step}))

    write_folder(out / f"step-{step:06d}", write)


def load_step(place: Path, model: Llama, optimizer, fresh: dict) -> dict:
    """A checkpoint's weights and optimizer; returns its state.json, which has the keys of fresh."""
    try:
        state = json.loads((place / "state.json").read_text())
        if not isinstance(state, dict) or state.keys() != fresh.keys():
            raise ValueError(f"its keys are not {', '.join(fresh)}")
    except (OSError, ValueError) as e:
        raise InputError(f"{place}/state.json: damaged ({e}); --overwrite starts again") from None
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {f"{n}:{k}": p.shape[: p.dim() * (k != "step")] for n, p in own.items() for k in MOMENTS}
    files = {"weights": {n: p.shape for n, p in own.items()}, "optimizer": shapes}
    found = {name: llama.read_safetensors(place / f"{name}.safetensors") for name in files}
    for name, expected in files.items():
        if {k: v.shape for k, v in found[name].items()} != expected:
            raise InputError(f"{place}/{name}.safetensors is not of the model that this run trains")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(found["weights"][name])
            optimizer.state[p] = {k: found["optimizer"][f"{name}:{k}"].to(p.device) for k in MOMENTS}
    return state


def save_best(out: Path, step: int, model: Llama, tokenizer, base: str):
    def write(folder: Path):
        adapters = any(map(llama.peft_name, dict(model.named_parameters())))
        llama.save_lora(model, folder, base) if adapters else llama.save(model, folder)
        tokenizer.save(str(folder / "tokenizer.json"))

    write_folder(out / f"best-{step:06d}", write)


def prune(out: Path, best_step: int, step: int):
    """Older checkpoints go once the newer ones are complete."""
    for p in [*out.glob("step-*"), *out.glob("best-*")]:
        if p.name not in (f"step-{step:06d}", f"best-{best_step:06d}"):
            shutil.rmtree(p, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Stop:
    """Ctrl-C and SIGTERM end the training after the step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __enter__(self) -> "Stop":
        self.asked, self.old = False, {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def read_config(out: Path) -> dict:
    """config.json of a run; {} where there is none, or one of something else: a model's folder has one too."""
    try:
        config = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and "digest" in config else {}


def prepare_out(f: Flags, out: Path, config: dict):
    """Makes the run's folder with its config.json, or finds that the one there is this run's. Nothing is replaced."""
    old = read_config(out)
    if f.resume and old:
        free = ("resume", "overwrite", "out", "test_limit", "data_dir", "base", "tokens", "checkpointing")
        for name in [n for n in config if n not in free and old.get(n) != config[n]]:
            what = f"--{name} was {old.get(name)}, now it is {config[name]}"
            what = "the data has changed" if name == "digest" else what
            raise InputError(f"--resume: {what}; give the command that began {out}, or choose another --out")
        return
    if out.exists() and [p for p in out.iterdir() if p.suffix != ".part"]:  # .part: killed before it began
        if not old:
            raise InputError(f"{out} exists and is no run of train.py, so it is left alone; choose another --out")
        if not f.overwrite:
            raise InputError(
                f"{out} exists: --resume goes on with it, --overwrite replaces it, or choose another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)


def train(f: Flags, t: Trainer, pool: list[Example], valid: Windows, tokenizer, base: str, out: Path):
    """Trains to the last step. The model with the best NDCG@10 on validation (the nll decides between equals) lies in
    out/best-STEP, the log in out/metrics.jsonl."""
    total = math.ceil(f.epochs * math.ceil(len(pool) / f.batch)) or f.max_steps
    state = {"step": 0, "best": [-1.0, 0.0], "best_step": 0, "losses": [], "targets": 0, "seconds": 0.0, "log": []}
    if f.resume and newest(out, "step"):
        state = load_step(newest(out, "step"), t.model, t.optimizer, state)
    lead, tokens, start, before = t.world.rank == 0, 0, time.time(), state["seconds"]
    bar = tqdm(total=total, initial=state["step"], desc="train", unit="step",
               disable=not (lead and sys.stderr.isatty()))  # fmt: skip
    t.model.train()
    with Stop() as stop, bar:
        for step in range(state["step"], total):
            at = step_examples(pool, step, f)
            chosen = [pool[i] for i in at]
            lr = learning_rate(step, total, f)
            try:
                loss, asked = t.step(chosen, lr, (f.seed * 1_000_003 + step) * 1009 + t.world.rank, stop.asked)
            except torch.OutOfMemoryError:
                raise InputError(
                    f"step {step} does not fit into the memory; lower --tokens (now {f.tokens}) or add --checkpointing "
                    "to the same command with --resume: they change no number"
                ) from None
            if not math.isfinite(loss):
                good = newest(out, "step")
                raise InputError(
                    f"the loss or its gradient became {loss} at step {step}, on the training examples {at.tolist()}; "
                    f"the last good checkpoint is {good.name if good else 'none'} in {out}; a lower --lr may help"
                )
            tokens, seconds = tokens + t.fed, time.time() - start
            state |= {"step": step + 1, "losses": [*state["losses"], loss], "seconds": before + seconds,
                      "targets": state["targets"] + sum(len(e.targets) for e in chosen)}  # fmt: skip
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(state['losses'][-50:]):.3f}, "
                                f"{tokens / seconds:,.0f} tokens/s{mfu(t, tokens / seconds)}")  # fmt: skip
            due = step + 1 == total or (step + 1) % f.eval_every == 0
            if due:
                since = time.time()
                line = {"step": step + 1, "loss": float(np.mean(state["losses"]))} | t.validate(valid)
                start += time.time() - since  # tokens/s and seconds are of the training alone
                line |= {"lr": lr, "seconds": state["seconds"], "tokens/s": tokens / seconds,
                         "targets": state["targets"]}  # fmt: skip
                log(out, t, line, state, tokenizer, base)
            if due or asked:  # a stop between two validations leaves no trace in the log, so that the end is the same
                if lead:
                    save_step(out, step + 1, t.model, t.optimizer, state)
                    prune(out, state["best_step"], step + 1)
                t.world.barrier()
            if asked:
                raise InputError(f"stopped after step {step + 1}, nothing is lost; "
                                 "go on with --resume and the same command")  # fmt: skip


def merit(line: dict) -> list[float]:
    """What the best validation has most of: NDCG@10, and among equals -nll."""
    return [line["valid_NDCG@10"], -line["valid_nll"]]


def log(out: Path, t: Trainer, line: dict, state: dict, tokenizer, base: str):
    """After a validation: a line in the log, and the best model if this is it."""
    score = merit(line)
    better = score > state["best"]
    state |= {"losses": [], "log": [*state["log"], line]}
    if better:
        state |= {"best": score, "best_step": line["step"]}
    if t.world.rank == 0:
        tqdm.write(f"step {line['step']:6}  loss {line['loss']:.4f} per token  validation NDCG@10 {score[0]:.4f}, "
                   f"{line['valid_nll']:.4f} nats per item" + ("  best" if better else ""))  # fmt: skip
        if better:
            save_best(out, line["step"], t.model, tokenizer, base)
        write_json(out / "metrics.jsonl", state["log"])  # all of it: a run that was killed logs no step twice


def mfu(t: Trainer, tokens_per_second: float) -> str:
    """Model FLOP/s over the card's peak, where it is known: 6 per weight and token, 4 where the base is frozen."""
    card = torch.cuda.get_device_name() if t.device.type == "cuda" else ""
    peak = next((v for name, v in PEAK.items() if name in card), None)
    if peak is None:
        return ""
    weights = sum(p.numel() for p in t.model.parameters()) - t.model.embed_tokens.weight.numel()
    return f", MFU {(4 if t.f.lora else 6) * weights * tokens_per_second / t.world.size / peak:.1%}"


def resolve(f: Flags) -> Flags:
    """Fills in the defaults that depend on the model and on the machine."""
    tiny = f.model == "tiny"
    f.lora = 0 if tiny else f.lora
    f.targets = f.targets if f.targets != "auto" else "all" if tiny else "last"
    f.tokens = f.tokens or (8192 if torch.cuda.is_available() else 2048)  # a CPU likes forwards of one length better
    f.lr = f.lr or (1e-3 if tiny else 3e-4 if f.lora else 1e-4)
    return f


def main(argv: list[str]):
    f = parse_flags(Flags, argv, __doc__)
    for name, known in (("loss", ("lml", "msl")), ("targets", ("auto", "last", "all")), ("split", ("time", "loo"))):
        choose(name, getattr(f, name), known)
    for name in ("batch", "eval_every", "valid_limit", "tau", "clip", "max_steps"):
        if not getattr(f, name) > 0:
            raise InputError(f"--{name} must be above 0, not {getattr(f, name)}")
    for name in ("core", "tokens", "limit", "test_limit", "epochs", "lora", "lr", "weight_decay", "seed"):
        if not getattr(f, name) >= 0:
            raise InputError(f"--{name} must not be below 0, but is {getattr(f, name)}")
    for name in ("warmup", "dropout", "lora_dropout"):
        if not 0 <= getattr(f, name) < 1:
            raise InputError(f"--{name} is a share, from 0 to below 1, not {getattr(f, name)}")
    resolve(f)
    world, (device, dtype) = World(), device_and_dtype(f.dtype, f.model)
    d = data.load(f.data, f.data_dir, f.split, f.core)
    model, tokenizer, base = build(f, d.titles, device, dtype)
    cat = Catalogue(d.titles, tokenizer, model.config.eos_token_id)
    pool = data.examples(d, f.targets, f.share_history)
    if f.limit:
        pool = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))[: f.limit]]
    few = np.sort(np.random.default_rng(0).permutation(len(d.valid))[: f.valid_limit])
    if not (pool and len(few) and len(d.test)):
        raise InputError(f"{d.summary()}: each needs at least one; give more users")
    out = Path(f.out or f"out/{d.name}-{Path(f.model).name}")
    if world.rank == 0:
        prepare_out(f, out, vars(f) | {"base": base, "digest": d.digest()})
    world.barrier()
    model.checkpointing = f.checkpointing
    for block in model.layers if f.compile else ():
        block.compiled = torch.compile(block.compute, dynamic=True)
    t = Trainer(f, model, cat, world, device, dtype)
    if world.rank == 0:
        sizes = (
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in t.params):,} trained"
        )
        print(f"{d.summary()}\nplan {' '.join(model.plan)}\n{sizes}, on {device} in {str(dtype)[6:]}; "
              f"{sum(len(e.targets) for e in pool):,} targets in {len(pool):,} examples")  # fmt: skip
    train(f, t, pool, d.valid[few], tokenizer, base, out)
    test(f, out, world)


def test(f: Flags, out: Path, world: World):
    """The table at the end: the best checkpoint on the test split, beside popularity."""
    model, cat, d, config = evaluation.load_run(out, f.dtype)
    flags = evaluation.Flags(out=str(out), limit=f.test_limit)
    evaluation.test(evaluation.make_decoder(model, cat, config), cat, d, flags, out, world)


if __name__ == "__main__":
    run(main)
