"""extras/bench.py: both sides of a comparison compute the same thing, on a tiny Llama with spread-out weights."""

import json
import random

import pytest
import torch
from conftest import tiny_model

from data import Catalogue, collate_prompts, train_tokenizer
from decode import Decoder
from extras import bench
from model import save

pytestmark = pytest.mark.usefixtures("frozen_heap")
TITLES = ["red pen", "red pencil", "blue ink", "blue", "ink well", "well", "paper", "paper clip", "big red box",
          "box of pens", "green box", "pen", "clip", "blue"]  # fmt: skip


def write_shop(place):
    """A data set of 14 items and 14 users."""
    rng = random.Random(0)
    lines = [f"u{u}\t{' '.join(str(rng.randrange(14)) for _ in range(9))}\t{u} 5 5 5 6 7 8 9 10" for u in range(5)]
    lines += [f"v{u}\t{' '.join(map(str, range(u, 14)))}\t{' '.join(map(str, range(u, 14)))}" for u in range(9)]
    (place / "items.tsv").write_text("\n".join(["item_id\ttitle", *(f"{i}\t{t}" for i, t in enumerate(TITLES))]))
    (place / "sequences.tsv").write_text("\n".join(["user_id\titem_ids\ttimes", *lines]))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A data set and a Llama folder, as flags."""
    pytest.importorskip("transformers")
    place, tokenizer = tmp_path_factory.mktemp("bench"), train_tokenizer(TITLES)
    write_shop(place)
    save(tiny_model(vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=True), place)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "source.json").write_text('{"holds": "noise"}')
    return ["--data", str(place), "--model", str(place), "--rounds", "2", "--users", "3", "--batch", "4"]


def result(argv: list[str], capsys) -> dict:
    bench.main(argv)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_decode(places, capsys):
    """A beam as wide as the catalogue drops nothing on either side: the same lists and scores, with padded prompts."""
    out = result(["decode", *places, "--beams", "13"], capsys)
    assert out["base_source"] == "noise" and len(out["rows"]) == 6
    for row in [*out["rows"][1:3], *out["rows"][4:]]:
        assert (row["exact"], row["equal"], row["common"]) == (1, 3, 1) and row["gap"] < 1e-4


@pytest.mark.parametrize(("lora", "work"), ((8, 4), (0, 6)))
def test_train(lora, work, places, capsys, monkeypatch):
    """The losses stay together while the model learns, where all targets share one forward on our side, and where a
    step needs several. A token costs so many FLOPs a weight of the layers: 2 forward, 2 or 4 backward."""
    pytest.importorskip("peft")
    monkeypatch.setattr(bench.train, "RATES", {"lora": 0.003, "full": 0.003})
    monkeypatch.setattr(bench, "PEAK", {"CPU": 1e9})
    out = result(["train", *places, "--lora", str(lora), "--tokens", "100"], capsys)
    theirs, last, _, every = out["rows"]
    assert last["targets"] == 4 < every["targets"]
    assert out["losses agree"] and max(last["gap"], every["gap"]) < 1e-4
    tokens = [row["tokens/s"] / row["targets/s"] for row in (theirs, last)]
    assert tokens[0] - tokens[1] == pytest.approx(1)  # they feed the end token, too
    weights = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 4 * lora * (32 + 32 + 32 + 16)
    assert last["MFU"] == pytest.approx(work * weights * last["tokens/s"] / 1e9)


def test_card():
    """A million weights, 6 FLOPs each, 100 million tokens/s: 600 TFLOP/s of 989."""
    model = torch.nn.Module()
    model.layers = torch.nn.Linear(1000, 1000, bias=False)
    assert bench.mfu(model, 1e8, "NVIDIA H100 80GB HBM3") == pytest.approx(6e14 / 989e12)
    assert bench.mfu(model, 1e8, "NVIDIA H100 PCIe") == pytest.approx(6e14 / 756e12)
    assert bench.mfu(model, 1e8, "8 CPU threads") is None


@pytest.mark.parametrize("plan", [[], ["--plan", "IN-closed:1/2 CR-last"]])
def test_cache(places, plan, capsys):
    assert 0 < result(["cache", *places, *plan], capsys)["rows"][1]["gap"] < 1e-4


def test_agreement_sees_differences():
    tokenizer = train_tokenizer(TITLES)
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    cat = Catalogue(TITLES, tokenizer, model.config)
    ranking = Decoder(model, cat.trie).search(*collate_prompts(cat, [[0, 3, 9], [5], [2, 8, 11, 4]])[:2], 3)
    lists = [list(zip(*x, strict=True)) for x in zip(ranking.leaf.tolist(), ranking.score.tolist(), strict=True)]
    same = bench.agreement(ranking, lists)
    assert [same[x] for x in ("exact", "equal", "common", "gap")] == [1, 3, 1, 0]
    lists = [lists[0][::-1], [(leaf, score + 1) for leaf, score in lists[1]], [*lists[2][:2], (-1, -9.0)]]
    other = bench.agreement(ranking, lists)
    assert (other["equal"], other["gap"]) == (1, 1) and other["common"] == pytest.approx(8 / 9)


def test_rounds_alternate_and_memory_is_seen():
    calls, _ = [], torch.ones(50 * 2**20).sum()  # an older, higher peak
    sides = {name: lambda r, name=name: calls.append(name) or float(torch.ones(5 * 2**20).sum()) + r for name in "ab"}
    runs = bench.in_turns(sides, 3, "calls", 1)
    assert "".join(calls) == "abbaab" and runs["b"][0] == tuple(5 * 2**20 + r for r in range(3))
    assert all(row["MiB"] == 0 or 15 < row["MiB"] < 60 for _, row in runs.values()) and runs["a"][1]["ratio"] == 1


def test_a_ratio_above_one_is_faster(monkeypatch):
    """The first round does not count; the ratio is that of a round."""
    monkeypatch.setattr(bench, "measure", lambda f, r: (None, f(r), 0.0))
    sides = {"theirs": [9.0, 2.0, 8.0, 6.0].__getitem__, "ours": [1.0, 1.0, 2.0, 3.0].__getitem__}
    theirs, ours = (row for _, row in bench.in_turns(sides, 4, "users", 6).values())
    assert (theirs["users/s"], ours["users/s"], theirs["ratio"], ours["ratio"]) == (1, 3, 1, 2)
