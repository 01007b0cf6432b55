"""bench.py: both sides of a comparison compute the same thing, on a tiny Llama with random weights."""

import pytest
import torch
from conftest import tiny_model

import bench
import model as llama
import train as training
from common import World
from data import Catalogue, Example, collate_prompts, train_tokenizer
from decode import Decoder
from hatllm import InputError

TITLES = ["red pen", "red pen", "red pencil", "blue ink", "blue", "ink well", "well", "paper", "paper clip",
          "big red box", "box of pens", "green box", "pen", "clip"]  # fmt: skip
HISTORIES = [[0, 3, 9], [5], [2, 8, 11, 4]]


@pytest.fixture
def parts():
    pytest.importorskip("transformers")
    tokenizer = train_tokenizer(TITLES, 300)
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    return model, Catalogue(TITLES, tokenizer, model.config.eos_token_id)


@pytest.mark.parametrize("score", ["trie", "full"])
def test_decode_sides_agree(parts, score):
    """A beam as wide as the catalogue drops nothing on either side: same lists and scores, with padded prompts."""
    model, cat = parts
    tokens, item = collate_prompts(cat, HISTORIES)[:2]
    theirs = bench.Generate(bench.transformers_model(model), cat, model.config.eos_token_id)
    found = theirs.search(tokens, item, 10, 13, score)
    ranking = Decoder(model, cat.trie, score).search(tokens, item, 10, 13)
    result = bench.agreement(ranking, found)
    assert result["exact"] == 1 and result["equal"] == 3 and result["common"] == 1 and result["gap"] < 1e-4
    assert theirs.fed[0] == 13 * tokens.numel()  # generate() feeds the prompt once a beam


def test_agreement_sees_differences(parts):
    model, cat = parts
    tokens, item = collate_prompts(cat, HISTORIES)[:2]
    ranking = Decoder(model, cat.trie).search(tokens, item, 3)
    lists = [list(zip(*x, strict=True)) for x in zip(ranking.leaf.tolist(), ranking.score.tolist(), strict=True)]
    assert bench.agreement(ranking, lists) == {"exact": 1, "equal": 3, "common": 1, "gap": 0, "higher": 0}
    lists[0] = lists[0][::-1]
    lists[1] = [(leaf, score + 1) for leaf, score in lists[1]]
    lists[2] = [*lists[2][:2], (-1, -9.0)]
    result = bench.agreement(ranking, lists)
    assert [result[x] for x in ("exact", "equal", "gap")] == [1, 1, 1] and result["common"] == pytest.approx(8 / 9)
    lower = 3 * 1 + (-9 - float(ranking.score[2, 2]))  # what was added to the scores above
    assert result["higher"] == pytest.approx(-lower / 9, abs=1e-4)


def test_train_sides_agree(parts):
    """Three updates on the same windows: the losses stay together, and they move."""
    pytest.importorskip("peft")
    model, cat = parts
    theirs = bench.transformers_model(model)
    f = training.Flags(loss="lml", lora_dropout=0.0, lr=1e-2, tokens=10**9)
    llama.add_lora(model, f.lora, f.lora_alpha, 0.0, f.lora_targets)
    theirs = bench.Finetune(theirs, model, cat, f)
    ours = training.Trainer(f, model, cat, World(), torch.device("cpu"), torch.float32)
    examples = [Example(h, [(len(h), t)]) for h, t in zip(HISTORIES, (7, 1, 12), strict=True)]
    a, b = ([t.step(examples, f.lr, 0, False)[0] for _ in range(3)] for t in (ours, theirs))
    assert a == pytest.approx(b, abs=1e-4) and a[0] - a[2] > 0.01


def test_measure_and_split():
    """40 MiB that a call needs are seen, and a method's time is not counted in that of its caller."""
    value, seconds, mib = bench.measure(lambda: float(torch.ones(10 * 2**20).sum()))
    assert value == 10 * 2**20 and seconds > 0 and (mib != mib or 30 < mib < 80)

    class Work:
        def outer(self):
            return self.inner()

        def inner(self):
            return torch.ones(500, 500) @ torch.ones(500, 500)

    work = Work()
    seconds = bench.split(work.outer, {"outer": (work, "outer"), "inner": (work, "inner")})
    assert seconds["inner"] > seconds["outer"] >= 0 and not vars(work)


def test_in_turns_alternates():
    calls, clock = [], bench.now()
    sides = {name: lambda r, name=name: calls.append((name, r)) or r for name in "ab"}
    runs = bench.in_turns(sides, 2)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1)] and bench.now() > clock
    assert runs["b"][0] == (0, 1) and runs["a"][1]["ratio"] == 1


def test_errors_are_sentences():
    for argv in ([], ["decod"], ["decode", "--beam", "3"], ["train", "--clock", "sun"]):
        with pytest.raises(InputError):
            bench.main(argv)
