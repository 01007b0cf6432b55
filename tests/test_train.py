"""train.py: a run that repeats, stops, is killed and resumes to the same bits; that computes the same however it is cut
into forwards and processes; and that loses nothing when the disk, the data or the user fails it. Children are forks of
this process: importing torch anew costs seconds."""

import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, refuses, spread
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import hatllm
import model as llama
import train
from data import Example
from eval import newest
from hatllm import TARGET, layout
from model import Config, Llama

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
FREE = ("seconds", "tokens/s", "users/s", "out", "resume")  # what two equal runs may differ in


@pytest.fixture(scope="module", autouse=True)
def small_and_single():
    """One thread: bits must not depend on how a sum is split, and a fork may not use its parent's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TINY", SMALL)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield
    torch.set_num_threads(threads)


def write_data(folder: Path, users: int = 60, seed: int = 0) -> Path:
    """40 items with titles that share beginnings, two with one title; users with 6 to 14 items."""
    rng = random.Random(seed)
    titles = [f"{a} {b}" for a in ("red", "blue", "old", "the new") for b in ("pen", "pencil", "ink pot", "paper")]
    titles += [f"{t} {n} pack" for t in titles for n in (5, 10)][:23] + ["red pen"]
    folder.mkdir(parents=True, exist_ok=True)
    items = "".join(f"i{n}\t{t}\tb{n % 5}\n" for n, t in enumerate(titles))
    (folder / "items.tsv").write_text("item_id\ttitle\tbrand\n" + items)
    rows = ["user_id\titem_ids\ttimes"]
    for u in range(users):
        n, start = rng.randint(6, 14), rng.randint(0, 1000)
        at = (rng.randrange(40) + np.arange(n) * rng.choice((1, 3))) % 40  # something to learn
        rows.append(f"u{u}\t{' '.join(f'i{i}' for i in at)}\t{' '.join(str(start + t) for t in range(n))}")
    (folder / "sequences.tsv").write_text("\n".join(rows) + "\n")
    return folder


def write_base(folder: Path, shop: Path, **more) -> Path:
    """A Hugging Face folder of a small Llama with its tokenizer."""
    tokenizer = data.train_tokenizer(data.load(shop).titles)
    c = Config(**SMALL | more, vocab_size=tokenizer.get_vocab_size(), eos_token_id=0, tie_word_embeddings=False)
    llama.save(spread(Llama(c), 3), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def command(shop: Path, out: Path, model="tiny", **flags) -> list[str]:
    """37 examples in steps of 8, the last of an epoch of 5; 8 steps are 1.6 epochs."""
    flags = dict(limit=37, batch=8, max_steps=8, eval_every=3, eval_limit=7, lr=0.02, dropout=0) | flags
    flags = dict(data=shop, out=out, model=model, targets="last") | flags
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "shop")


@pytest.fixture(scope="module")
def base(tmp_path_factory, shop) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", shop)


@pytest.fixture(scope="module")
def run(shop, tmp_path_factory) -> Path:
    """A finished run; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(command(shop, out))
    return out


@pytest.fixture
def own(run, tmp_path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "own"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def essence(out: Path) -> dict:
    """All a run wrote, but for times: two runs are the same if this is equal, leftovers included."""
    fixed = partial(json.loads, object_hook=lambda d: {k: v for k, v in d.items() if k not in FREE})
    found = files(out)
    found |= {name: fixed(text) for name, text in found.items() if name.endswith(".json")}
    return found | {name: [*map(fixed, text.splitlines())] for name, text in found.items() if name.endswith(".jsonl")}


def assert_same_run(a: Path, b: Path):
    one, two = essence(a), essence(b)
    assert one.keys() == two.keys() and not [name for name in one if one[name] != two[name]]


def fork(f) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=f)
    child.start()
    return child


def ended(child: multiprocessing.Process) -> int | None:
    """Its exit code, or minus the signal that ended it; None if it hangs."""
    child.join(60)
    code = child.exitcode
    child.kill()
    return code


def before_step(patch, n: int, do):
    """do() before the n-th update (from 1) of this process."""
    original, calls = train.update, itertools.count(1)
    patch.setattr(train, "update", lambda *args: (next(calls) == n and do(), original(*args))[1])


def train_stopped(argv: list[str], n: int, by=signal.SIGTERM):
    """Stopped after n steps, counted from where it began, though it looks at its losses as seldom as on a GPU."""
    real = train.prepare_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare_out", lambda r: (setattr(r, "look_every", train.LOOK_EVERY), real(r))[1])
        before_step(patch, n, lambda: os.kill(os.getpid(), by))
        assert train.main(argv) is False


def on_writing(out: Path, do):
    """do() before this process changes anything under out."""

    def hook(event, args):
        writing = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing and str(out) in str(args[0]) or event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            do()

    sys.addaudithook(hook)


def fails_at(patch, n: int):
    """From the n-th step on the loss is not a number."""
    before_step(patch, n, lambda: patch.setattr(train, "loss_of", lambda r, b: r.params[0].sum() * math.nan))


# --- what a run leaves, and where -----------------------------------------------------------------------------------


def test_a_run_leaves_what_eval_and_readers_need(run):
    """Catches checkpoints that pile up, a log with missing or doubled lines, and files left half done."""
    log = lines(run / "metrics.jsonl")
    best = max(log, key=lambda line: (line["valid_NDCG@10"], -line["valid_nll"]))["step"]
    wanted = {"config.json", "metrics.jsonl", "results-test-limit7.json", "predictions-test-limit7.jsonl"}
    assert {p.name for p in run.iterdir()} == wanted | {"step-000008", f"best-{best:06d}"}
    kept = {p.name for p in (run / f"best-{best:06d}").iterdir()}
    assert kept == {"config.json", "model.safetensors", "tokenizer.json"}
    assert [line["step"] for line in log] == [3, 6, 8]
    assert log[-1]["valid_nll"] < log[0]["valid_nll"] and log[-1]["lr"] == pytest.approx(0.002)


def test_the_seed_and_nothing_else_decides(run, shop, tmp_path):
    """Catches hash order, the clock or torch's global generator in initial weights, order or evaluation."""
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    train.main(command(shop, tmp_path / "again"))
    assert_same_run(run, tmp_path / "again")
    train.main(command(shop, tmp_path / "other", seed=1, max_steps=3))
    a, b = (load_file(next(o.glob("best-*")) / "model.safetensors") for o in (run, tmp_path / "other"))
    assert not torch.equal(a["model.norm.weight"], b["model.norm.weight"])


def flags_of(*argv):
    return train.resolve(train.make_parser().parse_args(argv))


def test_the_default_folder_names_what_differs():
    """Catches seeds and plans that overwrite each other, and a name that depends on what changes no result."""
    out = lambda *argv: flags_of("--data", "x/my-plans", *argv).out  # noqa: E731
    assert out() == out("--tokens", "99", "--eval_every", "7") == "out/my-plans-tiny"
    assert out("--plan", "OR") == "out/my-plans-tiny-OR" and out("--seed", "1") == "out/my-plans-tiny-seed1"
    assert flags_of("--plan", " IN:1  OR ").plan == "IN:1 OR"  # one plan in a table
    assert out("--model", "a/smollm", "--plan", "IN:1/4 OR") == "out/my-plans-smollm-IN1of4_OR"
    flags = dict(split="loo", core="0", targets="last", limit="9", dropout="0.1", lora="4", loss="lml")
    flags |= dict(columns="brand", label_smoothing="0.1", lr="0.5", max_steps="9", epochs="2", batch="3", core="1")
    assert len({out(f"--{name}", value) for name, value in flags.items()}) == len(flags)


@pytest.mark.parametrize("argv, kind, targets", [
    ([], "scratch", "all"), (["--model", "x"], "lora", "last"), (["--model", "x", "--lora", "0"], "full", "last")
])  # fmt: skip
def test_defaults_are_those_of_what_is_trained(argv, kind, targets):
    """Catches full tuning at the rate of adapters."""
    args = flags_of(*argv)
    assert (args.lr, args.dropout, args.targets) == (train.RATES[kind], train.DROPOUT[kind], targets)
    assert bool(args.lora) == (kind == "lora")


def test_the_best_validation_is_kept(shop, tmp_path, monkeypatch):
    """Catches nats before NDCG@10, or most nats; and a best that is pruned."""
    found = iter([(0.2, 1.0), (0.4, 3.0), (0.1, 1.0), (0.4, 2.0), (0.4, 4.0), (0.3, 1.0)])
    names = "valid_NDCG@10", "valid_nll"
    monkeypatch.setattr(train, "validate", lambda r: dict(zip(names, next(found), strict=True)))
    train.main(command(shop, tmp_path / "out", max_steps=6, eval_every=1))
    assert [p.name for p in (tmp_path / "out").glob("best-*")] == ["best-000004"]


def test_a_learning_rate_that_is_too_high_is_a_sentence(shop, tmp_path, monkeypatch):
    fails_at(monkeypatch, 1)
    warnings.simplefilter("error")  # numpy's, of a mean of nothing; pytest puts the filters back
    with refuses("no loss is finite"):
        train.main(command(shop, tmp_path / "out"))


def test_only_own_checkpoints_are_pruned(own, shop):
    """Catches a person's folder that is taken for a checkpoint, by pruning or by what looks for the newest."""
    for name in ("best-000002-keep", "step-notes"):
        (own / name).mkdir()
    (own / "best-1000000.part").mkdir()
    shutil.rmtree(own / "step-000008")
    train.main([*command(shop, own), "--resume"])
    assert sorted(p.name for p in own.glob("*-*") if p.is_dir()) == [  # a save that was killed is gone, too
        "best-000002-keep", newest(own, "best").name, "step-000008", "step-notes"]  # fmt: skip


def test_one_run_a_folder(own, shop, monkeypatch):
    """Catches two jobs that write into one folder."""
    tried = []

    def second():
        with refuses("another run is writing"):
            train.main([*command(shop, own), "--resume"])
        tried.append(1)

    shutil.rmtree(own / "step-000008")
    before_step(monkeypatch, 1, second)
    assert train.main([*command(shop, own), "--resume"]) and tried == [1]
    os.close(train.lock(own))  # and it is free afterwards


@pytest.mark.parametrize("what", ["a run", "someone's thesis", "data", "nothing"])
def test_what_is_in_a_folder_is_left_alone(what, own, shop, tmp_path):
    """Catches a run that is begun over another, over the data or a Hugging Face folder, and a mistyped --resume."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/note.txt").write_text("mine")
    out = {"a run": own, "data": shop}.get(what, tmp_path / ("thesis" if what != "nothing" else what))
    before = files(out)
    if what != "nothing":
        with refuses(out, "not empty", "--resume"):
            train.main(command(shop, out))
    if what != "a run":
        with refuses(out, "no run of train.py"):
            train.main([*command(shop, out), "--resume"])
    assert files(out) == before and out.exists() == (what != "nothing")


# --- stopping and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "lora", "full"])
def test_a_stopped_run_resumes_to_the_same_bits(kind, run, shop, base, tmp_path, monkeypatch, capsys):
    """Catches a resume that forgets moments, dropout's generator, the order within or after an epoch, the losses since
    the last line of the log, or the best so far; and a stop that validates, and so could choose another best."""
    monkeypatch.setattr(train, "LORA_DROPOUT", 0.05 if kind == "tiny" else 0.3)
    flags = {"tiny": {}, "lora": dict(model=base, lora=4), "full": dict(model=base, lora=0, dropout=0.1)}[kind]
    whole, parts = run, tmp_path / "parts"
    if kind != "tiny":
        train.main(command(shop, whole := tmp_path / "whole", **flags))
    train_stopped(command(shop, parts, **flags), 2)  # before the first validation
    assert {p.name for p in parts.iterdir()} == {"config.json", "step-000002"}
    said = capsys.readouterr().out
    assert "stopped, nothing is lost" in said and "error" not in said
    train_stopped(["--resume", "--out", str(parts)], 5, signal.SIGINT)  # past the end of the epoch
    train_stopped([*command(shop, parts, **flags), "--resume"], 1)  # after the last step
    assert not list(parts.glob("results*"))
    train.main([*command(shop, parts, **flags), "--resume"])
    assert_same_run(whole, parts)
    moved = [n for n, v in load_file(parts / "step-000008/weights.safetensors").items() if v.any()]
    assert kind != "lora" or (all("lora_" in n for n in moved) and any("lora_B" in n for n in moved))


def test_a_finished_run_resumed_prints_its_table_again(own, shop, run, capsys, monkeypatch):
    monkeypatch.setattr(train, "update", None)
    assert train.main([*command(shop, own), "--resume"])
    assert "test split, 7 windows" in capsys.readouterr().out
    with refuses("max_steps was 8, now it is 9", "--model best-STEP"):
        train.main([*command(shop, own, max_steps=9), "--resume"])
    assert_same_run(run, own)


def test_killed_at_any_moment_it_resumes_to_the_same_bits(shop, tmp_path):
    """kill -9 before the 1st, 5th, 9th .. touch of the disk, resuming each time. Catches a checkpoint that bears its
    name before it is whole, the older one going first, a line of the log twice or never, and leftovers."""
    flags = dict(max_steps=3, eval_every=1, limit=16, eval_limit=2)
    train.main(command(shop, tmp_path / "whole", **flags))
    out, kills, code = tmp_path / "out", -1, -signal.SIGKILL
    while code:
        kills += 1
        argv = [*command(shop, out, **flags), *(["--resume"] if (out / "config.json").exists() else [])]
        touch = iter([lambda: None] * 4 * kills + [lambda: os.kill(os.getpid(), signal.SIGKILL)]).__next__
        code = ended(fork(lambda touch=touch, argv=argv: (on_writing(out, lambda: touch()()), train.main(argv))))
        assert code in (0, -signal.SIGKILL) and kills < 30
        if place := newest(out, "step"):  # whatever bears a final name is complete
            assert json.loads((place / "state.json").read_text())["step"] == int(place.name[5:])
            assert len(load_file(place / "weights.safetensors")) * 3 == len(load_file(place / "optimizer.safetensors"))
        if newest(out, "best"):
            evaluation.load_run(out)
    assert kills >= 5
    assert_same_run(tmp_path / "whole", out)


def program(name: str, argv: list[str], said: Path, stdout: int | None = None, before=lambda: None) -> int:
    """python NAME ARGV in a child, what it says in the file said -> its exit code."""

    def f():
        with open(said, "w") as file:
            os.dup2(stdout or file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w", 1)  # in place of pytest's
        sys.argv = [name, *argv]
        before()
        try:
            runpy.run_path(str(REPO / name), run_name="__main__")
        finally:
            sys.stdout.flush()  # as Python does at its end

    return ended(fork(f))


def test_exit_codes(shop, tmp_path):
    """130 after a stop with a checkpoint, which is no error; 1 and a sentence for what the user can mend."""
    out, said = tmp_path / "out", tmp_path / "said"

    def interrupt(event, args):
        if event == "open" and "metrics.jsonl" in str(args[0]):
            os.kill(os.getpid(), signal.SIGINT)

    assert program("train.py", command(shop, out), said, before=lambda: sys.addaudithook(interrupt)) == 130
    assert "stopped, nothing is lost" in said.read_text() and "error" not in said.read_text() and newest(out, "step")
    assert program("train.py", ["--batchsize", "3"], said) == 1
    assert said.read_text().strip() == "error: unrecognized arguments: --batchsize 3"


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_a_reader_that_has_seen_enough(name, own, shop, tmp_path):
    """`| head` ends a program without a word, but for what it reads."""
    read, write = os.pipe()
    os.close(read)
    argv = command(shop, tmp_path / "other") if name == "train.py" else ["--out", str(own)]
    assert program(name, argv, tmp_path / "said", write) in (0, 130)
    assert (tmp_path / "said").read_text() == f"reading {shop}\n"


def test_resume_goes_on_with_the_same_run_only(base, tmp_path, monkeypatch):
    """Catches a run that goes on with other flags, constants, users or weights under the same names."""
    mine, out, shop = Path(shutil.copytree(base, tmp_path / "base")), tmp_path / "out", write_data(tmp_path / "shop")
    (mine / "source.json").write_text('{"holds": "SmolLM2, halved"}')
    flags = dict(model=mine, lora=2, max_steps=1)
    train.main(command(shop, out, **flags))
    assert json.loads((out / "config.json").read_text())["base_source"] == "SmolLM2, halved"
    assert json.loads((out / "results-test-limit7.json").read_text())["base"] == "SmolLM2, halved"
    c = json.loads((out / "config.json").read_text())
    c.pop("label_smoothing"), c["constants"].pop("WHOLE_TITLES")  # as if the run were older than these
    (out / "config.json").write_text(json.dumps(c))
    assert train.main([*command(shop, out, **flags), "--resume"])
    before = files(out)

    def refused(*says, **more):
        with refuses(*says):
            train.main([*command(shop, out, **flags | more), "--resume"])
        assert files(out) == before

    refused("--resume", "batch was 8, now it is 9", "need not be given again", batch=9)
    refused("label_smoothing was 0.0, now it is 0.1", label_smoothing=0.1)
    refused("plan was IN:1/4 OR CR:1/4, now it is OR", plan="OR")
    refused("lr was 0.02, now it is 0.01", lr=0.01)
    refused("seed was 0, now it is 1", seed=1)
    refused("covers 0 layers", plan="")
    refused("max_steps was 1, now it is 2", max_steps=2)
    with pytest.raises(hatllm.InputError) as advice:
        train.main([*command(shop, out, **flags | {"max_steps": 2}), "--resume"])
    assert "best-STEP" not in str(advice.value), "which holds adapters alone"
    for module, name, value in ((train, "CLIP", 0.5), (data, "HISTORY", 9)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            refused(f"{name} was", f"now it is {value}")

    def last_three(kind, item, sees):  # what a user's item sees of the others; the picture is the same
        near = (item[:, :, None] - item[:, None, :] < 3) | (item == hatllm.TARGET)[:, :, None]
        return hatllm.mask(kind, item, sees) & near

    def first_five(kind, item, sees):  # tokens of another item
        begins = F.pad(item[:, 1:] != item[:, :-1], (1, 0), value=True)
        at = torch.arange(item.shape[1])
        near = (at - torch.where(begins, at, 0).cummax(1).values < 5)[:, None, :]
        return hatllm.mask(kind, item, sees) & (near | (item[:, :, None] == item[:, None, :]))

    for edited in (last_three, first_five):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "mask", edited)
            refused("masks was")
            with refuses(out, "other masks of IN:1/4 OR CR:1/4"):
                evaluation.load_run(out)
    path = mine / "model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(path).items()}, path)
    refused("base_digest was")
    write_data(shop, seed=1)
    refused("--resume: digest was")


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-10])


def foreign(path: Path):
    save_file({k + "x": v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize("name, spoil", [
    ("weights.safetensors", truncate), ("optimizer.safetensors", Path.unlink), ("optimizer.safetensors", foreign),
    ("state.json", lambda p: p.write_text('{"step": 8}')), ("../config.json", truncate),
    ("state.json", lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"losses": ["a"]})))])  # fmt: skip
def test_a_damaged_run_is_one_sentence(name, spoil, own, shop):
    """Catches tracebacks, and a run that goes on from something else than its last checkpoint."""
    spoil(own / "step-000008" / name)
    with refuses(own, Path(name).name):
        train.main([*command(shop, own), "--resume"])


# --- when the disk is full, the memory too small, or the loss not a number ------------------------------------------


@pytest.mark.parametrize("file", ["optimizer.safetensors", "model.safetensors", "metrics.jsonl.part"])
def test_a_full_disk_loses_nothing(file, run, shop, tmp_path, monkeypatch):
    """Catches a traceback, a checkpoint that is not whole, the last one gone, and .part files that fill the disk."""
    out, kept, first = tmp_path / "out", {}, 1 if file == "model.safetensors" else 4  # the 3rd step is the best yet

    def fill(patch):
        kept.update({name: text for name, text in files(out).items() if name != "metrics.jsonl"})
        patch.setattr(Path, "write_text", lambda path, text, *_: write(path, lambda: path.write_bytes(text.encode())))
        for module in (train, llama):
            patch.setattr(module, "save_file", lambda x, path, **more: write(path, lambda: save_file(x, path, **more)))

    def write(path, whole):
        Path(path).write_bytes(b"the first blo") if Path(path).name == file else whole()
        if Path(path).name == file:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises((ValueError, OSError), match="No space left"):
        before_step(patch, first, lambda: fill(patch))
        train.main(command(shop, out))
    assert kept and kept.items() <= files(out).items()
    assert getattr(newest(out, "step"), "name", "") == "step-000003" * (first > 3) and not list(out.glob("*-*.part"))
    train.main([*command(shop, out), "--resume"])
    assert_same_run(run, out)


def infinite_gradient(r, b, real=train.loss_of):
    """A finite loss: sqrt(x) at 0 has an infinite slope, and clipping makes NaN of all other gradients."""
    p = r.params[-1].flatten()[0]
    return real(r, b) + (p - p.detach()).sqrt()


def test_an_infinite_gradient_is_left_out(shop, monkeypatch):
    """Catches NaN weights or moments, and a step that AdamW counts nonetheless."""
    r, twin = make_run(shop), make_run(shop)
    for x in (r, twin):
        step(x, x.pool[:4])
        with monkeypatch.context() as patch:
            patch.setattr(train, "loss_of", infinite_gradient)
            assert x is twin or step(x, x.pool[4:8], n=1)
        step(x, x.pool[8:12], n=2)
    for p, q in zip(r.params, twin.params, strict=True):
        assert_close([p, *r.optimizer.state[p].values()], [q, *twin.optimizer.state[q].values()], rtol=0, atol=0)


def test_an_infinite_gradient_is_reported(shop, tmp_path, monkeypatch, capsys):
    """Catches silence, and a loss of NaN in the log."""
    for n, loss_of in ((5, infinite_gradient), (6, train.loss_of)):
        before_step(monkeypatch, n, lambda f=loss_of: monkeypatch.setattr(train, "loss_of", f))
    train.main(command(shop, tmp_path / "out"))
    assert "1 of the last 1 updates" in capsys.readouterr().out
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "out/metrics.jsonl"))


def test_one_lost_update_is_no_end(shop, tmp_path, monkeypatch):
    """Catches a run that cannot be finished, as its very last update alone came after the last validation."""
    before_step(monkeypatch, 8, lambda: monkeypatch.setattr(train, "loss_of", infinite_gradient))
    assert train.main(command(shop, tmp_path / "out", eval_every=7))
    assert [math.isnan(line["loss"]) for line in lines(tmp_path / "out/metrics.jsonl")] == [False, True]


def test_too_small_a_memory_names_remedies_that_work(shop, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", dict(max_steps=4, eval_every=2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="memory.*--tokens.*--resume"):
        before_step(patch, 3, lambda: torch.empty(1 << 60))
        patch.setattr(sys, "argv", ["train.py", *command(shop, out, **flags)])
        evaluation.run_main(train.main)
    assert train.main([*command(shop, out, tokens=99, **flags), "--resume"])


# --- the same numbers however it is computed ------------------------------------------------------------------------


def make_run(shop: Path, *argv, **flags) -> train.Run:
    """A run over a small Llama with spread-out weights, whose gradients are far from rounding."""
    r = train.Run(flags_of(*command(shop, Path("unused"), **flags), *argv))
    spread(r.model)
    return r


def step(r: train.Run, some: list[Example], lr: float = 1e-3, n: int = 0) -> float:
    coded = [data.encode(r.cat, e, r.trie_only) for e in some]
    batch = train.make_step(r, coded, 1 / data.n_title_tokens(r.cat, some))
    assert len(batch.forwards) > 1 or r.tokens > 100
    assert any(b.start is not None and b.start.any() for b in batch.forwards) == r.pack
    return float(train.update(r, n, batch, lr)[0])


def brute_force(r: train.Run, some: list[Example]) -> tuple[torch.Tensor, int]:
    """Sum of -log p and number of the title tokens: one text after the other, all logits, the titles looked through."""
    total, n, paths = 0.0, 0, [[*title.tolist(), 0] for title in r.cat.titles]
    for history, k, target in [(e.history, k, target) for e in some for k, target in e.targets]:
        (tokens, item), title = r.cat.prompt(history[:k]), paths[target]
        text, items = torch.tensor([[*tokens, *title]]), torch.tensor([[*item, *[TARGET] * len(title)]])
        z = r.model.logits(r.model(text, layout(items)))[0, len(tokens) - 1 :]
        for j, token in enumerate(title):
            n += 1
            may_follow = sorted({p[j] for p in paths if p[:j] == title[:j]})
            may_follow = range(len(z[j])) if r.args.loss == "lml" else may_follow
            each = -(z[j, may_follow] / train.TAU).log_softmax(0)
            share = r.args.label_smoothing
            total = total + (1 - share) * each[may_follow.index(token)] + share * each.mean()
    return total, n


@pytest.mark.parametrize("pack", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("flags, tau", [(dict(loss="msl"), 0.5), (dict(loss="lml"), 1), (dict(targets="all"), 1),
                                        (dict(label_smoothing=0.2), 0.5), (dict(label_smoothing=0.2, loss="lml"), 1),
                                        (dict(targets="all", plan="IN-closed:1 OR CR:2"), 1),
                                        (dict(targets="all", plan="IN:1 OR CR-last:1"), 1)], ids=str)  # fmt: skip
def test_a_step_has_the_gradients_of_one_big_batch(flags, tau, pack, shop, monkeypatch):
    """Catches a mean over micro-batches instead of tokens, certain tokens left out of the mean, lost rows, padding that
    counts, branches of a history or texts of a row that see each other, and clipping by value, parameter or
    micro-batch."""
    monkeypatch.setattr(train, "TAU", tau)
    r = make_run(shop, tokens=100, **flags)
    r.pack, r.row = pack, 64 if pack else 1
    n = 2 if r.args.targets == "all" else 1  # so short that two, with their branches, share a row
    short = [Example(e.history[:n], [(k, e.targets[0][1]) for k in range(1, n + 1)]) for e in r.pool[2:4]]
    some = [*r.pool[:4], *short]
    total, n = brute_force(r, some)
    want = torch.autograd.grad(total / n, r.params)
    norm, seen = math.sqrt(sum(float(g.norm()) ** 2 for g in want)), []
    r.optimizer.step = lambda: seen.append([p.grad.clone() for p in r.params])
    for clip in (norm / 4, 1e9):
        monkeypatch.setattr(train, "CLIP", clip)
        assert step(r, some) == pytest.approx((total / n).item(), rel=1e-5)
        for (name, _), a, b in zip(r.model.named_parameters(), seen[-1], want, strict=True):
            b = b * min(1, clip / norm)
            assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.norm()) + 1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("flags", [dict(loss="lml"), dict(targets="all", plan="IN-closed:1 OR CR-last:1")], ids=str)
def test_a_title_may_follow_the_history_at_once(flags, shop, monkeypatch):
    """Without a response header its first loss stands at the last token of the item before it."""
    monkeypatch.setattr(data, "PROMPT", ("", "\n", ""))
    test_a_step_has_the_gradients_of_one_big_batch(flags, 1, True, shop, monkeypatch)


@pytest.mark.parametrize("more", ["tokens", "bfloat16", "compile"])
def test_less_memory_or_time_trains_alike(more, shop, base, monkeypatch):
    """Catches an update for each micro-batch, half-precision weights or sums, and a block that is compiled anew for
    every layer or batch until torch gives up."""
    monkeypatch.setattr(train, "LORA_DROPOUT", 0.0 if more in ("tokens", "compile") else 0.3)
    if more == "compile":  # torch's graphs without its code generator: quick, and bit-equal
        monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    ends = []
    for argv in ([], {"bfloat16": ["--dtype", more], "compile": ["--compile"]}.get(more, [])):
        argv = ["--dtype", "float32", *argv]
        r = make_run(shop, *argv, model=base, lora=4, tokens=60 if ends and more == "tokens" else 2048)
        losses = [(step(r, r.pool[8 * n : 8 * n + 8], n=n), torch.initial_seed()) for n in range(2)]
        assert losses[0][1] != losses[1][1]  # of dropout
        ends.append([torch.tensor([loss for loss, _ in losses]), *r.params])
    for a, b in zip(*ends, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert more != "bfloat16" or not torch.equal(a, b)
        assert_close(a, b, rtol=0, atol=0.05 if more == "bfloat16" else 1e-5)


@pytest.mark.parametrize("flags", [dict(dropout=0.5), dict(dropout=0.5, lora=0), dict(lora=2)], ids=str)
def test_dropout_is_in_the_training_alone(flags, shop, base):
    """Catches a rate that never reaches the model: from scratch, of a base, of adapters."""
    r = make_run(shop, **flags | ({"model": base} if "lora" in flags else {}))
    (b, *_) = train.get_batch(r, 0).forwards
    for mode, n in ((r.model.train, 2), (r.model.eval, 1)):
        mode()
        assert len({train.loss_of(r, b).item() for _ in range(2)}) == n


def test_dropout_is_drawn_by_seed_step_and_process(shop):
    """Catches processes, or seeds, that drop the same."""
    r, drawn = make_run(shop), set()
    batch = train.get_batch(r, 0)
    for r.args.seed, n, r.world.rank in itertools.product(range(2), range(2), range(2)):
        train.update(r, n, batch, 1e-3)
        drawn.add(torch.initial_seed())
    assert len(drawn) == 8


@pytest.mark.parametrize("most", [8, 2048])
def test_a_text_longer_than_the_model_was_made_for_is_named(most, shop, tmp_path, capsys):
    folder = write_base(tmp_path / "base", shop, max_position_embeddings=most)
    train.Run(flags_of(*command(shop, Path("unused"), folder)))
    assert ("the model was made for 8;" in capsys.readouterr().err) == (most == 8)


@pytest.mark.parametrize("lora, frozen", [(4, torch.bfloat16), (0, torch.float32)])
def test_what_is_trained_is_in_single_precision(lora, frozen, shop, base):
    """Catches full tuning of half-precision weights: small updates are rounded away."""
    r = train.Run(flags_of(*command(shop, Path("unused"), base, lora=lora), "--dtype", "bfloat16"))
    assert {p.dtype for p in r.params} == {torch.float32} and r.model.head.dtype == frozen


def test_validation_is_the_mean_per_item_without_dropout(shop, monkeypatch):
    """Catches dropout in the validation, a mean per token or batch, a model left in evaluation mode, another tau."""
    monkeypatch.setattr(train, "TAU", 0.5)
    monkeypatch.setattr(train, "VALID_WINDOWS", 7)
    r, seen, real = make_run(shop, dropout=0.5, eval_limit=0), [], evaluation.predict
    monkeypatch.setattr(evaluation, "predict", lambda d, c, s, some, a: seen.append(some) or real(d, c, s, some, a))
    r.model.train()
    first = train.validate(r)
    torch.manual_seed(5)
    r.args.seed, r.args.batch = 3, 2
    assert train.validate(r) == first and r.model.training and seen[0] == seen[1]  # so that runs can be compared
    r.model.eval()
    assert first["valid_nll"] == pytest.approx(brute_force(r, data.window_examples(seen[0]))[0].item() / 7)
    r.args.eval_limit = 5
    assert train.validate(r) and [*map(len, seen)] == [7, 7, 5]


class Kernels(TorchDispatchMode):
    """Counts what is dispatched and is more than another view of a tensor."""

    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += not (op.is_view or op._overloadpacket in (torch.ops.aten._unsafe_view, torch.ops.aten.detach))
        return op(*args, **kwargs or {})


def test_a_step_is_few_operations(shop, tmp_path, monkeypatch):
    """A LoRA forward and backward of 30 layers: a GPU that is given more small operations waits for the next one. What
    is one operation on a GPU but several on a CPU counts as one here, and as one in the backward pass."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, True)[0])
    base = write_base(tmp_path / "deep", shop, num_hidden_layers=30)
    r = make_run(shop, "--dtype", "float32", model=base, lora=8)  # auto would be bfloat16 on some CPUs
    (b,) = train.get_batch(r, 0).forwards
    r.model.train()
    with Kernels() as kernels:
        train.loss_of(r, b).backward()
    assert 1500 < kernels.n <= 2500


@pytest.mark.parametrize("flags", [{"loss": "msl"}, {"loss": "lml", "targets": "all", "plan": "OR CR-last:1"}])
def test_a_step_never_waits_for_the_device(flags, shop, base):
    """Meta tensors have a shape and no values, so that whatever needs one raises: .item(), a boolean index, a size that
    depends on data. Each of these would stop the CPU until a GPU has caught up."""
    r = make_run(shop, model=base, lora=4, **flags)
    r.pack, r.pool = True, [*r.pool, *(Example(e.history[:1], [(1, e.targets[0][1])]) for e in r.pool)]
    batch = train.get_batch(r, 0)
    assert batch.forwards[0].start.any()
    r.net, r.device, r.trie = r.model.to("meta").train(), torch.device("meta"), r.trie.to("meta")
    r.params = [p for p in r.model.parameters() if p.requires_grad]
    r.optimizer.step = lambda: None  # torch's fused kernel, which has no meta version
    told = train.update(r, 0, batch._replace(forwards=[b.to("meta") for b in batch.forwards]), 1e-3)
    assert told.is_meta and told.shape == (2,)
    with pytest.raises(RuntimeError, match="meta"):
        train.look(r, [told], False)


def test_weight_decay_is_for_matrices_only(shop, monkeypatch):
    monkeypatch.setattr(train, "WEIGHT_DECAY", 0.5)
    monkeypatch.setattr(train, "BETAS", [0.3, 0.4])
    r = make_run(shop)
    before = {n: p.detach().clone() for n, p in r.model.named_parameters()}
    monkeypatch.setattr(train, "loss_of", lambda r, b: sum(0.0 * p.sum() for p in r.params))
    step(r, r.pool[:2], 0.1)
    for name, p in r.model.named_parameters():
        assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if p.dim() > 1 else 1), msg=name)
    assert [(g["lr"], [*g["betas"]]) for g in r.optimizer.param_groups] == [(0.1, [0.3, 0.4])] * 2


# --- processes ------------------------------------------------------------------------------------------------------


def test_two_processes_are_one(shop, tmp_path):
    """Catches a mean of means, examples done twice or never, a batch that leaves one process without examples, a loss
    that is one process's own, results in another order, a second process that writes, and a stop that only the process
    knows of which got the signal."""
    flags = dict(limit=33, max_steps=6, eval_limit=9, lr=0.001, tokens=200)  # the 5th step has 1 example
    out = tmp_path / "two"
    train.main(command(shop, tmp_path / "one", **flags))

    def process(rank: str, stop: int, argv: list[str]):
        os.environ.update(env, RANK=rank, LOCAL_RANK=rank)
        if rank == "1":
            on_writing(out, lambda: os._exit(9))
            before_step(pytest.MonkeyPatch(), stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(argv) == (stop > 6)

    for stop, more in ((4, []), (99, ["--resume"])):
        argv = [*command(shop, out, **flags), *more]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", MASTER_PORT=port)
        children = [fork(partial(process, rank, stop, argv)) for rank in ("0", "1")]
        assert [ended(child) for child in children] == [0, 0] and newest(out, "step").name == f"step-{min(stop, 6):06d}"
    one, two = essence(tmp_path / "one"), essence(out)
    assert one.keys() == two.keys()
    for a, b in zip(one["metrics.jsonl"], two["metrics.jsonl"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name in (n for n in one if n.endswith(("weights.safetensors", "model.safetensors"))):
        for k, v in load_file(tmp_path / "one" / name).items():
            assert_close(load_file(out / name)[k], v, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(x["predictions-test-limit9.jsonl"] for x in (one, two)), strict=True):
        assert a | {"scores": 0, "nll": 0} == b | {"scores": 0, "nll": 0}


# --- the schedule, the flags ----------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls_to_a_tenth(monkeypatch):
    """Catches an off-by-one at either end."""
    monkeypatch.setattr(train, "WARMUP", 0.1)
    rates = [train.learning_rate(step, 40, 0.5) for step in range(40)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5]) and rates[21] == pytest.approx(0.5 * 0.55)
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False)) and rates[-1] == pytest.approx(0.05)
    assert train.learning_rate(0, 1, 0.5) == train.learning_rate(3, 45, 0.5) == 0.5


def test_every_epoch_has_each_example_once(shop, monkeypatch):
    """Catches examples left out or seen twice, and the same order in every epoch; --limit draws alike for all seeds."""
    seen, real = [], train.make_step

    def make_step(r, coded, scale):
        seen.extend(str(r.pool[i]) for c in coded for i, x in r.coded.items() if x is c)
        return real(r, coded, scale)

    monkeypatch.setattr(train, "make_step", make_step)

    def order(**flags) -> list[str]:
        r = make_run(shop, **flags)
        assert all(train.get_batch(r, n).scale > 0 for n in range(r.steps))
        return [seen.pop(0) for _ in range(len(seen))]

    two, seeded, pool = order(epochs=1.9), order(epochs=1, seed=1), sorted(map(str, make_run(shop).pool))
    assert sorted(two[:37]) == sorted(two[37:]) == sorted(seeded) == pool and len(pool) == 37
    assert two[:37] != two[37:] and two[:37] != seeded
    r = make_run(shop)
    assert r.pool != data.examples(r.d, "last")[:37], "drawn, not the oldest"


def test_the_log_has_the_mean_loss_since_the_last_line(shop, tmp_path, monkeypatch):
    """Catches the last step's loss alone, or the mean since the start."""
    losses = iter(range(1, 8))
    monkeypatch.setattr(train, "update", lambda *_: torch.tensor([next(losses), 1.0]))
    monkeypatch.setattr(train, "save_step", lambda *_: None)
    train.main(command(shop, tmp_path / "out", max_steps=7))
    log = lines(tmp_path / "out/metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in log] == [(3, 2.0), (6, 5.0), (7, 7.0)]


@pytest.mark.parametrize("flag, value", [("seed", "20000000000"), ("epochs", "inf"), ("lr", "nan"), ("batch", "0")])
def test_a_flag_out_of_range_is_named(flag, value):
    with refuses(f"--{flag}", value):
        train.main([f"--{flag}", value])
