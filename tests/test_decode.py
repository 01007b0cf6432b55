"""decode.py against brute force: every title of a small catalogue scored by a forward pass of its own."""

import itertools
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from conftest import PLANS, data_root, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
import decode
from data import Catalogue, Example, Trie
from decode import Decoder
from hatllm import TARGET, layout
from model import Llama
from train import full_nll, trie_nll

SCORES = ("trie", "full")
END = 1
HAT = "IN:1 OR:2 CR:1"


@cache
def trie(kind: str = "many") -> Trie:
    """Titles of the tokens 5 .. 11: one may begin another, parts where one token alone can follow, items that share."""
    rng = np.random.default_rng(0)
    titles = [rng.integers(5, 12, rng.integers(1, 6)).tolist() for _ in range(60)]
    titles += [[5], [5, 6], [5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23], [20, 21, 22, 24, 25], titles[0]]
    near = [t for x in range(5, 45) for t in ([x], [x, 3])]  # see nearly_tied
    titles = {"many": titles, "few": titles[:4], "one": [[7, 8, 9]], "end": [[7]], "near": near}[kind]
    return Trie([np.array([*t, END]) for t in titles])


LENGTHS = (20, 13, 17)


@cache
def prompts() -> tuple[Tensor, Tensor]:
    """tokens, item (3, 20): three prompts of different lengths, right-padded."""
    item = [[0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 3, 3, 3, 0, 4, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0],
            [0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 3, 3, 3, 0, 0]]  # fmt: skip
    tokens = torch.randint(5, 40, (3, 20), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([i + [-1] * (20 - len(i)) for i in item])


@cache
def model(plan: str) -> Llama:
    return tiny_model(plan)


@cache
def brute(plan: str, score: str, kind: str = "many", tau: float = 1.0) -> Tensor:
    """(B, L) log-probabilities: the prompt and one title, teacher-forced, without cache, tree or batch of lengths."""
    t, m, (tokens, item) = trie(kind), model(plan), prompts()
    out = torch.zeros(len(tokens), t.n_leaves)
    paths = [t.token[t.path_node[t.start[x] : t.start[x + 1]]] for x in range(t.n_leaves)]
    for b, n in enumerate(LENGTHS):
        # rows of one title each, padded at the end, where causal attention never looks
        text = torch.stack([torch.cat((tokens[b, :n], p[:-1], p.new_zeros(12 - len(p)))) for p in paths])
        kinds = torch.stack([torch.cat((item[b, :n], torch.full((11,), TARGET))) for _ in paths])
        with torch.no_grad():
            z = m.logits(m(text, layout(kinds)))[:, n - 1 :] / tau
        for x, p in enumerate(paths):
            node = 0
            for i, token in enumerate(p.tolist()):
                may = t.token[t.child[node] : t.child[node] + t.fan[node]]
                among = z[x, i] if score == "full" else z[x, i, may]
                out[b, x] += z[x, i, token] - among.logsumexp(-1)
                node = int(t.child[node]) + may.tolist().index(token)
    return out


@torch.inference_mode()
def score_all(d: Decoder, tokens: Tensor, item: Tensor) -> Tensor:
    """(B, L) log-probabilities of all titles, by the decoder: each after a prompt of its own."""
    L = d.trie.n_leaves
    state, h = d.prefill(tokens.repeat_interleave(L, 0), item.repeat_interleave(L, 0))
    return d.score_after(state, h, torch.arange(L).repeat(len(tokens))).view(-1, L)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() < tolerance).all())


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("plan", PLANS)
def test_search_is_brute_force(plan, score):
    """Whatever k and the beam; a wrong mask, position or bound would change it."""
    t, truth = trie(), brute(plan, score)
    few = ((10, 1, 1024), (10, 50, 1024))
    more = ((1, 1, 1024), (1, 4, 1024), (3, 2, 1024), (t.n_leaves, 30, 1024), (10, 99, 0))  # nothing overflows 99
    for k, width, patience in few + more if plan == HAT else few:
        r, best = Decoder(model(plan), t, score).search(*prompts(), k, width, patience), truth.topk(k)
        assert r.leaf.tolist() == best.indices.tolist() and close(r.score, best.values) and r.exact.all()


def nearly_tied() -> Llama:
    """After any text the end is near certain, and all other tokens are about equally likely: a prefix scores hardly
    more than its title, and hardly more than any other title."""
    m = tiny_model(HAT, 3)
    m.embed_tokens.weight.data[:, 0] += 20  # makes h[0] about sqrt(d) everywhere
    m.norm.weight.data[:] = 1
    m.lm_head.weight.data *= 0.02
    m.lm_head.weight.data[:, 0] = 0
    m.lm_head.weight.data[END, 0] = 2
    return m


@pytest.mark.parametrize("score", SCORES)
def test_search_among_near_ties(score):
    """Catches a bound with slack: what is within 0.05 of the k-th title may still be better."""
    t, m = trie("near"), nearly_tied()
    d = Decoder(m, t, score)
    truth = score_all(d, *prompts()).sort(1, descending=True)
    assert (truth.values[:, 0] - truth.values[:, 39] < 0.05).all()
    for k in (1, 5, 10, 40):
        for width in (2, 7, 20, 99):
            r = d.search(*prompts(), k, width)
            assert close(r.score, truth.values[:, :k], 1e-5) and r.exact.all()
            assert all(len(set(leaves)) == k for leaves in r.leaf.tolist())


@pytest.mark.parametrize("score", SCORES)
def test_certificate(score):
    """A plain beam search that says it is exact must be. Both answers occur, and a miss is never certified; without a
    bound all would be, with a careless one none."""
    said, right, t = [], [], trie()
    for seed in range(4):
        d = Decoder(tiny_model(HAT, seed + 1), t, score)
        truth = score_all(d, *prompts()).topk(5).indices
        for width in (1, 5, 12, 40):
            r = d.search(*prompts(), 5, width, patience=0)
            said += r.exact.tolist()
            right += (r.leaf == truth).all(1).tolist()
    assert all(ok for sure, ok in zip(said, right, strict=True) if sure)
    assert 5 < sum(said) < len(said) - 5 and not all(right)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ["few", "one", "end"])
def test_small_catalogues(kind, score):
    """Fewer titles than k: all of them, then -1 and -inf; a catalogue of one title, of one token."""
    t, truth, d = trie(kind), brute("OR", score, kind), Decoder(model("OR"), trie(kind), score)
    r, n, best = d.search(*prompts(), 10, 2), t.n_leaves, truth.topk(t.n_leaves)
    assert r.leaf[:, :n].tolist() == best.indices.tolist() and close(r.score[:, :n], best.values)
    assert (r.leaf[:, n:] == -1).all() and (r.score[:, n:] == -torch.inf).all() and r.exact.all()
    assert close(score_all(d, *prompts()), truth)
    if n == 1 and score == "trie":
        assert (r.score[:, 0] == 0).all()  # certain


@pytest.mark.parametrize("score", SCORES)
def test_a_batch_is_its_users_one_by_one(score):
    """Catches padding or other users' columns that reach someone, a user for whom the model is flat and who holds up
    the others, and patience of the batch: lists and tokens read are those of each user alone."""
    d = Decoder(tiny_model(HAT, 5), trie(), score)
    n = torch.randint(8, 20, (4,)).tolist()
    item = torch.tensor([[0, 1, 1, 0, 2, 2, 2, *[0] * (x - 7), *[-1] * (20 - x)] for x in n])
    tokens = torch.randint(5, 40, (4, 20))
    busy = d.search(tokens, item, 5, 1).fed
    assert busy.max() > 1.25 * busy.min()
    for width, patience in ((3, 1024), (1, int(busy.min()) // 2), (2, 5), (2, 8), (4, 8)):
        r = d.search(tokens, item, 5, width, patience=patience)
        assert width in (2, 4) or bool(r.exact.all()) == (patience == 1024)
        for b, length in enumerate(n):
            one = d.search(tokens[b : b + 1, :length], item[b : b + 1, :length], 5, width, patience=patience)
            assert (one.leaf[0].tolist(), one.fed, one.exact) == (r.leaf[b].tolist(), r.fed[b], r.exact[b])
            assert close(one.score[0].clamp(min=-99), r.score[b].clamp(min=-99))  # -inf: no title


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("patience", [0, 1, 20])
def test_patience_ends_the_search_honestly(patience, score):
    """Catches an endless loop, wrong scores or order of what was found, and a certificate where titles are missing."""
    truth = brute("OR", score)
    r = Decoder(model("OR"), trie(), score).search(*prompts(), 10, 1, patience=patience)
    for b in range(3):
        found = r.leaf[b][r.leaf[b] >= 0]
        assert len(found) and close(r.score[b, : len(found)], truth[b, found])
        assert (r.score[b, len(found) :] == -torch.inf).all() and r.score[b].tolist() == sorted(r.score[b])[::-1]
        assert not r.exact[b] or r.leaf[b].tolist() == truth[b].topk(10).indices.tolist()
    assert patience == 20 or not r.exact.any()


@pytest.mark.parametrize("score", SCORES)
def test_what_overflowed_is_dropped_when_patience_ends(score):
    """At once, so that patience which the first beam spends is a plain beam search."""
    t, one = trie(), [x[:1] for x in prompts()]
    d = Decoder(model(HAT), t, score)
    beam = d.search(*one, 10, 1, patience=0)
    assert d.search(*one, 10, 1, patience=int(beam.fed)).fed == beam.fed < d.search(*one, 10, 1).fed


def test_divide_by_its_example():
    """The docstring's six prefixes, as two users of one batch and in any order, land where it says."""
    names, scores, depths = zip(*re.findall(r'"(\S+)" +(-\d\.\d) +(\d)', decode.divide.__doc__), strict=True)
    for order in itertools.permutations(range(6)):
        user, at = torch.tensor([0] * 6 + [1] * 6), torch.tensor([*range(6), *order])
        p = decode.Prefixes(user, at, torch.tensor([*map(float, scores)])[at], torch.zeros(12, dtype=torch.bool))
        whole, depth = torch.tensor([n.endswith("$") for n in names])[at], torch.tensor([*map(int, depths)])[at]
        *parts, given_up = decode.divide(p, whole, depth, 2, 1, torch.zeros(2, dtype=torch.bool))
        found = [[names[n] for n in part.node] for part in parts]
        assert found == [["ink$", "pen$"] * 2, ["inkw", "bl"] * 2, ["re"] * 2]
        assert [names[n] for part in parts for n in part.node[part.deferred]] == ["bl"] * 2
        assert given_up.tolist() == [-math.inf] * 2
    late = torch.tensor([True, False])  # what was deferred waits for all others, though it is shorter and better
    p = decode.Prefixes(torch.zeros(2, dtype=torch.long), torch.arange(2), torch.tensor([-1.0, -2.0]), late)
    _, waits, beam, _ = decode.divide(p, late & False, torch.tensor([1, 3]), 2, 1, torch.zeros(1, dtype=torch.bool))
    assert (waits.node.tolist(), beam.node.tolist()) == ([0], [1])


def test_temperature():
    """tau divides the logits before they are normalised, in search and score alike. Full scores know none: half of
    the formula divided would make scores grow along a title, and the certificate a lie."""
    for score, tau in (("trie", 0.5), ("full", 1.0)):
        truth, d = brute("OR", score, tau=tau), Decoder(model("OR"), trie(), score, tau=0.5)
        assert close(score_all(d, *prompts()), truth)
        assert close(d.search(*prompts(), 10).score, truth.topk(10).values)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("plan", PLANS)
def test_search_tells_the_score_of_a_target(plan, score):
    """Listed or not, first or last; and the lists are those of a search that was not asked."""
    truth, d = brute(plan, score), Decoder(model(plan), trie(), score)
    plain = d.search(*prompts(), 5, 3)
    assert plain.target.isnan().all()
    for target in (truth.argmax(1), truth.argmin(1), torch.tensor([0, 3, trie().n_leaves - 1])):
        r = d.search(*prompts(), 5, 3, target=target)
        assert close(r.target, truth.gather(1, target[:, None])[:, 0])
        assert r.leaf.tolist() == plain.leaf.tolist() and close(r.score, plain.score, 1e-6)


def test_full_scores_in_half_precision():
    """Catches a numerator and a denominator of different rounding: probabilities above 1, and ties of 1/8 nat."""
    t, m = trie(), tiny_model(HAT)
    m.lm_head.weight.data *= 12  # near certain tokens
    m = m.to(torch.bfloat16)
    nodes = torch.nonzero(t.fan > 0).flatten()
    with torch.no_grad():
        h = torch.randn(len(nodes), 32).to(torch.bfloat16)
        row, child, logp = Decoder(m, t, "full").expand(h, nodes)
        expected = (h.float() @ m.head.float().T).log_softmax(1)[row, t.token[child]]
    assert logp.dtype == torch.float32 and close(logp, expected, 1e-4)
    assert logp.max() <= 1e-5 and logp.max() > -0.01
    assert torch.zeros(len(nodes)).index_add(0, row, logp.exp()).max() <= 1 + 1e-5


# --- the score of a given title ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("plan", PLANS)
def test_score_is_a_full_forward(plan, score, monkeypatch):
    """All titles, also where the head's rows are cut. The probabilities of a catalogue sum to one; over the whole
    vocabulary to less."""
    truth, d = brute(plan, score), Decoder(model(plan), trie(), score)
    monkeypatch.setattr(decode, "ROWS", 7)
    found = score_all(d, *prompts())
    assert close(found, truth)
    assert close(found.exp().sum(1), torch.ones(3), 1e-5) if score == "trie" else (found.exp().sum(1) < 0.999).all()
    assert close(d.search(*prompts(), 10, 4).score, truth.topk(10).values)  # ROWS cuts there, too


@cache
def office() -> tuple[Catalogue, data.Dataset, Llama]:
    d = data.load(data_root("office"))
    tokenizer = data.train_tokenizer(d.titles)
    m = tiny_model("IN-closed:2 OR:1 CR:1", vocab_size=tokenizer.get_vocab_size(), eos_token_id=0)
    return Catalogue(d.titles, tokenizer, m.config), d, m


def test_a_real_catalogue_sums_to_one():
    """With titles that items share and titles that begin others; and its top 10."""
    cat, d, m = office()
    tokens, item, _ = data.collate_prompts(cat, [w.history for w in d.test[:2]])
    decoder = Decoder(m, cat.trie)
    every, r = decoder.search(tokens, item, cat.trie.n_leaves, 200, 10**6), decoder.search(tokens, item)
    assert close(every.score.exp().sum(1), torch.ones(2))
    assert r.leaf.tolist() == every.leaf[:, :10].tolist() and r.exact.all()


# --- the item cache -------------------------------------------------------------------------------------------------


def check_item_cache(m: Llama, cat: Catalogue, histories: list[list[int]]):
    tokens, item, source = data.collate_prompts(cat, histories)
    plain, cached = Decoder(m, cat.trie), Decoder(m, cat.trie)
    cached.remember(cat.titles)
    assert (cached.states is not None) == (m.plan[0] == "IN-closed")
    with torch.inference_mode():
        state, h = cached.prefill(tokens, item, source)
        assert close(h, plain.prefill(tokens, item)[1])
    kept = [k.shape[2] for k in state.cache.k]  # of the prompt, by layer
    assert [n == 0 for n in kept] == [i < cached.closed for i in range(len(kept))]
    target = torch.arange(len(histories))
    a, b = (d.search(tokens, item, 5, source=s, target=target) for d, s in ((plain, None), (cached, source)))
    assert a.leaf.tolist() == b.leaf.tolist() and close(a.score, b.score) and close(a.target, b.target)


@pytest.mark.parametrize("prompt", [data.PROMPT, ("", "", "")], ids=["", "no context"])
@pytest.mark.parametrize("plan", ["IN-closed", "IN-closed:2 OR:1 CR:1", "OR:2 IN-closed:2", "IN-closed:1 IN:3"])
def test_item_cache(plan, prompt, monkeypatch):
    """With leading IN-closed layers a title's states are computed once for all users: the same lists and scores, also
    for items that share a title, that stand twice in a history, and among prompts of other lengths."""
    monkeypatch.setattr(data, "PROMPT", prompt)
    cat, vocabulary = catalogue.__wrapped__()
    check_item_cache(tiny_model(plan, vocab_size=vocabulary), cat, [[0], [8, 0, 5, 3, 3, 1], [4, 2, 7]])


def test_item_cache_of_a_real_catalogue():
    """More titles than are computed at once, of all lengths: a state must not end up at another title."""
    cat, d, m = office()
    check_item_cache(m, cat, [w.history for w in d.test[:6]])


# --- losses, and the pieces ----------------------------------------------------------------------------------------


@cache
def catalogue() -> tuple[Catalogue, int]:
    titles = "red pen,red pencil,red,blue ink,blue ink well,paper,paper clip,glue,red pen,tape,paper cut".split(",")
    tokenizer = data.train_tokenizer(titles)
    c = tiny_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=0).config
    return Catalogue(titles, tokenizer, c), c.vocab_size


WAITS = (
    "nonzero",
    "bincount",
    "_local_scalar_dense",
    "_unique2",
    "unique_consecutive",
    "masked_select",
    "is_nonzero",
    "equal",
)


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to finish before the CPU can go on: values, and sizes that depend on them."""

    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, flat = op._overloadpacket.__name__, torch.utils._pytree.tree_leaves(args)
        boolean = name.startswith("index") and any(x.dtype == torch.bool for x in flat[1:] if isinstance(x, Tensor))
        sized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        self.n += name in WAITS or boolean or sized
        return op(*args, **kwargs or {})


def test_a_step_of_the_search_waits_ten_times_at_most(monkeypatch):
    """Each wait leaves a GPU without work. Catches filters by boolean masks, and .item()."""
    d, seen, real, tolist = Decoder(model(HAT), trie()), [], Decoder.advance, Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: (setattr(waits, "n", waits.n + 1), tolist(t))[1])
    monkeypatch.setattr(Decoder, "advance", lambda *a: seen.append(waits.n) or real(*a))
    with Waits() as waits:
        d.search(*prompts(), 10, 4)
    assert len(seen) > 3 and 4 <= max(np.diff(seen)) <= 10


@pytest.mark.parametrize("loss, score", [("msl", "trie"), ("lml", "full")])
def test_a_loss_is_the_decoders_score(loss, score):
    """What is trained is what is ranked: -log p of a title."""
    cat, vocabulary = catalogue()
    m, history = tiny_model(HAT, vocab_size=vocabulary), [0, 3, 5]
    tokens, item, _ = data.collate_prompts(cat, [history])
    got = score_all(Decoder(m, cat.trie, score), tokens, item)[0]
    for target, leaf in enumerate(cat.trie.leaf_of_item):
        b = data.collate(cat, [data.encode(cat, Example(history, [(3, target)]), loss == "msl")])
        h = m(b.tokens, layout(b.item), rows=b.rows)
        nll = (trie_nll if loss == "msl" else full_nll)(m, cat.trie, h, b)
        assert abs(float(nll.sum().detach()) + got[leaf]) < 1e-4


def test_large_logits_do_not_overflow():
    """exp of a logit of 200 is inf in fp32."""
    z = torch.tensor([200.0, 199.0, -300.0, 5.0])
    out = decode.segment_logsumexp(z, torch.tensor([0, 0, 1, 1]), 2)
    assert torch.allclose(out, torch.stack((z[:2].logsumexp(0), z[2:].logsumexp(0))))
