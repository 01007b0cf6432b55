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
from data import Batch, Catalogue, Example
from decode import Decoder, full_nll, trie_nll
from hatllm import PLAN, InputError, layout
from model import Config, Llama


@dataclass
class Flags:
    # what
    data: str = "ml-100k"  # data set: ml-100k, beauty, office, books, or the path of a folder
    data_dir: str = ""  # where data sets lie; else $HATLLM_DATA, else data/, to which presets are fetched
    split: str = "time"  # time: 8:1:1 by the target's time; loo: leave one out
    core: int = 5  # keep users and items with at least so many interactions; 0: all
    targets: str = "last"  # last: one target a window, the published recipe; all: every training item is a target
    share_history: bool = True  # under targets all, the targets of one history share one forward
    limit: int = 0  # train on so many windows only, drawn by the seed; 0: all
    model: str = "tiny"  # tiny: from scratch; smollm2-135m; or the path of a Hugging Face Llama folder
    plan: str = PLAN  # kinds of the layers, first to last: IN, OR, CR, IN-closed; OR alone is the plain LLM
    # how
    loss: str = "msl"  # lml: cross-entropy over the vocabulary; msl: over the tokens that continue some title
    tau: float = 1.0  # temperature of msl
    lora: int = 8  # rank of the adapters; 0: full fine-tuning, as always for tiny
    lora_alpha: float = 16  # adapters are scaled by lora_alpha / lora
    lora_dropout: float = 0.05  # on the input of the adapters
    lora_targets: str = "q_proj,v_proj"  # linear layers that get adapters
    lr: float = 0.0  # peak learning rate; 0: 1e-3 from scratch, 1e-4 for full fine-tuning, 3e-4 for LoRA
    epochs: float = 3.0  # passes over the training examples
    max_steps: int = 0  # stop the schedule after so many steps instead; 0: by epochs
    batch: int = 64  # examples in a step, whatever the hardware
    warmup: float = 0.05  # share of the steps in which the learning rate rises; then it falls as a cosine to a tenth
    weight_decay: float = 0.01  # on matrices
    clip: float = 1.0  # norm of the gradient at most
    seed: int = 0  # of the initial weights, the order of the examples, dropout
    # hardware
    tokens: int = 8192  # tokens in a forward, padding included: less needs less memory, the result is the same
    dtype: str = "auto"  # float32, bfloat16 (autocast), or auto: bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile each block
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    # output
    out: str = ""  # folder of the run; default out/DATA-MODEL
    eval_every: int = 200  # steps between two validations, each with a checkpoint
    valid_limit: int = 1000  # windows in a validation, drawn by a fixed seed
    test_limit: int = 0  # test windows in the table at the end; 0: all
    resume: bool = False  # go on from the last checkpoint in the output folder
    overwrite: bool = False  # replace the output folder


TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s, for MFU


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of the loop


def build(f: Flags, titles: list[str], device: torch.device, dtype: torch.dtype) -> tuple[Llama, data.Tokenizer, str]:
    """The model to be trained, on device; its tokenizer; the folder of its base ('' from scratch)."""
    torch.manual_seed(f.seed)
    if f.model == "tiny":
        tokenizer = data.train_tokenizer(titles)
        model = Llama(Config(**TINY, vocab_size=tokenizer.get_vocab_size()), f.plan).init_weights()
        return model.to(device), tokenizer, ""
    folder = Path(f.model)
    if not (folder / "config.json").exists():
        root = Path(os.environ.get("HATLLM_WEIGHTS", "weights"))
        choose(
            "model", f.model, ("tiny", "smollm2-135m", f.model if (root / f.model / "config.json").exists() else "tiny")
        )
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
    """Linear warm-up, then a cosine to a tenth of the peak."""
    rise = max(1, int(f.warmup * total))
    if step < rise:
        return f.lr * (step + 1) / rise
    return f.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))))


class Trainer:
    """What a step needs: the model and its optimizer, how it computes, who else computes."""

    def __init__(self, f: Flags, model: Llama, cat: Catalogue, world: World, device: torch.device, dtype: torch.dtype):
        self.f, self.model, self.cat, self.world, self.device, self.dtype = f, model, cat, world, device, dtype
        self.params = [p for p in model.parameters() if p.requires_grad]
        flat = [p for p in self.params if p.dim() == 1]
        groups = [dict(params=[p for p in self.params if p.dim() > 1], weight_decay=f.weight_decay)]
        groups += [dict(params=flat, weight_decay=0.0)] if flat else []
        self.optimizer = torch.optim.AdamW(groups, lr=f.lr, betas=(0.9, 0.95), fused=True)

    def nll(self, b: Batch) -> Tensor:
        """Sum of -log p over the target tokens of a batch; rows of logits are computed where there is a target only."""
        b, f, amp = b.to(self.device), self.f, self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=amp):
            h = self.model(b.tokens, layout(b.item, b.branch, b.fork)).flatten(0, 1)[b.rows]
            if f.loss == "msl":
                return trie_nll(self.model, self.cat.trie, h, b.node, b.next, f.tau).sum()
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
        if not math.isfinite(loss):
            return float(loss), False
        torch.nn.utils.clip_grad_norm_(self.params, self.f.clip)
        for g in self.optimizer.param_groups:
            g["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), bool(stop)

    @torch.no_grad()
    def validate(self, examples: list[Example]) -> float:
        """Mean -log p of a target, in nats per item."""
        self.model.eval()
        total = torch.zeros(1, device=self.device)
        for b in self.shard(examples)[0]:
            total += self.nll(b)
        self.world.sum_([total])
        self.model.train()
        return float(total) / max(1, len(examples))


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


def load_step(out: Path, model: Llama, optimizer, device) -> dict:
    """The last checkpoint's weights and optimizer; returns its state.json."""
    place = newest(out, "step")
    if place is None:
        raise InputError(f"--resume: {out} has no checkpoint; start without --resume (and with --overwrite)")
    try:
        state = json.loads((place / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise InputError(f"{place}/state.json: damaged ({e}); remove {place} to resume from an older one") from None
    tensors = llama.read_safetensors(place / "weights.safetensors")
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if {n: v.shape for n, v in tensors.items()} != {n: p.shape for n, p in own.items()}:
        raise InputError(f"{place}/weights.safetensors does not hold the weights that this run trains")
    moments = llama.read_safetensors(place / "optimizer.safetensors")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])
            if any(k.startswith(name + ":") for k in moments):
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[p] = {k: moments[f"{name}:{k}"].to("cpu" if k == "step" else device) for k in keys}
    return state


def save_best(out: Path, step: int, model: Llama, tokenizer, base: str):
    def write(folder: Path):
        llama.save_lora(model, folder, base) if base and any(
            map(llama.peft_name, dict(model.named_parameters()))
        ) else llama.save(model, folder)
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
    """Ctrl-C and SIGTERM end the run after the step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare_out(f: Flags, out: Path, config: dict):
    """Makes the run's folder with its config.json, or finds that the one there is this run's. Nothing is replaced."""
    path = out / "config.json"
    if f.resume and path.exists():
        old = json.loads(path.read_text())
        free = ("resume", "overwrite", "out", "test_limit", "data_dir", "base", "tokens")
        for name in [n for n in config if n not in free and old.get(n) != config[n]]:
            what = (
                f"--{name} was {old.get(name)}, now it is {config[name]}"
                if name != "digest"
                else "the data has changed"
            )
            raise InputError(f"--resume: {what}; give the command that began {out}, or choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        if not f.overwrite:
            raise InputError(
                f"{out} exists: --resume goes on with it, --overwrite replaces it, --out chooses another folder"
            )
        if not path.exists():
            raise InputError(f"--overwrite: {out} is no run of train.py (it has no config.json), so it is left alone")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def train(f: Flags, t: Trainer, pool: list[Example], valid: list[Example], tokenizer, base: str, out: Path):
    """Trains to the last step. The best model by validation lies in out/best-STEP, the log in out/metrics.jsonl."""
    total = f.max_steps or max(1, math.ceil(f.epochs * math.ceil(len(pool) / f.batch)))
    state = {"step": 0, "best": math.inf, "best_step": 0}
    if f.resume and newest(out, "step"):
        state = load_step(out, t.model, t.optimizer, t.device)
    lead, stop, losses, tokens, targets, start = t.world.rank == 0, Stop(), [], 0, 0, time.time()
    bar = tqdm(
        total=total, initial=state["step"], desc="train", unit="step", disable=not (lead and sys.stderr.isatty())
    )
    t.model.train()
    for step in range(state["step"], total):
        at = step_examples(pool, step, f)
        chosen = [pool[i] for i in at]
        lr = learning_rate(step, total, f)
        loss, asked = t.step(chosen, lr, (f.seed * 1_000_003 + step) * 1009 + t.world.rank, stop.asked)
        if not math.isfinite(loss):
            good = newest(out, "step")
            raise InputError(
                f"the loss became {loss} at step {step}, on the training examples {at.tolist()}; the last good checkpoint "
                f"is {good.name if good else 'none'} in {out}; a lower --lr may help"
            )
        losses, tokens, targets = [*losses, loss], tokens + t.fed, targets + sum(len(e.targets) for e in chosen)
        speed = tokens / (time.time() - start)
        bar.update()
        bar.set_postfix_str(f"loss {np.mean(losses[-50:]):.3f}, {speed:,.0f} tokens/s{mfu(t, speed)}")
        if asked or step + 1 == total or (step + 1) % f.eval_every == 0:
            line = {"step": step + 1, "loss": float(np.mean(losses)), "valid_nll": t.validate(valid), "lr": lr,
                    "seconds": time.time() - start, "tokens/s": speed, "targets": targets}  # fmt: skip
            losses = []
            checkpoint(out, t, line, state, tokenizer, base, bar)
            if asked:
                raise InputError(
                    f"stopped after step {step + 1}, nothing is lost; go on with --resume and the same command"
                )
    bar.close()


def checkpoint(out: Path, t: Trainer, line: dict, state: dict, tokenizer, base: str, bar):
    """After a validation: the log, the best model if this is it, the state to resume from; then the older ones go."""
    step, better = line["step"], line["valid_nll"] < state["best"]
    if better:
        state |= {"best": line["valid_nll"], "best_step": step}
    if t.world.rank == 0:
        bar.write(f"step {step:6}  loss {line['loss']:.4f} per token  validation {line['valid_nll']:.4f} per item"
                  + ("  best" if better else ""))  # fmt: skip
        if better:
            save_best(out, step, t.model, tokenizer, base)
        save_step(out, step, t.model, t.optimizer, state | {"log": line})
        prune(out, state["best_step"], step)
        with open(out / "metrics.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
    t.world.barrier()


def mfu(t: Trainer, tokens_per_second: float) -> str:
    """Model FLOP/s over the card's peak, where it is known: 6 per weight and token, 4 where the base is frozen."""
    card = torch.cuda.get_device_name() if t.device.type == "cuda" else ""
    peak = next((v for name, v in PEAK.items() if name in card), None)
    if peak is None:
        return ""
    weights = sum(p.numel() for p in t.model.parameters()) - t.model.embed_tokens.weight.numel()
    return f", MFU {(4 if t.f.lora else 6) * weights * tokens_per_second / t.world.size / peak:.1%}"


def main(argv: list[str]):
    f = parse_flags(Flags, argv, __doc__)
    for name, known in (("loss", ("lml", "msl")), ("targets", ("last", "all")), ("split", ("time", "loo"))):
        choose(name, getattr(f, name), known)
    for name in ("batch", "tokens", "eval_every", "valid_limit", "tau", "clip"):
        if getattr(f, name) <= 0:
            raise InputError(f"--{name} must be above 0, not {getattr(f, name)}")
    f.lora = 0 if f.model == "tiny" else f.lora
    f.lr = f.lr or (1e-3 if f.model == "tiny" else 3e-4 if f.lora else 1e-4)
    world, (device, dtype) = World(), device_and_dtype(f.dtype)
    d = data.load(f.data, f.data_dir, f.split, f.core)
    model, tokenizer, base = build(f, d.titles, device, dtype)
    cat = Catalogue(d.titles, tokenizer, model.config.eos_token_id)
    cat.trie.to(device)
    out = Path(f.out or f"out/{d.name}-{Path(f.model).name}")
    if world.rank == 0:
        prepare_out(f, out, vars(f) | {"base": base, "digest": d.digest()})
    world.barrier()
    model.checkpointing = f.checkpointing
    for block in model.layers if f.compile else ():
        block.compile(dynamic=True)
    pool = data.examples(d, f.targets, f.share_history)
    if f.limit:
        pool = [pool[i] for i in np.random.default_rng(f.seed).permutation(len(pool))[: f.limit]]
    few = np.sort(np.random.default_rng(0).permutation(len(d.valid))[: f.valid_limit])
    t = Trainer(f, model, cat, world, device, dtype)
    if world.rank == 0:
        sizes = (
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in t.params):,} trained"
        )
        print(f"{d.summary()}\nplan {' '.join(model.plan)}\n{sizes}, on {device} in {str(dtype)[6:]}; "
              f"{sum(len(e.targets) for e in pool):,} targets in {len(pool):,} examples")  # fmt: skip
    train(f, t, pool, data.window_examples(d.valid[few]), tokenizer, base, out)
    test(f, out, world, device, dtype)


def test(f: Flags, out: Path, world: World, device, dtype):
    """The table at the end: the best checkpoint on the test split, beside popularity."""
    model, cat, d, config = evaluation.load_run(out, device, dtype)
    decoder = Decoder(model, cat.trie, tau=config["tau"] if config["loss"] == "msl" else 1.0)
    evaluation.test(decoder, cat, d, evaluation.Flags(out=str(out), limit=f.test_limit), out, world)


if __name__ == "__main__":
    run(main)
