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

TITLES = ["red pen", "red pencil", "blue ink", "blue", "ink well", "well", "paper", "paper clip", "big red box",
          "box of pens", "green box", "pen", "clip", "blue"]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A data set and a Llama folder, as flags."""
    pytest.importorskip("transformers")
    place, rng = tmp_path_factory.mktemp("bench"), random.Random(0)
    lines = [f"u{u}\t{' '.join(str(rng.randrange(14)) for _ in range(9))}\t{u} 5 5 5 6 7 8 9 10" for u in range(5)]
    lines += [f"v{u}\t{' '.join(map(str, range(u, 14)))}\t{' '.join(map(str, range(u, 14)))}" for u in range(9)]
    (place / "items.tsv").write_text("\n".join(["item_id\ttitle", *(f"{i}\t{t}" for i, t in enumerate(TITLES))]))
    (place / "sequences.tsv").write_text("\n".join(["user_id\titem_ids\ttimes", *lines]))
    tokenizer = train_tokenizer(TITLES)
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


def test_train(places, capsys, monkeypatch):
    """The losses stay together while the adapters learn, and where all targets share one forward on our side."""
    pytest.importorskip("peft")
    monkeypatch.setitem(bench.train.RATES, "lora", 0.003)
    out = result(["train", *places], capsys)
    _, last, _, every = out["rows"]
    assert last["targets"] == 4 < every["targets"]
    assert out["losses agree"] and max(last["gap"], every["gap"]) < 1e-4


def test_cache(places, capsys):
    assert 0 < result(["cache", *places], capsys)["rows"][1]["gap"] < 1e-4


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
