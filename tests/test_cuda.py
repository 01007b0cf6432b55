"""What a GPU computes is what a CPU computes. `python -m extras.gpu` runs this; by hand, HATLLM_TEST_DEVICE=cuda
python -m pytest tests/test_cuda.py. With =cpu it compares the CPU with itself, to try it out."""

import contextlib
import os

import pytest
import torch
from conftest import tiny_model
from test_bench import TITLES, write_shop

import data
import eval
import train
from decode import Decoder
from hatllm import Layout
from model import attend, save

DEVICE = os.environ.get("HATLLM_TEST_DEVICE")
pytestmark = pytest.mark.skipif(DEVICE is None, reason="asked for by HATLLM_TEST_DEVICE=cuda")
PLAN = "IN-closed:1 IN:1 OR CR-last:1"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder that is a small data set and a small model."""
    place, tokenizer = tmp_path_factory.mktemp("shop"), data.train_tokenizer(TITLES)
    write_shop(place)
    save(tiny_model(vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=True, head_dim=16), place)
    tokenizer.save(str(place / "tokenizer.json"))
    return place


@contextlib.contextmanager
def on(device: str):
    """train.py and eval.py compute there, in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval, "device_and_dtype", lambda *_: (torch.device(device), torch.float32))
        yield


@contextlib.contextmanager
def no_waits():
    """Whatever makes the CPU wait for the GPU raises."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def flags(shop, *more) -> list[str]:
    shop = str(shop)
    return ["--data", shop, "--model", shop, "--plan", PLAN, "--dropout", "0", "--batch", "6", *map(str, more)]


def test_there_is_the_device():
    assert DEVICE == "cpu" or torch.cuda.is_available()


@pytest.mark.parametrize("kind", [["--lora", 0, "--targets", "all"], ["--lora", 0, "--loss", "lml"], ["--lora", 4],
                                  ["--lora", 0, "--plan", "IN:1 OR CR:1"]], ids=str)  # fmt: skip
def test_training(kind, shop, monkeypatch):
    """Three updates give the CPU's losses and weights, and wait for nothing."""
    monkeypatch.setattr(train, "LORA_DROPOUT", 0.0)
    monkeypatch.setattr(train, "ROW", 384)  # so that a forward has several rows, and a row several blocks
    found = []
    for device, pack in (("cpu", False), (DEVICE, True)):
        with on(device):
            r = train.Run(train.resolve(train.make_parser().parse_args(flags(shop, *kind, "--batch", 32))))
        r.model.train()
        r.pool += [data.Example(e.history[:1], [(1, e.targets[0][1])]) for e in r.pool]
        r.pack = pack
        steps, losses = [train.get_batch(r, i) for i in range(3)], []
        assert pack == any(b.start is not None and b.start.any() for step in steps for b in step.forwards)
        for batch in steps if pack else ():  # compiles the kernel, which waits
            for b in batch.forwards:
                train.loss_of(r, b).backward()
        r.model.zero_grad()
        with no_waits() if pack else contextlib.nullcontext():
            for i, batch in enumerate(steps):
                losses.append(train.update(r, i, batch, 1e-3))  # more, and AdamW's sign of a rounding shows
        found.append([*losses, *r.params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("score", ["trie", "full"])
def test_search(score):
    """The same lists, and scores to 1e-4, with the item cache and the score of a target."""
    tokenizer = data.train_tokenizer(TITLES)
    model = tiny_model(PLAN, vocab_size=tokenizer.get_vocab_size())
    cat = data.Catalogue(TITLES, tokenizer, model.config)
    prompts = data.collate_prompts(cat, [[0, 3, 9], [5], [2, 8, 11, 4]])
    found = []
    for device in ("cpu", DEVICE):
        decoder = Decoder(model.to(device), cat.trie, score)
        decoder.remember(cat.texts)
        tokens, item, source = (x.to(device) for x in prompts)
        target = cat.trie.leaf_of_item[[1, 2, 3]].to(device)
        found.append(decoder.search(tokens, item, 5, 4, source=source, target=target))
    cpu, other = found
    assert torch.equal(cpu.leaf, other.leaf.cpu()) and torch.equal(cpu.exact, other.exact.cpu())
    torch.testing.assert_close((cpu.score, cpu.target), (other.score.cpu(), other.target.cpu()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_run_that_is_stopped_and_tested(dtype, shop, tmp_path, monkeypatch):
    """Checkpoints go to the device and back, so that a stopped run ends as one that was never stopped, within what the
    order of a GPU's sums changes; in bf16 such small weights may move far, and it is only to come to its end."""
    argv = flags(shop, "--lora", 0, "--max_steps", 6, "--eval_every", 3, "--dtype", dtype)
    train.main([*argv, "--out", str(tmp_path / "whole")])
    real, steps = train.update, []

    def stop_in_fifth(*a):
        steps.append(a)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(*a)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update", stop_in_fifth)
        train.main([*argv, "--out", str(tmp_path / "parts")])
    train.main([*argv, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (eval.load_run(tmp_path / name)[0] for name in ("whole", "parts"))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert a.isfinite().all() and (dtype == "auto" or torch.allclose(a, b, atol=1e-3))
    assert (tmp_path / "parts/results-test.json").exists()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("T", [8, 64, 72, 192, 264])
def test_attention_in_bfloat16(T, blocks):
    """Forward and backward as far from fp32 as bf16 is, at lengths for which GPUs have had faulty kernels."""
    if blocks and DEVICE == "cpu":
        pytest.skip("torch has this kernel's gradients on a GPU only")
    eval.device_and_dtype("bfloat16", False)  # chooses among them
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 64, generator=g) for heads in (12, 4, 4))
    seen = torch.rand(2, T, T, generator=g) < 0.5
    seen[..., 0] = True
    results = []
    for device, dtype in (("cpu", torch.float32), (DEVICE, torch.bfloat16)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        item = torch.zeros(2, T, dtype=torch.long, device=device)
        lay = Layout(item, item, seen.to(device))
        there = blocks and device != "cpu"
        y = attend(*inputs, lay.block_mask("OR") if there else lay.additive_mask("OR", 3, dtype))
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        error = (a - b.cpu().float()).norm() / a.norm()
        assert float(error.detach()) < 0.02  # NaN is no less
