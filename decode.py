"""Constrained decoding: the best titles of a catalogue after a prompt, exactly, and the score of a given one.

The decoder knows token ids and the trie, no text. A prefix's score only falls as the title grows: once no prefix that
is left scores above the K-th finished title, the top K is exact.
Shapes as in model.py, plus F prefixes in a step, M children of theirs (flat), L leaves (titles).
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data import Trie, pad
from hatllm import TARGET, InputError, Layout, layout, needed
from model import Cache, Llama

ROWS = 512  # rows of V-wide logits at a time
AFTER_ALL_DEPTHS, NEVER = 1 << 40, 1 << 41  # turns


def segment_logsumexp(z: Tensor, row: Tensor, n: int) -> Tensor:
    """z (M,) with row (M,) in 0 .. n-1 -> (n,) logsumexp of every row's values."""
    top = z.new_full((n,), -torch.inf).scatter_reduce(0, row, z, "amax")
    return top + z.new_zeros(n).index_add(0, row, (z - top[row]).exp()).log()


@dataclass
class Ranking:
    leaf: Tensor  # (B, K) titles, best first; -1 where fewer were found
    score: Tensor  # (B, K) log-probabilities, -inf where leaf is -1
    exact: Tensor  # (B,) bool: all other titles score at most as high as the last listed one
    target: Tensor  # (B,) log-probability of the title asked for, NaN where none was
    fed: Tensor  # (B,) title tokens that the search has read


@dataclass
class Prefixes:
    """Beginnings of titles, F of them."""

    user: Tensor  # (F,) prompt of the batch
    node: Tensor  # (F,) trie node
    score: Tensor  # (F,) log-probability
    deferred: Tensor  # (F,) bool: a beam had no place for it, or for what it grew from

    def __getitem__(self, at) -> "Prefixes":
        return Prefixes(*(x[at] for x in vars(self).values()))

    def __add__(self, other: "Prefixes") -> "Prefixes":
        return Prefixes(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class SearchState:
    """What the model has read: B rows, one a prompt that is still searched for."""

    user: Tensor  # (B,) which prompt of the batch a row is, ascending
    item: Tensor  # (B, T) of the prompt, as in hatllm.Layout
    short_item: Tensor  # (B, S) the same of what CR-last layers need; see hatllm.needed
    length: Tensor  # (B,) tokens of the prompt
    nodes: Tensor  # (B, n) trie node of every token read since, -1 where a row has none
    cache: Cache

    def keep(self, user: Tensor):
        """Keeps these users' rows alone: a step costs each row as much as the busiest one."""
        at = torch.searchsorted(self.user, user)
        for name in ("user", "item", "short_item", "length", "nodes"):
            setattr(self, name, getattr(self, name)[at])
        self.cache.k, self.cache.v = [k[at] for k in self.cache.k], [v[at] for v in self.cache.v]


class Decoder:
    """Titles after a prompt, under one of two scores:

    trie  every token renormalised over those that continue some title: a distribution over the catalogue. The
          only token that can follow has probability 1 and costs nothing: a title is done once it is the only one left.
    full  log-softmax over the whole vocabulary, the trie only forbids: as Hugging Face's prefix_allowed_tokens_fn does.
    """

    def __init__(self, model: Llama, trie: Trie, score: str = "trie", tau: float = 1.0):
        self.model, self.trie, self.full = model, trie.to(model.head.device), score == "full"
        self.tau = 1.0 if self.full else tau  # full: without a temperature, as Hugging Face decodes
        self.states = None  # (tokens of all texts, d) after the IN-closed layers, once `remember` was called
        # how many IN-closed layers lead; the last layer is none of them, for it picks the rows
        leading = itertools.takewhile(lambda kind: kind == "IN-closed", model.plan[:-1])
        self.closed = len(list(leading))

    @torch.inference_mode()
    def remember(self, texts: list):
        """Computes the item cache, of Catalogue.texts. After the leading IN-closed layers an item's states depend on
        its text alone. So they are computed once, and `prefill` runs items through the other layers only. The results
        are equal to 1e-4 in fp32."""
        if not self.closed:
            return
        size = torch.tensor([len(t) for t in texts])
        first = size.cumsum(0) - size
        self.states = self.model.head.new_empty(int(size.sum()), self.model.config.hidden_size)
        for some in torch.argsort(size, stable=True).split(64):
            tokens = pad([texts[i] for i in some], 0).to(self.states.device)
            at = pad([first[i] + torch.arange(size[i]) for i in some], -1).to(self.states.device)
            item = torch.where(at >= 0, 1, -1)
            x = self.model.blocks(self.model.embed_tokens(tokens), layout(item), last=self.closed)
            self.states[at[at >= 0]] = x[at >= 0]

    def prefill(self, tokens: Tensor, item: Tensor, source: Tensor | None = None) -> tuple[SearchState, Tensor]:
        """Reads the prompts (B, T), right-padded, once -> the state, and h (B, d) where the title begins.
        source (B, T): where an item's token stands among those of all texts, see data.collate_prompts."""
        at, length = torch.arange(len(item), device=item.device), (item >= 0).sum(1)
        cache, places = Cache(len(self.model.layers)), needed(item)
        short = item.gather(1, places.clamp(min=0)).where(places >= 0, -1)
        state = SearchState(at, item, short, length, item.new_empty(len(item), 0), cache)
        lay, rows = layout(item, places=places), at * item.shape[1] + length - 1
        if self.states is None or source is None:
            return state, self.model(tokens, lay, cache, rows)
        x, c = self.after_closed_layers(tokens, item, source), self.model.config
        none = x.new_zeros(len(item), c.num_key_value_heads, 0, c.head_dim)
        for layer in range(self.closed):
            cache.extend(layer, none, none)  # a title does not look at the prompt there; Attention cuts the mask
        return state, self.model.norm(self.model.blocks(x, lay, cache, first=self.closed, rows=rows))

    def after_closed_layers(self, tokens: Tensor, item: Tensor, source: Tensor) -> Tensor:
        """(B, T, d) after the IN-closed layers: the items' from the item cache, the context's computed here."""
        x = self.states[source.clamp(min=0)]
        n = (item == 0).sum(1, keepdim=True)
        at = torch.argsort((item != 0).int(), dim=1, stable=True)[:, : int(n.max())]  # the context, packed
        own = torch.arange(at.shape[1], device=at.device) < n
        packed = layout(torch.where(own, 0, -1))
        packed.pos = at
        y = self.model.blocks(self.model.embed_tokens(tokens.gather(1, at)), packed, last=self.closed)
        x[torch.nonzero(own)[:, 0], at[own]] = y[own]
        return x

    def feed(self, state: SearchState, user: Tensor, node: Tensor, Q: int) -> Tensor:
        """Reads node (F,) of user (F,), ascending, at most Q a user -> (F, d). A node sees the prompt and those of its
        ancestors in the trie that were read. So every prefix is computed once, the prompt's keys and values serve all
        of them, and no cache is ever reordered."""
        trie, b = self.trie, torch.searchsorted(state.user, user)
        rows = b * Q + place_in_group(b)  # (F,) where a node stands among the B * Q places
        nodes = node.new_full((len(state.user), Q), -1)  # -1 where a user has fewer
        nodes.view(-1)[rows] = node
        state.nodes = torch.cat((state.nodes, nodes), 1)  # (B, n)
        q, k = nodes[:, :, None], state.nodes[:, None, :]
        # (B, Q, n) is k above q, or q itself?
        above = trie.has_leaf(k, trie.leaf[q]) & (trie.depth[k] <= trie.depth[q]) & (k >= 0)
        above[:, :, -Q:] |= torch.eye(Q, dtype=torch.bool, device=nodes.device)  # an empty place sees itself: no NaN
        pos, new = state.length[:, None] + trie.depth[nodes] - 1, torch.where(state.nodes >= 0, TARGET, -1)

        def with_prompt(item: Tensor) -> Layout:
            sees = torch.cat(((item >= 0)[:, None, :].expand(-1, Q, -1), above), 2)  # (B, Q, T + n)
            return Layout(torch.cat((item, new), 1), pos, sees, real=rows)

        lay = with_prompt(state.item)
        lay.shorter = with_prompt(state.short_item)
        return self.model(trie.token[node], lay, state.cache)

    def expand(self, h: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (F, d) after the prefixes nodes (F,) -> row, child, log-probability (M,) of all that may follow."""
        row, child = self.trie.children(nodes)
        columns, at = torch.unique(self.trie.token[child], return_inverse=True)
        z = self.model.logits(h, columns)[row, at] / self.tau  # (M,)
        if self.full:
            total = torch.cat([self.model.logits(part).logsumexp(-1) for part in h.split(ROWS)])
        else:
            total = segment_logsumexp(z, row, len(nodes))
        return row, child, (z - total[row]).clamp(max=0)  # above it by rounding alone

    def settled(self, nodes: Tensor) -> Tensor:
        """Whether a prefix already has its title's score: one title is left (trie), or the end token is read (full)."""
        return self.trie.fan[nodes] == 0 if self.full else self.trie.leaves[nodes] == 1

    # --- The K best titles ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def search(self, tokens: Tensor, item: Tensor, k=10, width=20, patience=1024, source=None, target=None) -> Ranking:
        """The k best titles after each prompt (B, T). A step takes the shortest of a user's prefixes, the `width` best
        of them, on to where their titles part (full scores: by a token): a beam search. What overflows the beam waits
        until the beam is done, and then goes on best first, as far as it can still enter the top k.

        patience: once a user's title tokens are so many, what overflowed is dropped, so 0 is a plain beam search;
        Ranking.exact tells for whom it mattered. source: see prefill. target (B,): titles whose score is wanted."""
        B, device = len(item), item.device
        state, h = self.prefill(tokens, item, source)
        own = h.new_full((B,), torch.nan) if target is None else self.score_after(state, h, target)
        root = torch.zeros(B, dtype=torch.long, device=device)
        beam = Prefixes(torch.arange(B, device=device), root, root.float(), root.bool())
        finished = waiting = beam[:0]
        dropped = torch.full((B,), -torch.inf, device=device)  # the best score that was given up
        fed, sound = root.clone(), torch.ones((), dtype=torch.bool, device=device)
        while len(beam.user):
            row, child, logp = self.expand(h, beam.node)
            new = Prefixes(beam.user[row], child, beam.score[row] + logp, beam.deferred[row])
            grown = finished + waiting + new
            sound = sound & grown.score.isfinite().all()
            whole, depth = self.settled(grown.node), self.trie.depth[grown.node]
            finished, waiting, beam, lost = divide(grown, whole, depth, k, width, fed >= patience)
            dropped = torch.maximum(dropped, lost)
            if len(beam.user):
                h, beam, n = self.advance(state, beam, B)
                fed = fed + n
        leaf, score = torch.full((B, k), -1, device=device), torch.full((B, k), -torch.inf, device=device)
        rank = place_in_group(finished.user)
        leaf[finished.user, rank], score[finished.user, rank] = self.trie.leaf[finished.node], finished.score
        if not sound:
            raise InputError("the model's scores are not finite: its weights are damaged, or its training diverged")
        return Ranking(leaf, score, dropped <= score[:, -1], own, fed)

    def advance(self, state: SearchState, p: Prefixes, B: int) -> tuple[Tensor, Prefixes, Tensor]:
        """Reads the prefixes p, sorted by user, and what follows on the way to where their titles part -> h (F, d)
        there, the prefixes there, and how many tokens that took (B,). full: p alone, for what follows is certain in the
        trie, but not in the vocabulary."""
        trie = self.trie
        goal = p.node if self.full else trie.stop[p.node]
        n = trie.depth[goal] - trie.depth[p.node] + 1  # (F,) tokens to read
        read = n.new_zeros(B).index_add(0, p.user, n)
        total, Q, busy = torch.stack((n.sum(), read.max(), (read > 0).sum())).tolist()
        if 2 * busy <= len(state.user):
            state.keep(torch.nonzero(read).flatten())
        row = torch.repeat_interleave(torch.arange(len(n), device=n.device), n, output_size=total)  # prefix of a token
        first = trie.start[trie.leaf[p.node]] + trie.depth[p.node] - 1  # where p.node stands in path_node
        h = self.feed(state, p.user[row], trie.path_node[first[row] + place_in_group(row)], Q)
        return h[n.cumsum(0) - 1], replace(p, node=goal), read

    def score_after(self, state: SearchState, h: Tensor, leaf: Tensor) -> Tensor:
        """(B,) exact log-probability of the titles leaf (B,), right after prefill. What it reads is forgotten, so that
        a search can follow."""
        trie, users = self.trie, torch.arange(len(leaf), device=leaf.device)
        user = torch.repeat_interleave(users, trie.start[leaf + 1] - trie.start[leaf])  # of every node on the paths
        path = trie.path_node[trie.start[leaf][user] + place_in_group(user)]
        read = ~self.settled(path)  # what follows the others adds nothing to the score
        user, path = user[read], path[read]
        if len(path):
            kept = [*state.cache.k], [*state.cache.v]
            h = torch.cat((h, self.feed(state, user, path, int(user.bincount().max()))))
            state.nodes, (state.cache.k, state.cache.v) = state.nodes[:, :0], kept
        nodes, owner = torch.cat((0 * users, path)), torch.cat((users, user))  # the root of each user, what was read
        row, child, logp = self.expand(h, nodes)
        own = trie.has_leaf(child, leaf[owner[row]])  # is the child on its user's path?
        return logp.new_zeros(len(leaf)).index_add(0, owner[row][own], logp[own])


def place_in_group(group: Tensor) -> Tensor:
    """group (M,), ascending -> (M,) 0, 1, .. within each group."""
    return torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)


def divide(p: Prefixes, whole: Tensor, depth: Tensor, k: int, width: int, spent: Tensor):
    """One step of the search for all users at once, with a single wait for the device.

    p, whole, depth (F,): all prefixes, which are whole titles, their lengths. spent (B,): users whose deferred prefixes
    are given up. Returns, sorted by user: the k best titles; the prefixes that wait, as they can still enter the top k;
    the beam, which is the `width` best of the shortest prefixes, or of the deferred ones where there are no others; and
    (B,) the best score that was given up, -inf for none. What the beam has no place for is deferred.
    One user, k 2, width 1:

        prefix  score  depth
        "ink$"  -1.0     4    the best title ($ ends a title)
        "pen$"  -3.0     4    the second; from now on only what scores more can enter
        "re"    -2.0     2    the beam: the best of the shortest prefixes
        "bl"    -2.5     2    waits, deferred: the beam is full
        "inkw"  -2.2     4    waits: shorter ones come first
        "gl"    -4.0     2    is dropped: it scores less than "pen$", and no title below it can score more
    """
    # by user: titles, then prefixes, each from the best on
    order = torch.argsort(p.score, descending=True, stable=True)
    order = order[torch.argsort(p.user[order] * 2 + ~whole[order], stable=True)]
    p, whole, depth = p[order], whole[order], depth[order]
    none, place = torch.full(spent.shape, -torch.inf, device=spent.device), place_in_group(p.user)
    kept, last = whole & (place < k), whole & (place == k - 1)
    to_beat = none.scatter_reduce(0, p.user, p.score.where(last, -torch.inf), "amax")
    live = ~whole & (p.score > to_beat[p.user])
    lost = live & p.deferred & spent[p.user]
    given_up = none.scatter_reduce(0, p.user, p.score.where(lost, -torch.inf), "amax")
    live = live & ~lost
    turn = torch.where(p.deferred, AFTER_ALL_DEPTHS, depth).where(live, NEVER)  # least first
    first = torch.full(spent.shape, NEVER, device=turn.device).scatter_reduce(0, p.user, turn, "amin")
    now = live & (turn == first[p.user])
    earlier = now.cumsum(0) - now.long()  # how many of `now` come earlier, other users' included
    start = torch.searchsorted(p.user, p.user)  # where the user's entries begin
    beam = now & (earlier - earlier[start] < width)
    p.deferred = p.deferred | (now & ~beam)
    kind = torch.where(kept, 0, 3).where(~live, 1).where(~beam, 2)  # 0: a title, 1: waits, 2: the beam, 3: gone
    by_kind = torch.argsort(kind, stable=True)
    sizes = (kind == torch.arange(4, device=kind.device)[:, None]).sum(1)  # bincount would wait twice more
    parts = by_kind.split(sizes.tolist())
    return *(p[at] for at in parts[:3]), given_up
