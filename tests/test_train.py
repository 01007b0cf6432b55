"""train.py and common.py: a run that repeats, stops, is killed and resumes to the same bits; that computes the same
however it is cut into forwards and processes; and that loses nothing when the disk, the data or the user fails it.

Children are forks of this process: importing torch anew costs seconds. Each test says which mistake it is there for.
"""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, spread
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import common
import data
import eval as evaluation
import model as llama
import train
from common import World, newest, parse_flags, write_folder, write_json
from data import Catalogue, Example
from hatllm import InputError, layout
from model import Config, Llama

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
FREE = ("seconds", "tokens/s", "users/s", "out", "resume", "overwrite")  # what two equal runs may differ in


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
    rows = "".join(f"i{n}\t{t}\n" for n, t in enumerate(titles))
    (folder / "items.tsv").write_text("item_id\ttitle\n" + rows)
    lines = ["user_id\titem_ids\ttimes"]
    for u in range(users):
        n, start = rng.randint(6, 14), rng.randint(0, 1000)
        at = (rng.randrange(40) + np.arange(n) * rng.choice((1, 3))) % 40  # something to learn
        lines.append(f"u{u}\t{' '.join(f'i{i}' for i in at)}\t{' '.join(str(start + t) for t in range(n))}")
    (folder / "sequences.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "shop")


@pytest.fixture(scope="module")
def base(tmp_path_factory, shop) -> Path:
    """A Hugging Face folder of a small Llama with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), data.train_tokenizer(data.load(str(shop)).titles)
    c = Config(**SMALL, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False)
    llama.save(spread(Llama(c), 3), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def command(shop: Path, out: Path, model="tiny", **flags) -> list[str]:
    """37 examples in steps of 8, the last of an epoch of 5; 12 steps are 2.4 epochs."""
    flags = dict(limit=37, batch=8, max_steps=12, eval_every=3, valid_limit=5, test_limit=7, lr=0.01) | flags
    flags = dict(data=shop, out=out, model=model, targets="last") | flags
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_free(value):
    if isinstance(value, dict):
        return {k: without_free(v) for k, v in value.items() if k not in FREE}
    return [without_free(v) for v in value] if isinstance(value, list) else value


def essence(out: Path) -> dict:
    """All a run wrote, but for times: two runs are the same if this is equal, leftovers included."""
    found = {}
    for name, content in files(out).items():
        if name.endswith((".json", ".jsonl")):
            found[name] = [
                without_free(json.loads(t)) for t in ([content] if name[-1] == "n" else content.split(b"\n")[:-1])
            ]
        else:
            found[name] = content
    return found


def assert_same_run(a: Path, b: Path):
    one, two = essence(a), essence(b)
    assert one.keys() == two.keys()
    assert not [name for name in one if one[name] != two[name]]


def fork(argv: list[str], before=lambda: None, **env) -> int:
    """Starts train.main(argv) in a child, after before(); the pid."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        signal.alarm(60)  # a child that hangs must not hang the tests
        torch.set_num_threads(1)
        os.environ.update(env)
        before()
        train.main(argv)
        code = 0
    except InputError as e:
        print(f"InputError: {e}")
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The child's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stop_in_step(patch, n: int):
    """SIGTERM arrives while the n-th step (from 1) of this process is computed."""
    original, calls = train.Trainer.step, []

    def step(*args):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    patch.setattr(train.Trainer, "step", step)


def train_stopped(argv: list[str], n: int):
    """Stopped after step n, counted from where it began; the signal comes in the step before."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, n - 1)
        with pytest.raises(InputError, match="nothing is lost; go on with --resume"):
            train.main(argv)


@pytest.fixture(scope="module")
def run(shop, tmp_path_factory) -> Path:
    """A finished run; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(command(shop, out))
    return out


@pytest.fixture
def own(run, tmp_path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "own"))


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_what_eval_and_readers_need(run):
    """Catches checkpoints that pile up, a log with missing or doubled lines, and files left half done."""
    names = {p.name for p in run.iterdir()}
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(log, key=lambda line: (line["valid_NDCG@10"], -line["valid_nll"]))["step"]
    wanted = {"config.json", "metrics.jsonl", "results-test.json", "predictions-test.jsonl"}
    assert names == wanted | {"step-000012", f"best-{best:06d}"}
    assert {p.name for p in (run / f"best-{best:06d}").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert [line["step"] for line in log] == [3, 6, 9, 12]
    assert [line["targets"] for line in log] == [24, 45, 69, 90]  # the 5th and 10th step have 5 examples
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["lr"] == pytest.approx(0.001)
    result = json.loads((run / "results-test.json").read_text())
    assert result["model"]["n"] == 7 == len((run / "predictions-test.jsonl").read_text().splitlines())
    assert 0 <= result["model"]["HR@10"] <= 1 and "popularity" in result


def test_eval_prints_the_table_of_the_run_again(shop, tmp_path, capsys):
    """Catches a model saved other than the one tested, and an eval that loads another plan, tau or catalogue."""
    out = tmp_path / "run"
    train.main(command(shop, out, tau=0.5, plan="IN:2 OR CR:1", max_steps=3))
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("test split"))
    before = essence(out)
    evaluation.main(["--out", str(out), "--limit", "7"])
    again = capsys.readouterr().out.splitlines()
    assert again[1:-1] == lines[at:-1] and len(lines[at:]) > 5  # the last line tells the speed
    assert without_free(before["predictions-test.jsonl"]) == essence(out)["predictions-test.jsonl"]


def test_recommend_for_a_history_typed_by_hand(run, capsys):
    """Catches a --recommend that is not the model's ranking of the catalogue."""
    evaluation.main(["--out", str(run), "--recommend", "Red Pen", "old ink pot", "--k", "5"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "after red pen | old ink pot" and len(printed) == 2 + 5
    scores = [float(line.split()[0]) for line in printed[2:]]
    assert scores == sorted(scores, reverse=True) and scores[0] < 0
    with pytest.raises(InputError, match='near: "red pen"'):
        evaluation.main(["--out", str(run), "--recommend", "red pem"])


def test_the_seed_and_nothing_else_decides(run, shop, tmp_path):
    """Catches hash order, the clock or torch's global generator in initial weights, order or evaluation."""
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    train.main(command(shop, tmp_path / "again"))
    assert_same_run(run, tmp_path / "again")
    train.main(command(shop, tmp_path / "other", seed=1, max_steps=3))
    a, b = (load_file(next(o.glob("best-*")) / "model.safetensors") for o in (run, tmp_path / "other"))
    assert not torch.equal(a["model.norm.weight"], b["model.norm.weight"])


# --- nothing is overwritten that should not be ----------------------------------------------------------------------


def test_a_second_run_needs_to_be_told(own, shop):
    """Catches a run that writes into, or over, the one that is there."""
    before = files(own)
    with pytest.raises(InputError, match="exists: --resume goes on with it, --overwrite replaces it"):
        train.main(command(shop, own))
    assert files(own) == before
    train.main([*command(shop, own, max_steps=1), "--overwrite"])
    assert sorted(p.name for p in own.glob("*-0*")) == ["best-000001", "step-000001"]


@pytest.mark.parametrize("flag", ["--overwrite", "--resume", "--resume=false"])
@pytest.mark.parametrize("what", ["note.txt", "a model", "broken"])
def test_a_folder_that_is_no_run_is_left_alone(what, flag, shop, base, tmp_path):
    """Catches --overwrite on a Hugging Face folder, which has a config.json as well, or on someone's thesis."""
    out = tmp_path / "out"
    if what == "a model":
        shutil.copytree(base, out)
    else:
        out.mkdir()
        (out / ("config.json" if what == "broken" else what)).write_text('{"digest": "1')
    before = files(out)
    with pytest.raises(InputError, match="no run of train.py, so it is left alone"):
        train.main([*command(shop, out), flag])
    assert files(out) == before


def test_resume_without_a_run_begins_one(shop, tmp_path):
    """A job that is restarted by a scheduler always says --resume. Catches a refusal of the empty start, and of a
    folder in which the run was killed while it wrote its config."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json.part").write_text('{"data"')
    train.main([*command(shop, tmp_path / "out", max_steps=1), "--resume"])
    assert newest(tmp_path / "out", "step").name == "step-000001"


# --- stopping and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "lora", "full"])
def test_a_stopped_run_resumes_to_the_same_bits(kind, run, shop, base, tmp_path):
    """Catches a resume that forgets moments, dropout's generator, the order within or after an epoch, the losses since
    the last line of the log, or the best so far; and a stop that validates, and so could choose another best."""
    flags = {"tiny": {}, "lora": dict(model=base, lora=4, lora_dropout=0.3), "full": dict(model=base, lora=0)}[kind]
    flags["eval_every"] = 5 if kind == "full" else 3
    argv = lambda name: command(shop, tmp_path / name, **flags)  # noqa: E731
    if kind != "tiny":
        train.main(argv("whole"))
    train_stopped(argv("parts"), 4)  # not at a validation, within an epoch of 5 steps
    assert newest(tmp_path / "parts", "step").name == "step-000004"
    train_stopped([*argv("parts"), "--resume"], 4)  # past the end of the epoch
    train.main([*argv("parts"), "--resume"])
    assert_same_run(run if kind == "tiny" else tmp_path / "whole", tmp_path / "parts")
    if kind == "lora":
        weights = load_file(tmp_path / "parts/step-000012/weights.safetensors")
        assert (
            weights
            and all("lora_" in name for name in weights)
            and any(v.any() for n, v in weights.items() if "_B" in n)
        )


def test_a_stop_before_the_first_validation_or_at_the_end_resumes_too(run, shop, tmp_path):
    """Catches a resume that needs a best model, and one that cannot go on where only the test is left."""
    out = tmp_path / "out"
    train_stopped(command(shop, out), 2)
    assert {p.name for p in out.iterdir()} == {"config.json", "step-000002"}
    train_stopped([*command(shop, out), "--resume"], 10)
    assert newest(out, "step").name == "step-000012" and not (out / "results-test.json").exists()
    train.main([*command(shop, out), "--resume"])
    assert_same_run(run, out)


def test_signals_are_given_back(shop, tmp_path, monkeypatch):
    """Catches a SIGTERM or Ctrl-C that does nothing in the test at the end, for minutes on a large set."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []
    monkeypatch.setattr(
        train, "test", lambda *_: seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
    )
    train.main(command(shop, tmp_path / "out", max_steps=1))
    assert seen == [before]
    with train.Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):  # the second one ends it at once
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)


def die_at(out: Path, n: int):
    """SIGKILL before the n-th time that this process touches the file system under out."""
    left = [n]

    def hook(event, args):
        if event in ("os.remove", "os.rmdir") or (
            event in ("open", "os.rename", "os.mkdir") and str(out) in str(args[0])
        ):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def assert_loadable(out: Path):
    """Whatever bears a final name is complete."""
    for place in out.glob("step-*"):
        if place == newest(out, "step"):
            state = json.loads((place / "state.json").read_text())
            assert place.name == f"step-{state['step']:06d}" and len(load_file(place / "weights.safetensors")) == 38
            assert len(load_file(place / "optimizer.safetensors")) == 3 * 38
    if newest(out, "best"):
        evaluation.load_run(out)
    if (out / "metrics.jsonl").exists():
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))


def test_killed_at_any_moment_it_resumes_to_the_same_bits(shop, tmp_path):
    """kill -9 before the 1st, 4th, 7th .. touch of the disk, resuming each time. Catches a checkpoint that bears its
    name before it is whole, the older one going first, a line of the log twice or never, and leftovers."""
    flags = dict(max_steps=4, eval_every=1, limit=16, valid_limit=2, test_limit=2)
    train.main(command(shop, tmp_path / "whole", **flags))
    out, kills = tmp_path / "out", 0
    argv = [*command(shop, out, **flags), "--resume"]
    for n in range(1, 200, 3):
        code = ended(fork(argv, lambda n=n: die_at(out, n)))
        assert code in (0, -signal.SIGKILL)
        assert_loadable(out)
        if code == 0:
            break
        kills += 1
    assert code == 0 and kills >= 6
    assert_same_run(tmp_path / "whole", out)


# --- bad resumes ----------------------------------------------------------------------------------------------------


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-10])


def foreign(path: Path):
    save_file({k + "x": v for k, v in load_file(path).items()}, path)


def other_shape(path: Path):
    save_file({k: v.new_zeros((*v.shape, 2)) for k, v in load_file(path).items()}, path)


BAD = {
    "flag": (lambda o: None, ["--batch", "9"], "--batch was 8, now it is 9; give the command that began"),
    "plan": (lambda o: None, ["--plan", "OR"], "--plan was IN:1/4 OR CR:1/4, now it is OR"),
    "weights": (lambda o: truncate(o / "step-000012/weights.safetensors"), [], "weights.safetensors: damaged"),
    "optimizer": (lambda o: truncate(o / "step-000012/optimizer.safetensors"), [], "optimizer.safetensors: damaged"),
    "gone": (lambda o: (o / "step-000012/optimizer.safetensors").unlink(), [], "optimizer.safetensors is missing"),
    "foreign": (
        lambda o: foreign(o / "step-000012/weights.safetensors"),
        [],
        "is not of the model that this run trains",
    ),
    "foreign moments": (
        lambda o: foreign(o / "step-000012/optimizer.safetensors"),
        [],
        "is not of the model that this",
    ),
    "shape": (lambda o: other_shape(o / "step-000012/weights.safetensors"), [], "is not of the model that this run"),
    "state": (lambda o: truncate(o / "step-000012/state.json"), [], "state.json: damaged"),
    "state bytes": (lambda o: (o / "step-000012/state.json").write_bytes(b"\xff\x00"), [], "state.json: damaged"),
    "state keys": (lambda o: (o / "step-000012/state.json").write_text('{"step": 12}'), [], "state.json: damaged"),
    "state list": (lambda o: (o / "step-000012/state.json").write_text("[]"), [], "state.json: damaged"),
    "config": (lambda o: truncate(o / "config.json"), [], "is no run of train.py"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_resume_is_one_sentence_and_changes_nothing(name, own, shop):
    """Catches tracebacks, and a run that goes on from something else than its last checkpoint."""
    spoil, more, says = BAD[name]
    spoil(own)
    before = files(own)
    with pytest.raises(InputError, match=says) as e:
        train.main([*command(shop, own), "--resume", *more])
    assert "\n" not in str(e.value) and files(own) == before


def test_resume_sees_that_the_data_has_changed(own, shop, tmp_path):
    """Catches a run that goes on with other users under the same names."""
    other = write_data(tmp_path / "shop", seed=1)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"data": str(other)}))
    before = files(own)
    with pytest.raises(InputError, match="the data has changed"):
        train.main([*command(other, own), "--resume"])
    assert files(own) == before


def test_moments_come_back_on_the_device_of_their_weights(own, shop):
    """Catches AdamW's step count left on the CPU: the fused kernel on a GPU refuses it (meta plays the GPU here)."""
    c = Config(**SMALL, vocab_size=load_file(own / "step-000012/weights.safetensors")["embed_tokens.weight"].shape[0])
    model = Llama(c, "OR").to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    state = json.loads((own / "step-000012/state.json").read_text())
    train.load_step(own / "step-000012", model, optimizer, state)
    assert {v.device.type for s in optimizer.state.values() for v in s.values()} == {"meta"}


# --- when the disk is full, or the loss is not a number -------------------------------------------------------------


def full_disk(patch, file: str, error: Exception):
    """From now on a file of that name breaks off when it is written."""

    def save(tensors, path, *args, **more):
        if Path(path).name == file:
            Path(path).write_bytes(b"the first blo")
            raise error
        return save_file(tensors, path, *args, **more)

    def write_text(path, text):
        if path.name == file:
            path.write_bytes(text.encode()[:20])
            raise error
        return path.write_bytes(text.encode())

    patch.setattr(train, "save_file", save)
    patch.setattr(llama, "save_file", save)
    patch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize(
    "file", ["weights.safetensors", "optimizer.safetensors", "model.safetensors", "state.json", "metrics.jsonl.part"]
)
def test_a_full_disk_loses_nothing(file, run, shop, tmp_path, monkeypatch):
    """Catches a traceback, a checkpoint that is not whole, the last one gone, and .part files that fill the disk."""
    out, validate = tmp_path / "out", train.Trainer.validate
    error = SafetensorError("No space left") if file[0] == "w" else OSError(28, "No space left on device")
    calls = []

    def then_fill(self, windows):
        calls.append(1)
        if len(calls) == 2:
            kept.update(files(out))
            full_disk(patch, file, error)
        return validate(self, windows)

    kept = {}
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "validate", then_fill)
        with pytest.raises(InputError, match="could not be written .*No space left"):
            train.main(command(shop, out))
    now = files(out)
    assert kept and all(now[name] == content for name, content in kept.items() if name != "metrics.jsonl")
    assert newest(out, "step").name == "step-000003" and not list(out.rglob("*.part"))
    evaluation.load_run(out)
    if file == "optimizer.safetensors":
        train.main([*command(shop, out), "--resume"])
        assert_same_run(run, out)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_does_harm(what, shop, tmp_path, monkeypatch):
    """Catches NaN weights in a checkpoint: also from an infinite gradient under a finite loss, whose clipping makes all
    of it NaN. The message names the step and the examples."""
    original, calls, kept = train.Trainer.nll, [], {}

    def nll(self, b):
        loss, p = original(self, b), self.params[-1].flatten()[0]
        if self.model.training:
            calls.append(1)
        if len(calls) >= 6:
            kept.update(files(out))
            loss = loss + (p * math.inf if what == "loss" else (p - p.detach()).sqrt())
        return loss

    out = tmp_path / "out"
    monkeypatch.setattr(train.Trainer, "nll", nll)
    with pytest.raises(InputError, match="became (inf|nan) at step 5, on the training examples .*step-000003") as e:
        train.main(command(shop, out, eval_every=3))
    f = parse_flags(train.Flags, command(shop, out), "")
    assert str(train.step_examples([None] * 37, 5, f).tolist()) in str(e.value)
    assert kept and files(out) == kept
    assert all(v.isfinite().all() for v in load_file(out / "step-000003/weights.safetensors").values())


# --- the same numbers however it is computed ------------------------------------------------------------------------


def trainer(shop: Path, argv=(), dropout: float = 0.0) -> tuple[train.Trainer, data.Dataset]:
    """A Trainer over a small Llama with spread-out weights, whose gradients are far from rounding."""
    f = parse_flags(train.Flags, ["--lr", "0.001", "--clip", "1e9", *argv], "")
    d = data.load(str(shop))
    tokenizer = data.train_tokenizer(d.titles)
    torch.manual_seed(0)
    model = spread(Llama(Config(**SMALL, vocab_size=tokenizer.get_vocab_size()), f.plan))
    if dropout:
        model = spread(llama.add_lora(model, 4, 8, dropout))
    cpu = torch.device("cpu")
    t = train.Trainer(f, model, Catalogue(d.titles, tokenizer, 0), World(), cpu, torch.float32)
    return t, d


def gradients(t: train.Trainer, examples: list[Example]) -> tuple[float, list]:
    """The loss of a step and the gradients its update sees."""
    seen = []
    t.optimizer.step = lambda: seen.extend(p.grad.clone() for p in t.params)
    return t.step(examples, 0.0, 0, False)[0], seen


def brute_force(t: train.Trainer, examples: list[Example]) -> tuple[torch.Tensor, int]:
    """Sum of -log p and number of the title tokens: one text after the other, all logits, the titles looked through."""
    total, n, paths = 0.0, 0, [[*title.tolist(), 0] for title in t.cat.titles]
    for history, k, target in [(e.history, k, target) for e in examples for k, target in e.targets]:
        tokens, item = t.cat.prompt(history[:k])
        title = paths[target]
        text = torch.tensor([[*tokens, *title]])
        items = torch.tensor([[*item, *[k + 1] * len(title)]])
        z = t.model.logits(t.model(text, layout(items)))[0, len(tokens) - 1 :]
        for j, token in enumerate(title):
            n += 1
            if t.f.loss == "lml":
                total = total + F.cross_entropy(z[j], torch.tensor(token))
            else:
                may_follow = sorted({p[j] for p in paths if p[:j] == title[:j]})
                total = total + torch.logsumexp(z[j, may_follow] / t.f.tau, 0) - z[j, token] / t.f.tau
    return total, n


@pytest.mark.parametrize(
    "argv",
    [
        ["--loss", "msl", "--tau", "0.5"],
        ["--loss", "lml"],
        ["--loss", "msl", "--targets", "all"],
        ["--loss", "msl", "--checkpointing"],
    ],
    ids=lambda a: " ".join(a).replace("--", ""),
)
def test_a_step_has_the_gradients_of_one_big_batch(argv, shop):
    """Catches a mean over micro-batches instead of tokens, certain tokens left out of the mean, lost rows, a
    temperature that is not applied, padding that counts, and branches of a history that see each other."""
    t, d = trainer(shop, ["--tokens", "150", *argv])
    t.model.checkpointing = t.f.checkpointing
    examples = data.examples(d, t.f.targets, t.f.share_history)[:9]
    assert len(t.shard(examples)[0]) >= 4
    loss, found = gradients(t, examples)
    total, n = brute_force(t, examples)
    want = torch.autograd.grad(total / n, t.params)
    assert loss == pytest.approx((total / n).item(), rel=1e-5)
    for name, a, b in zip(dict(t.model.named_parameters()), found, want, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.norm()) + 1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_tokens_change_the_memory_and_not_the_result(shop):
    """Catches an update for each micro-batch, and gradients that are overwritten rather than summed."""
    ends = []
    for tokens in ("60", "100000"):
        t, d = trainer(shop, ["--tokens", tokens, "--clip", "1"])
        pool = data.examples(d)
        counts = [len(t.shard(pool[8 * s : 8 * s + 8])[0]) for s in range(3)]
        for s in range(3):
            t.step(pool[8 * s : 8 * s + 8], 1e-3, s, False)
        ends.append(t.params)
        assert counts == ([8] * 3 if tokens == "60" else [1] * 3)
    for a, b in zip(*ends, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)


def test_validation_is_the_mean_per_item_without_dropout(shop):
    """Catches dropout in the validation, a mean per token or per micro-batch, and a model left in evaluation mode."""
    t, d = trainer(shop, ["--tokens", "150"], dropout=0.5)
    windows = d.valid[:5]
    t.model.train()
    first = t.validate(windows)
    assert t.model.training
    torch.manual_seed(5)
    assert t.validate(windows) == first
    t.model.eval()
    nll = brute_force(t, data.window_examples(windows))[0].item() / 5
    assert first["valid_nll"] == pytest.approx(nll, rel=1e-5)
    decoder = evaluation.make_decoder(t.model, t.cat, vars(t.f))
    found = evaluation.evaluate(decoder, t.cat, windows, evaluation.Flags(beam=99))  # all there is
    assert first["valid_NDCG@10"] == evaluation.metrics(*evaluation.positions(found))["NDCG@10"] > 0


def test_clipping_bounds_the_norm_of_the_whole_gradient(shop):
    """Catches clipping by value, by parameter, or per micro-batch."""
    t, d = trainer(shop, ["--tokens", "150"])
    examples = data.examples(d)[:8]
    free = gradients(t, examples)[1]
    norm = math.sqrt(sum(float(g.norm()) ** 2 for g in free))
    t, _ = trainer(shop, ["--tokens", "150", "--clip", str(norm / 4)])
    for a, b in zip(gradients(t, examples)[1], free, strict=True):
        assert_close(a, b / 4, rtol=1e-4, atol=1e-7)


def test_weight_decay_is_for_matrices_only(shop):
    """Catches norms (and biases) that are pulled towards zero."""
    t, d = trainer(shop, ["--weight_decay", "0.5"])
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.nll = lambda b: sum(0.0 * p.sum() for p in t.params)
    t.step(data.examples(d)[:2], 0.1, 0, False)
    for name, p in t.model.named_parameters():
        assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if p.dim() > 1 else 1), msg=name)


@pytest.mark.parametrize("more", [["--checkpointing"], ["--dtype", "bfloat16"], ["--compile"]], ids=lambda m: m[0][2:])
def test_less_memory_or_time_trains_alike(more, shop, base, tmp_path, monkeypatch):
    """Catches dropout that differs between forward and recomputation, half-precision weights or sums, and a block that
    is compiled anew for every layer or batch until torch gives up and runs it as it is."""
    if more[0] == "--compile":  # torch's graphs without its code generator: quick, and bit-equal
        monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    argv = lambda name: command(shop, tmp_path / name, base, lora=4, lora_dropout=0.3, max_steps=6)  # noqa: E731
    train.main(argv("plain"))
    train.main([*argv("less"), *more])
    plain, less = (load_file(tmp_path / name / "step-000006/weights.safetensors") for name in ("plain", "less"))
    assert all(v.dtype == torch.float32 for v in less.values())
    far = max(float((plain[n] - less[n]).abs().max()) for n in plain)
    assert far < (0.05 if more[0] == "--dtype" else 1e-6)
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("plain", "less")
    ]
    for a, b in zip(*logs, strict=True):
        assert a["valid_nll"] == pytest.approx(b["valid_nll"], rel=0.05 if more[0] == "--dtype" else 1e-6)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def writes_nothing(out: Path):
    def hook(event, args):
        writing = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writing or event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove")) and str(out) in str(args[0]):
            os._exit(9)

    sys.addaudithook(hook)


def test_two_processes_are_one(shop, tmp_path):
    """Catches a mean of means, examples done twice or never, a batch that leaves one process without examples, a loss
    that is one process's own, results in another order, a second process that writes, and a stop that only the process
    which got the signal knows of: the others would wait for it for ever."""
    flags = dict(limit=33, max_steps=11, test_limit=9, lr=0.001)  # the 5th and 10th step have 1 example
    train.main(command(shop, tmp_path / "one", **flags))
    out = tmp_path / "two"
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    for hook, code in ((lambda: stop_in_step(pytest.MonkeyPatch(), 5), 1), (lambda: None, 0)):
        hooks = [lambda: None, lambda hook=hook: (writes_nothing(out), hook())]  # the signal reaches one of them only
        argv, env["MASTER_PORT"] = [*command(shop, out, **flags), "--resume"], free_port()
        pids = [fork(argv, hooks[r], RANK=str(r), LOCAL_RANK=str(r), **env) for r in (0, 1)]
        assert [ended(pid) for pid in pids] == [code, code]
        assert newest(out, "step").name == ("step-000006" if code else "step-000011")
    one, two = essence(tmp_path / "one"), essence(out)
    assert one.keys() == two.keys()
    for a, b in zip(one["metrics.jsonl"], two["metrics.jsonl"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name in (n for n in one if n.endswith(("weights.safetensors", "model.safetensors"))):
        for k, v in load_file(tmp_path / "one" / name).items():
            assert_close(load_file(out / name)[k], v, rtol=1e-5, atol=1e-5)
    for a, b in zip(one["predictions-test.jsonl"], two["predictions-test.jsonl"], strict=True):
        assert a | {"scores": 0} == b | {"scores": 0}
    assert one["results-test.json"][0]["model"] == two["results-test.json"][0]["model"]


# --- the schedule ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dry(shop, tmp_path, monkeypatch):
    """dry(flags) -> what each step would have got, and what was validated on, without computing."""

    def call(**flags):
        steps, valid, scores = [], [], {"valid_nll": 1.0, "valid_NDCG@10": 0.0}
        monkeypatch.setattr(train.Trainer, "step", lambda t, *args: steps.append(args) or (len(steps), False))
        monkeypatch.setattr(train.Trainer, "validate", lambda t, w: valid.append(data.window_examples(w)) or scores)
        monkeypatch.setattr(train.Trainer, "fed", 1, raising=False)
        monkeypatch.setattr(train, "test", lambda *_: None)
        monkeypatch.setattr(train, "save_step", lambda *_: None)
        train.main([*command(shop, tmp_path / "dry", **flags), "--overwrite"])
        return steps, valid

    return call


def test_the_learning_rate_rises_and_falls_to_a_tenth(dry):
    """Catches an off-by-one at either end, a schedule that ignores --max_steps."""
    steps, _ = dry(max_steps=40, warmup=0.1, lr=0.5)
    rates = [lr for _, lr, *_ in steps]
    assert len(rates) == 40
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5]) and max(rates) == 0.5
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False)) and rates[-1] == pytest.approx(0.05)
    assert rates[21] == pytest.approx(0.5 * 0.55)  # halfway down
    assert [lr for _, lr, *_ in dry(max_steps=1, warmup=0, lr=0.5)[0]] == [0.5]


def test_epochs_are_permutations_and_dropout_has_a_seed_a_step(dry):
    """Catches examples left out or seen twice, the same order in every epoch, and the same dropout in every step."""
    steps, _ = dry(epochs=2.5)
    assert [len(e) for e, *_ in steps] == [8, 8, 8, 8, 5] * 2 + [8, 8, 8]  # half an epoch is rounded up
    one, two = ([str(e) for s in steps[a : a + 5] for e in s[0]] for a in (0, 5))
    assert sorted(one) == sorted(two) and one != two and len({seed for *_, seed, _ in steps}) == 13
    other, valid = dry(epochs=2.5, seed=1)
    repeated = [str(e) for s in other[:5] for e in s[0]]
    assert sorted(repeated) == sorted(one) and repeated != one  # --limit draws the same for every seed
    assert not {seed for *_, seed, _ in steps} & {seed for *_, seed, _ in other}


def test_the_log_has_the_mean_loss_since_the_last_line(dry, tmp_path):
    """Catches the last step's loss alone, or the mean since the start."""
    dry(max_steps=7)  # its losses are 1, 2, 3 ..
    log = [json.loads(line) for line in (tmp_path / "dry/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in log] == [(3, 2.0), (6, 5.0), (7, 7.0)]


def test_validation_examples_depend_on_nothing(dry):
    """Catches runs whose validations cannot be compared: other windows by seed, limit, batch or step."""
    several = [v for flags in ({}, dict(seed=3, limit=9, batch=2, max_steps=6)) for v in dry(**flags)[1]]
    assert len(several) == 4 + 2 and len(several[0]) == 5 and all(v == several[0] for v in several)


# --- the command line -----------------------------------------------------------------------------------------------

SAYS = {
    ("--batchsize", "3"): r"unknown argument --batchsize; did you mean --batch\?",
    ("--frobnicate",): "unknown argument --frobnicate; see --help",
    ("--batch", "many"): "argument --batch: invalid int value: 'many'",
    ("--resume", "yes"): "'yes' is neither true nor false",
    ("--loss", "mls"): r"--loss mls is none of lml, msl; did you mean",
    ("--targets", "lsat"): r"--targets lsat is none of auto, last, all; did you mean last\?",
    ("--dtype", "float16"): "--dtype float16 is none of auto, float32, bfloat16",
    ("--model", "smollm2"): r"--model smollm2 is none of tiny, smollm2-135m, .*; did you mean smollm2-135m\?",
    ("--plan", "IN:3 OR:3 CR:3"): "covers 9 layers, but the model has 4",
    ("--plan", "in:4"): "unknown layer kind 'in'",
    ("--batch", "0"): "--batch must be above 0",
    ("--tau", "nan"): "--tau must be above 0",
    ("--max_steps", "0"): "--max_steps must be above 0",
    ("--epochs", "-1"): "--epochs must not be below 0",
    ("--lr", "-0.1"): "--lr must not be below 0",
    ("--seed", "-1"): "--seed must not be below 0",
    ("--limit", "-3"): "--limit must not be below 0",
    ("--lora_dropout", "1.5"): "--lora_dropout is a share",
    ("--warmup", "2"): "--warmup is a share",
    ("--lora_targets", "qproj"): "no block has a linear layer qproj",
}


@pytest.mark.parametrize("argv", SAYS, ids=" ".join)
def test_what_the_user_can_mend_is_one_sentence(argv, own, shop, base):
    """Catches tracebacks, and a finished run that --overwrite removed before the flags were understood."""
    before = files(own)
    model = base if "--lora_targets" in argv else "tiny"
    with pytest.raises(InputError, match=SAYS[argv]) as e:
        train.main([*command(shop, own, model), "--overwrite", *argv])
    assert "\n" not in str(e.value) and files(own) == before


def test_too_few_users_are_one_sentence(shop, tmp_path):
    """Catches a division by zero, and a best model that is simply the first, where there is nothing to validate on."""
    few = write_data(tmp_path / "few", users=2)
    with pytest.raises(InputError, match="0 / .* windows"):
        train.main([*command(few, tmp_path / "out"), "--core", "0"])
    assert not (tmp_path / "out").exists()


def test_too_small_a_memory_names_the_flags(shop, tmp_path, monkeypatch):
    """Catches a traceback from CUDA, and a remedy that --resume then refuses."""
    out, nll, calls = tmp_path / "out", train.Trainer.nll, []

    def too_large(self, b):
        calls.append(1)
        if len(calls) > 10 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nll(self, b)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "nll", too_large)
        with pytest.raises(InputError, match=r"step \d+ does not fit .*--tokens \(now \d+\).*--checkpointing"):
            train.main(command(shop, out, max_steps=9))
    train.main([*command(shop, out, max_steps=9), "--resume", "--tokens", "99", "--checkpointing"])
    assert (out / "results-test.json").exists()


def test_defaults_by_model():
    """Catches a default that overrides what was asked for, or that a pretrained model gets from tiny."""
    asked = dict(targets="last", lr=0.5)
    for model, flags, want in (
        ("tiny", {}, ("all", 1e-3, 0)),
        ("smollm2-135m", {}, ("last", 3e-4, 8)),
        ("smollm2-135m", {"lora": 0}, ("last", 1e-4, 0)),
        ("tiny", asked, ("last", 0.5, 0)),
        ("path", asked | {"targets": "all", "lora": 2}, ("all", 0.5, 2)),
    ):
        f = train.resolve(train.Flags(model=model, **flags))
        assert (f.targets, f.lr, f.lora) == want


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_auto_is_bfloat16_where_a_cpu_multiplies_it(monkeypatch):
    """Catches half precision on a CPU that would emulate it, or for tiny, whose numbers should be any CPU's."""
    for has, model, want in (
        ({"avx512_bf16": True}, "smollm2-135m", torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, "path", torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, "path", torch.float32),
        ({"avx512_bf16": True}, "tiny", torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert common.device_and_dtype("auto", model)[1] == want
        assert common.device_and_dtype("float32", model)[1] == torch.float32


def test_the_command_itself(shop, tmp_path):
    """Catches a traceback or exit code 0 outside of main, once in a real process."""
    ran = subprocess.run([sys.executable, "train.py", "--batchsize", "3"], cwd=REPO, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "error: unknown argument --batchsize; did you mean --batch?\n"


@pytest.mark.parametrize(
    "error, says",
    [
        (InputError("no"), "error: no"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_run_turns_what_the_user_can_mend_into_an_exit(error, says, monkeypatch):
    """Catches a traceback for a disk that is full where no checkpoint is written."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit, match=says.replace("[", r"\[")):
        common.run(main)


def test_help_names_every_flag_with_its_default(capsys):
    """Catches a field without a comment, or a comment with a % that argparse chokes on."""
    with pytest.raises(SystemExit) as e:
        parse_flags(train.Flags, ["--help"], train.__doc__)
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and all(f"--{name}" in text for name in train.Flags.__dataclass_fields__)
    assert "of the initial weights, the order of the examples, dropout (default: 0)" in text


def test_flags_are_typed():
    """Catches --resume false that is true, as any non-empty text is."""
    f = parse_flags(train.Flags, "--resume --compile false --lr 1e-3 --batch=7 --plan".split() + ["IN:1 OR"], "")
    assert (f.resume, f.compile, f.lr, f.batch, f.plan, f.tau) == (True, False, 1e-3, 7, "IN:1 OR", 1.0)


# --- files that are whole -------------------------------------------------------------------------------------------


def test_newest_counts_and_does_not_spell(tmp_path):
    """Catches an order by name (step-999999 after step-1000000), and unfinished folders."""
    assert newest(tmp_path / "none", "step") is None
    for name in ("step-999999", "step-1000000", "step-2000000.part", "best-3000000", "step-x"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path, "step").name == "step-1000000"


def test_write_folder_and_write_json_are_whole_or_not_there(tmp_path, monkeypatch):
    """Catches an old version that is lost when the new one fails, and what a killed process left in the way."""
    place = tmp_path / "best-000001"
    (tmp_path / "best-000001.part").mkdir()
    (tmp_path / "best-000001.part/rubbish").write_text("x")
    write_folder(place, lambda folder: (folder / "a").write_text("1"))
    assert files(tmp_path) == {"best-000001/a": b"1"}
    write_json(tmp_path / "x.json", {"a": 1})
    before = files(tmp_path)
    with pytest.raises(InputError, match="could not be written"):
        write_folder(place, lambda folder: (folder / "none/a").write_text("2"))
    monkeypatch.setattr(common, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(InputError, match="x.json could not be written"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert files(tmp_path) == before


@pytest.mark.parametrize("n, size", [(7, 3), (2, 3), (0, 2), (6, 2)])
def test_gather_undoes_the_sharing(n, size, monkeypatch):
    """Catches predictions that are attributed to other users when the windows do not divide evenly."""
    values, world = list(range(n)), World()
    world.size = size
    fake = lambda parts, own: parts.__setitem__(slice(None), [values[r::size] for r in range(size)])  # noqa: E731
    monkeypatch.setattr(common.dist, "all_gather_object", fake)
    assert world.gather(values[1::size]) == values
