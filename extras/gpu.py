"""What this code has to show on a GPU, in one command for a card that is borrowed for minutes.

    python -m extras.gpu --out out/gpu             # every stage, 15 minutes at most; the same command goes on
    python -m extras.gpu --out /tmp/toy --toy      # the same on a CPU, with a tiny random model

The stages are processes with a time limit each: tests/test_cuda.py; parity; a profile, and training and decoding beside
transformers + peft, of SmolLM2-135M and of a Llama of 1B; the plain LLM, HatLLM's IN layers alone and its default plan
on beauty's 10-core, a seed at a time, while time is left. One that fails is noted, and the others go on. --out holds
gpu.md to read, gpu.json with all numbers, logs/, and what is large: models/, ablate/. Where there are no weights of
smollm2-135m, random ones of its shape stand in: speed is the same, and the last stages train `tiny` from scratch. No
network is needed.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
import train
from eval import Parser, device_and_dtype, number, run_main
from extras import bench
from hatllm import PLAN, InputError
from model import Config, Llama, read_json, save, write_json

SHAPES = {  # of random weights
    "random-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                        num_key_value_heads=3, vocab_size=49152),  # SmolLM2-135M
    "random-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                      num_key_value_heads=8, vocab_size=128256),  # Llama-3.2-1B
    "random-toy": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=4352),
}  # fmt: skip
CARD = {  # flags that fill a card of 80 GB; in the first rounds kernels are compiled
    "train random-135m": "--batch 256 --tokens 32768 --rounds 5",
    "train random-1b": "--batch 64 --tokens 4096 --rounds 5",
    "decode random-135m": "--users 16 --beams 20 --score trie --rounds 2",
    "decode random-1b": "--users 8 --beams 20 --score trie --rounds 2",
    "profile": "--dtype auto --lora 0 --batch 256",
    "plans": "--lora 0 --targets all --batch 128 --lr 3e-4 --epochs 8 --eval_every 132",
}
TOY = {  # flags that take no time
    "train random-toy": "--batch 4 --tokens 512 --rounds 2",
    "decode random-toy": "--users 2 --beams 2 --score trie",
    "profile": "--lora 0 --batch 4 --tokens 512",
    "plans": "--lora 0 --targets all --batch 4 --max_steps 2 --eval_every 2 --eval_limit 4 --dtype float32",
}
SEEDS = 3  # of the plans
GRACE = 30  # seconds to save a checkpoint in when the time is up
LINES = 30  # of a log that gpu.md shows, at most


def stages(args, models: dict[str, Path], real: bool) -> list[tuple[str, float, list]]:
    """(name, seconds at most, what follows python -m). models: a name in SHAPES -> the folder of such a model; real:
    the first has true weights."""
    flags = {name: text.split() for name, text in (TOY if args.toy else CARD).items()}
    first = next(iter(models.values()))
    out = [
        ("tests", 180, ["pytest", "-q", "-rfE", "tests/test_cuda.py"]),
        ("parity", 120, ["extras.bench", "parity", "--data", args.data, "--model", first]),
    ]
    for shape, folder in models.items():
        same, name = ["--data", args.data, "--model", folder], folder.name
        profile = ["extras.bench", "profile", *same, *flags["profile"]]
        out.append((f"profile {name}", 120, profile))
        if not args.toy:  # a CPU would compile for minutes
            out.append((f"profile {name}, compiled", 180, [*profile, "--compile"]))
        same += ["--dtype", "float32" if args.toy else "bfloat16"]
        for kind, rank in (("LoRA", 8), ("full", 0)):
            command = ["extras.bench", "train", *same, *flags[f"train {shape}"], "--lora", rank]
            out.append((f"train {name}, {kind}", 120, command))
        out.append((f"decode {name}", 180, ["extras.bench", "decode", *same, *flags[f"decode {shape}"]]))
    same = ["--data", args.data, "--model", first if real or args.toy else "tiny", "--plans", f"OR;IN:1/4 OR;{PLAN}"]
    same += ["--core", 10, "--split", "loo"] if args.data == "beauty" else []  # small enough for many passes
    same += ["--out", Path(args.out) / "ablate", *flags["plans"]]
    for seed in range(1 if args.toy else SEEDS):
        out.append((f"plans, seed {seed}", 1e9, ["extras.ablate", "run", *same, "--seeds", seed]))
    return out


def find_models(args) -> tuple[dict[str, Path], bool]:
    """What `stages` needs. Models that are not there are made."""
    places = [Path(args.model), Path(os.environ.get("HATLLM_WEIGHTS", "weights")) / args.model]
    base = None if args.toy else next((p for p in places if any(p.glob("*.safetensors"))), None)
    if not (base or args.toy or args.model == "smollm2-135m"):
        raise InputError(f"--model {args.model}: no *.safetensors in {places[0]} or {places[1]}")
    shapes = ["random-toy"] if args.toy else ["random-135m", "random-1b"]
    found = {shape: Path(args.out) / "models" / shape for shape in shapes} | ({shapes[0]: base} if base else {})
    tokenizer = data.read_tokenizer(base) if base else data.train_tokenizer(data.load(args.data).titles)
    for shape, folder in found.items():
        if not folder.exists():
            make_model(folder, SHAPES[shape], tokenizer)
    torch.cuda.empty_cache()  # the stages need the memory
    return found, base is not None


def make_model(folder: Path, shape: dict, tokenizer: data.Tokenizer):
    torch.manual_seed(0)
    with device_and_dtype("float32", True)[0]:  # a GPU draws a billion numbers at once
        model = Llama(Config(**shape, eos_token_id=0)).init_weights().to(torch.bfloat16)

    def write(place: Path):
        save(model, place)
        tokenizer.save(str(place / "tokenizer.json"))
        write_json(place / "source.json", {"holds": "random weights"})

    train.write_folder(folder, write)


def call(command: list[str], seconds: float, log: Path) -> int | None:
    """A process that writes to log -> its exit status, or None if its time was up: it is asked to stop, as by Ctrl-C,
    and is made to GRACE later."""
    with open(log, "w") as file:
        p = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return p.wait(seconds)
    except subprocess.TimeoutExpired:
        p.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # it, and what it started
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def run_stage(command: list[str], seconds: float, log: Path) -> dict:
    """What gpu.json keeps of a stage."""
    start = time.time()
    status = call([sys.executable, "-m", *command], seconds, log)
    seconds, lines = time.time() - start, log.read_text("utf-8", "replace").splitlines()
    result = next((json.loads(x) for x in reversed(lines) if x.startswith("{")), None) if status == 0 else None
    head = bench.here() | {"state": "out of time" if status is None else "failed" if status else "done"}
    last = [line for line in lines if not line.startswith("{")][-LINES:]
    return head | {"seconds": seconds, "command": command, "result": result, "last lines": last}


def run_all(args):
    """The stages that are not done yet; those that failed before come last."""
    os.environ["HATLLM_TEST_DEVICE"] = "cpu" if args.toy else "cuda"  # see tests/test_cuda.py
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that `call` ends the stage, too
    out, end = Path(args.out), time.time() + 60 * args.minutes - GRACE
    (out / "logs").mkdir(parents=True, exist_ok=True)
    done = read_json(out / "gpu.json") if (out / "gpu.json").exists() else {}
    for name, most, command in sorted(stages(args, *find_models(args)), key=lambda stage: stage[0] in done):
        command, left = [str(word) for word in command], end - time.time()
        if name in done and (done[name]["state"], done[name]["command"]) == ("done", command):
            print(f"{name}: done already", flush=True)
        elif left < 1:
            print(f"{name}: no time is left; the same command goes on from here", flush=True)
        else:
            done[name] = run_stage(command, min(most, left), out / "logs" / f"{train.slug(name)}.txt")
            print(f"{name}: {done[name]['state']}, {done[name]['seconds']:.0f} s", flush=True)
            write_json(out / "gpu.json", done)
            (out / "gpu.md").write_text(markdown(done), "utf-8")


def markdown(done: dict) -> str:
    text = "| stage | | seconds |\n|---|---|---|\n"
    text += "".join(f"| {name} | {s['state']} | {s['seconds']:.0f} |\n" for name, s in done.items())
    for name, s in done.items():
        text += f"\n## {name}: {s['state']}\n\n{s['machine']}, torch {s['torch']}, {s['date']}\n\n```\n"
        text += "\n".join([f"$ python -m {shlex.join(s['command'])}", *s["last lines"], "```", ""])
    return text


def make_parser() -> Parser:
    p = Parser(description=__doc__)
    add = p.add_argument
    add("--out", default="out/gpu", help="folder of all that is found (default: %(default)s)")
    add("--minutes", type=number(float, 0, 10**6), default=15.0, help="in all (default: 15)")
    add("--data", default="beauty", help="a preset or a folder (default: %(default)s)")
    add("--model", default="smollm2-135m", help="a name or a Hugging Face Llama folder (default: %(default)s)")
    add("--toy", action="store_true", help="a tiny random model and a few steps, to try the command out")
    return p


def main(argv: list[str]):
    run_all(make_parser().parse_args(argv))


if __name__ == "__main__":
    run_main(main)
