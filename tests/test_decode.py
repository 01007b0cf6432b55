"""decode.py against brute force: every title of a small catalogue scored by a forward pass of its own."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from conftest import PLANS, data_root, tiny_model
from torch import Tensor

import data
import decode
from data import Catalogue, Example, Trie
from decode import Decoder, full_nll, trie_nll
from hatllm import layout

SCORES = ("trie", "full")
END = 1
PLAIN = ("OR", "IN:1 OR:2 CR:1")


@cache
def trie(kind: str = "many") -> Trie:
    """Titles of the tokens 5 .. 11: one may begin another, parts where one token alone can follow, items that share."""
    rng = np.random.default_rng(0)
    titles = [rng.integers(5, 12, rng.integers(1, 6)).tolist() for _ in range(60)]
    titles += [[5], [5, 6], [5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23], [20, 21, 22, 24, 25], titles[0]]
    titles = {"many": titles, "few": titles[:4], "one": [[7, 8, 9]], "end": [[7]]}[kind]
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
def model(plan: str):
    return tiny_model(plan)


@cache
def brute(plan: str, score: str, kind: str = "many", tau: float = 1.0) -> Tensor:
    """(B, L) log-probabilities: the prompt and one title, teacher-forced, without cache, tree or batch of lengths."""
    t, m, (tokens, item) = trie(kind), model(plan), prompts()
    out = torch.zeros(len(tokens), t.n_leaves)
    paths = [t.path_token[t.start[x] : t.start[x + 1]] for x in range(t.n_leaves)]
    for b, n in enumerate(LENGTHS):
        # rows of one title each, padded at the end, where causal attention never looks
        text = torch.stack([torch.cat((tokens[b, :n], p[:-1], p.new_zeros(12 - len(p)))) for p in paths])
        title = int(item[b].max()) + 1
        kinds = torch.stack([torch.cat((item[b, :n], torch.full((11,), title))) for _ in paths])
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


def everyone(t: Trie) -> Tensor:
    return torch.arange(t.n_leaves).expand(3, -1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() < tolerance).all())


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("plan", PLANS)
def test_search_finds_the_exact_top_k(plan, score):
    """Whatever the beam, exact=True is brute force: a wrong mask, position or bound would change it."""
    t, best = trie(), brute(plan, score).topk(10)
    for beam in (1, 4, 50):
        r = Decoder(model(plan), t, score).search(*prompts(), k=10, beam=beam)
        assert r.leaf.tolist() == best.indices.tolist() and close(r.score, best.values)
        assert r.exact.all()


@pytest.mark.parametrize("score", SCORES)
def test_certificate(score):
    """A plain beam search that says it is exact must be. Both answers occur, and a miss is never certified; without a
    bound all would be, with a careless one none."""
    said, right = [], []
    for seed in range(6):
        t, m = trie(), tiny_model("IN:1 OR:2 CR:1", seed + 1)
        truth = Decoder(m, t, score).score(*prompts(), everyone(t)).topk(5).indices
        for beam in (1, 2, 5, 12, 40):
            r = Decoder(m, t, score).search(*prompts(), k=5, beam=beam, exact=False)
            said += r.exact.tolist()
            right += (r.leaf == truth).all(1).tolist()
    assert all(ok for sure, ok in zip(said, right, strict=True) if sure)
    assert 10 < sum(said) < len(said) - 10 and not all(right)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ["few", "one", "end"])
def test_small_catalogues(kind, score):
    """Fewer titles than k: all of them, then -1 and -inf; a catalogue of one title, of one token."""
    t, truth = trie(kind), brute("OR", score, kind)
    r = Decoder(model("OR"), t, score).search(*prompts(), k=10, beam=2)
    n = t.n_leaves
    best = truth.topk(n)
    assert r.leaf[:, :n].tolist() == best.indices.tolist() and close(r.score[:, :n], best.values)
    assert (r.leaf[:, n:] == -1).all() and (r.score[:, n:] == -torch.inf).all() and r.exact.all()
    assert close(Decoder(model("OR"), t, score).score(*prompts(), everyone(t)), truth)
    if n == 1 and score == "trie":
        assert (r.score[:, 0] == 0).all()  # certain


@pytest.mark.parametrize("score", SCORES)
def test_a_batch_is_its_prompts_one_by_one(score):
    """Padding, and the columns of other users, must not reach anyone."""
    d = Decoder(model("IN:1 OR:2 CR:1"), trie(), score)
    tokens, item = prompts()
    r = d.search(tokens, item, k=7, beam=3)
    for b, n in enumerate(LENGTHS):
        one = d.search(tokens[b : b + 1, :n], item[b : b + 1, :n], k=7, beam=3)
        assert one.leaf.tolist() == r.leaf[b : b + 1].tolist() and close(one.score, r.score[b : b + 1])


def test_k_one_and_k_all():
    d, t = Decoder(model("OR"), trie()), trie()
    truth = brute("OR", "trie")
    assert d.search(*prompts(), k=1, beam=1).leaf[:, 0].tolist() == truth.argmax(1).tolist()
    r = d.search(*prompts(), k=t.n_leaves, beam=8)
    assert close(r.score, truth.sort(descending=True).values)
    assert all(sorted(leaves) == list(range(t.n_leaves)) for leaves in r.leaf.tolist())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("limit", [0, 1, 20])
def test_limit_ends_the_search_honestly(limit, score):
    """Out of tokens: no crash, no endless loop, true scores for what was found, and no certificate where titles are
    missing."""
    truth = brute("OR", score)
    r = Decoder(model("OR"), trie(), score).search(*prompts(), k=10, beam=1, limit=limit)
    best = truth.topk(10).indices
    for b in range(3):
        found = r.leaf[b][r.leaf[b] >= 0]
        assert close(r.score[b, : len(found)], truth[b, found]) and (r.score[b, len(found) :] == -torch.inf).all()
        assert not r.exact[b] or r.leaf[b].tolist() == best[b].tolist()
    assert not r.exact.any() if limit < 20 else True


def test_temperature():
    """tau divides the logits before they are normalised, in search and score alike. Full scores know none: half of
    the formula divided would make scores grow along a title, and the certificate a lie."""
    for score, tau in (("trie", 0.5), ("full", 1.0)):
        truth = brute("OR", score, tau=tau)
        d = Decoder(model("OR"), trie(), score, tau=0.5)
        assert close(d.score(*prompts(), everyone(trie())), truth)
        assert close(d.search(*prompts(), k=10).score, truth.topk(10).values)


@pytest.mark.parametrize("score", SCORES)
def test_decoder_can_be_used_again(score):
    """A search must leave nothing behind that the next one sees, nor a score of lists."""
    d, (tokens, item) = Decoder(model("OR"), trie(), score), prompts()
    first = d.search(tokens, item, k=5)
    d.score(tokens[:1], item[:1], torch.tensor([[3, 4]]))
    d.search(tokens[1:], item[1:], k=3)
    again = d.search(tokens, item, k=5)
    assert first.leaf.tolist() == again.leaf.tolist() and close(first.score, again.score, 1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("plan", PLANS)
def test_search_tells_the_score_of_a_target(plan, score):
    """Listed or not, first or last; and the lists are those of a search that was not asked."""
    truth, d = brute(plan, score), Decoder(model(plan), trie(), score)
    for target in (truth.argmax(1), truth.argmin(1), torch.tensor([0, 3, trie().n_leaves - 1])):
        plain, r = d.search(*prompts(), k=5, beam=3), d.search(*prompts(), k=5, beam=3, target=target)
        assert close(r.target, truth.gather(1, target[:, None])[:, 0]) and plain.target.isnan().all()
        assert r.leaf.tolist() == plain.leaf.tolist() and close(r.score, plain.score, 1e-6)


# --- scores of lists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("plan", PLANS)
def test_score_by_brute_force(plan, score, monkeypatch):
    """All titles, a random list for each user with one title twice, and all in small pieces."""
    t, truth, d = trie(), brute(plan, score), Decoder(model(plan), trie(), score)
    assert close(d.score(*prompts(), everyone(t)), truth)
    some = torch.stack([torch.randperm(t.n_leaves)[:9] for _ in range(3)])
    some[:, 5] = some[:, 2]
    got = d.score(*prompts(), some)
    assert close(got, truth.gather(1, some)) and torch.equal(got[:, 5], got[:, 2])
    monkeypatch.setattr(decode, "ROWS", 7)
    assert len(d.subtrees(torch.arange(1, t.n_nodes)[torch.argsort(t.leaf[1:], stable=True)][None])) > 3
    assert close(d.score(*prompts(), everyone(t)), truth) and close(d.score(*prompts(), some), truth.gather(1, some))
    assert close(d.search(*prompts(), k=10, beam=4).score, truth.topk(10).values)  # ROWS cuts there, too


@pytest.mark.parametrize("plan", PLANS)
def test_probabilities_of_a_catalogue_sum_to_one(plan):
    """Renormalised over what may follow, the model is a distribution over titles; over the vocabulary it is less."""
    t = trie()
    for score in SCORES:
        total = Decoder(model(plan), t, score).score(*prompts(), everyone(t)).exp().sum(1)
        assert (total < 0.999).all() if score == "full" else close(total, torch.ones(3), 1e-5)


@cache
def office() -> tuple[Catalogue, data.Dataset]:
    d = data.load("office", str(data_root()))
    return Catalogue(d.titles, data.train_tokenizer(d.titles, 800), 0), d


def test_office_sums_to_one():
    """The whole of a real catalogue, with titles that items share and titles that begin others; and its top 10."""
    cat, d = office()
    m = tiny_model("IN:1 OR:2 CR:1", vocab_size=800)
    tokens, item, _ = data.collate_prompts(cat, d.test.histories()[:2])
    decoder = Decoder(m, cat.trie)
    score = decoder.score(tokens, item, torch.arange(cat.trie.n_leaves).expand(2, -1))
    assert close(score.exp().sum(1), torch.ones(2))
    r = decoder.search(tokens, item)
    assert r.leaf.tolist() == score.topk(10).indices.tolist() and r.exact.all()


# --- the item cache -------------------------------------------------------------------------------------------------


def check_item_cache(plan: str, cat: Catalogue, histories: list[list[int]], vocabulary: int):
    m = tiny_model(plan, vocab_size=vocabulary)
    tokens, item, source = data.collate_prompts(cat, histories)
    plain, cached = Decoder(m, cat.trie), Decoder(m, cat.trie)
    cached.remember(cat.titles)
    assert (cached.states is not None) == plan.startswith("IN-closed")
    with torch.inference_mode():
        assert close(cached.prefill(tokens, item, source), plain.prefill(tokens, item))
    target = torch.arange(len(histories))
    a, b = plain.search(tokens, item, k=5, target=target), cached.search(tokens, item, 5, source=source, target=target)
    assert a.leaf.tolist() == b.leaf.tolist() and close(a.score, b.score) and close(a.target, b.target)


@pytest.mark.parametrize("plan", ["IN-closed", "IN-closed:2 OR:1 CR:1", "OR", "OR:2 IN-closed:2", "IN-closed:1 IN:3"])
def test_item_cache(plan):
    """With leading IN-closed layers a title's states are computed once for all users: the same lists and scores, also
    for items that share a title, that stand twice in a history, and among prompts of other lengths."""
    check_item_cache(plan, catalogue(), [[0], [8, 0, 5, 3, 3, 1], [4, 2, 7]], 300)


def test_item_cache_of_a_catalogue():
    """More titles than are computed at once, of all lengths: a state must not end up at another title."""
    cat, d = office()
    check_item_cache("IN-closed:2 OR:1 CR:1", cat, d.test.histories()[:6], 800)


# --- losses ---------------------------------------------------------------------------------------------------------


def nll(m, t: Trie, coded: list[dict], loss: str, tau: float = 1.0) -> Tensor:
    """As train.Trainer.nll: the sum over a batch."""
    b = data.collate(coded)
    h = m(b.tokens, layout(b.item, b.branch, b.fork)).flatten(0, 1)[b.rows]
    return (trie_nll(m, t, h, b.node, b.next, tau) if loss == "msl" else full_nll(m, h, b.next)).sum()


def with_gradient(m, *args) -> tuple[float, Tensor]:
    m.zero_grad()
    loss = nll(m, *args)
    loss.backward()
    return float(loss.detach()), torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in m.parameters()]
    )


def same(a: tuple[float, Tensor], b: tuple[float, Tensor], tolerance: float) -> bool:
    return abs(a[0] - b[0]) <= tolerance * abs(b[0]) and bool((a[1] - b[1]).norm() <= tolerance * b[1].norm())


TITLES = [
    "red pen",
    "red pencil",
    "red",
    "blue ink",
    "blue ink well",
    "paper",
    "paper clip",
    "glue",
    "red pen",
    "tape",
    "paper cut",
]


@cache
def catalogue() -> Catalogue:
    return Catalogue(TITLES, data.train_tokenizer(TITLES, 300), 0)


SHARED = [Example([0, 3, 5, 1, 6], [(1, 3), (2, 5), (3, 1), (4, 6), (5, 4)]), Example([2], [(1, 9)]),
          Example([4, 4, 7], [(2, 7), (3, 8)])]  # fmt: skip


@pytest.mark.parametrize("loss", ["lml", "msl"])
@pytest.mark.parametrize("plan", PLANS)
def test_shared_history(plan, loss):
    """All targets of a history in one forward: loss and gradients are those of a prompt for each, with fewer tokens."""
    cat, m = catalogue(), tiny_model(plan, vocab_size=300)
    shared = [data.encode(cat, e, loss == "msl") for e in SHARED]
    alone = [data.encode(cat, Example(e.history[:k], [(k, t)]), loss == "msl") for e in SHARED for k, t in e.targets]
    assert sum(len(c["tokens"]) for c in shared) < 0.8 * sum(len(c["tokens"]) for c in alone)
    assert sum(c["n_tokens"] for c in shared) == sum(c["n_tokens"] for c in alone)
    assert same(with_gradient(m, cat.trie, shared, loss), with_gradient(m, cat.trie, alone, loss), 1e-5)
    one_by_one = sum(nll(m, cat.trie, [c], loss).item() for c in alone)
    assert abs(one_by_one - nll(m, cat.trie, shared, loss).item()) < 1e-5 * one_by_one


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("plan", PLANS)
def test_msl_without_what_is_certain(plan, tau):
    """Rows with one possible token contribute nothing and are left out, and so is what is fed for them alone."""
    cat, m = catalogue(), tiny_model(plan, vocab_size=300)
    short, whole = ([data.encode(cat, e, only) for e in SHARED] for only in (True, False))
    assert sum(len(c["tokens"]) for c in short) < sum(len(c["tokens"]) for c in whole)
    assert same(with_gradient(m, cat.trie, short, "msl", tau), with_gradient(m, cat.trie, whole, "msl", tau), 2e-6)


def test_losses_are_the_decoders_scores():
    """What is trained is what is ranked by: -log p of a title under msl and lml is the score under trie and full."""
    cat, m = catalogue(), tiny_model("IN:1 OR:2 CR:1", vocab_size=300)
    history = [0, 3, 5]
    tokens, item, _ = data.collate_prompts(cat, [history])
    for loss, score in (("msl", "trie"), ("lml", "full")):
        got = Decoder(m, cat.trie, score).score(tokens, item, torch.arange(cat.trie.n_leaves)[None])[0]
        for target in range(len(TITLES)):
            coded = data.encode(cat, Example(history, [(3, target)]), loss == "msl")
            assert abs(nll(m, cat.trie, [coded], loss).item() + got[cat.trie.leaf_of_item[target]]) < 1e-4


def test_trie_nll_by_brute_force():
    """Masked softmax row by row: -log softmax of the logits at the tokens that may follow, of the one that does."""
    t, m, rng = trie(), model("OR"), random.Random(0)
    nodes = torch.tensor([n for n in range(t.n_nodes) if t.fan[n] > 0])
    follow = torch.tensor([int(t.token[t.child[n] + rng.randrange(int(t.fan[n]))]) for n in nodes])
    h = torch.randn(len(nodes), 32)
    got = trie_nll(m, t, h, nodes, follow, 0.7)
    for i, n in enumerate(nodes):
        may = t.token[t.child[n] : t.child[n] + t.fan[n]]
        z = m.logits(h[i])[may] / 0.7
        assert abs(float((got[i] - (z.logsumexp(0) - z[may.tolist().index(int(follow[i]))])).detach())) < 1e-5


def test_msl_of_certain_titles_is_zero():
    """One title in the catalogue: no row at all; the loss is 0 and can still be differentiated."""
    cat, m = Catalogue(["pen"], data.train_tokenizer(["pen"], 300), 0), tiny_model(vocab_size=300)
    coded = [data.encode(cat, Example([0, 0], [(1, 0), (2, 0)]), True)]
    loss, gradient = with_gradient(m, cat.trie, coded, "msl")
    assert loss == 0 and not gradient.any() and coded[0]["n_tokens"] == 2 * (len(cat.titles[0]) + 1)


def test_large_logits_do_not_overflow():
    """exp of a logit of 200 is inf in fp32."""
    z = torch.tensor([200.0, 199.0, -300.0, 5.0], requires_grad=True)
    out = decode.segment_logsumexp(z, torch.tensor([0, 0, 1, 1]), 2)
    assert torch.allclose(out, torch.stack((z[:2].logsumexp(0), z[2:].logsumexp(0))))
    out.sum().backward()
    assert torch.allclose(z.grad, torch.cat((z[:2].softmax(0), z[2:].softmax(0))))


def test_best_first():
    """Sorted by user, then by falling score, ties in their order; the rank counts within a user, also when one has
    none."""
    user, score = torch.tensor([2, 0, 2, 0, 2, 4]), torch.tensor([1.0, 3.0, 5.0, 7.0, 1.0, -torch.inf])
    order, rank = decode.best_first(user, score)
    assert order.tolist() == [3, 1, 2, 0, 4, 5] and rank.tolist() == [0, 1, 0, 1, 2, 0]


def test_children():
    t = trie()
    nodes = torch.tensor([0, 5, 0, t.n_nodes - 1, 2])  # with a leaf, and one node twice
    row, child = decode.children(t, nodes)
    expected = [(r, int(c)) for r, n in enumerate(nodes) for c in torch.nonzero(t.parent == n).flatten() if c != 0]
    assert list(zip(row.tolist(), child.tolist(), strict=True)) == expected
