"""Constrained decoding: the best titles of a catalogue after a prompt, exactly, and the score of any title.

The decoder knows token ids and the trie, no text. A prefix's score only falls as the title grows: once no prefix that
is left scores above the K-th finished title, the top K is exact.
Shapes as in model.py, plus F prefixes in a step, M children of theirs (flat), L leaves (titles).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Trie
from hatllm import Layout, layout
from model import Cache, Llama

ROWS = 512  # rows of V-wide logits at a time
LATE = 1 << 40  # a turn after that of any depth


def children(trie: Trie, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """nodes (F,) -> row (M,), child (M,): all children, flat; row is the index into nodes."""
    fan = trie.fan[nodes]
    row = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), fan)
    first = torch.cumsum(fan, 0) - fan
    return row, trie.child[nodes][row] + torch.arange(len(row), device=nodes.device) - first[row]


def segment_logsumexp(z: Tensor, row: Tensor, n: int) -> Tensor:
    """z (M,) with row (M,) in 0 .. n-1 -> (n,) logsumexp of every row's values."""
    top = z.new_full((n,), -torch.inf).scatter_reduce(0, row, z.detach(), "amax")
    return top + z.new_zeros(n).index_add(0, row, (z - top[row]).exp()).log()


def trie_logits(model: Llama, trie: Trie, h: Tensor, nodes: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """h (F, d) after the prefixes nodes (F,) -> row, child, logit / tau (M,): columns of tokens that can follow."""
    row, child = children(trie, nodes)
    columns, at = torch.unique(trie.token[child], return_inverse=True)
    return row, child, model.logits(h, columns)[row, at] / tau


def trie_nll(model: Llama, trie: Trie, h: Tensor, nodes: Tensor, follow: Tensor, tau: float = 1.0) -> Tensor:
    """Masked softmax (MSL, SIGIR 2025, eq. 5): -log of the token follow (F,) among those that continue some title."""
    row, child, z = trie_logits(model, trie, h, nodes, tau)
    return segment_logsumexp(z, row, len(nodes)) - z[trie.token[child] == follow[row]]


def full_nll(model: Llama, h: Tensor, follow: Tensor) -> Tensor:
    """-log of the token follow (F,) among the whole vocabulary, h (F, d)."""
    return F.cross_entropy(model.logits(h), follow, reduction="none")


def best_first(user: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) -> order (M,) that sorts by user, then by falling score; rank (M,) within the user, along that order."""
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(user[order], stable=True)]
    user = user[order]
    return order, torch.arange(len(user), device=user.device) - torch.searchsorted(user, user)


@dataclass
class Ranking:
    leaf: Tensor  # (B, K) titles, best first; -1 where the catalogue has fewer
    score: Tensor  # (B, K) log-probabilities, -inf where leaf is -1
    exact: Tensor  # (B,) bool: no title that is not listed scores higher than a listed one
    target: Tensor  # (B,) log-probability of the title asked for, NaN where none was


@dataclass
class Prefixes:
    """Beginnings of titles, F of them."""

    user: Tensor  # (F,) row of the batch
    node: Tensor  # (F,) trie node
    score: Tensor  # (F,) log-probability
    turn: Tensor  # (F,) the shortest go first; LATE: after all beams

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, at) -> "Prefixes":
        return Prefixes(*(x[at] for x in vars(self).values()))

    def __add__(self, other: "Prefixes") -> "Prefixes":
        return Prefixes(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))


class Decoder:
    """Titles after a prompt, under one of two scores:

    trie  every token renormalised over those that continue some title: a distribution over the catalogue. A token that
          alone can follow has probability 1 and costs nothing, so a title is done once it is the only one left.
    full  log-softmax over the whole vocabulary, the trie only forbids: as Hugging Face's prefix_allowed_tokens_fn does.
    """

    def __init__(self, model: Llama, trie: Trie, score: str = "trie", tau: float = 1.0):
        self.model, self.trie, self.full, self.states = model, trie.to(model.head.device), score == "full", None
        self.tau = 1.0 if self.full else tau  # full: without a temperature, as Hugging Face decodes

    @torch.inference_mode()
    def remember(self, titles: list[Tensor]):
        """With leading IN-closed layers a title's states after them depend on the title alone: computes them once, so
        that `prefill` runs the items of all users through the other layers only. Equal to 1e-4 in fp32."""
        kinds = self.model.plan[:-1] + ["end"]  # the last layer is run for all: it picks the rows
        self.closed = next(i for i, kind in enumerate(kinds) if kind != "IN-closed")
        if not self.closed:
            return
        size = torch.tensor([len(t) for t in titles])
        self.states = self.model.head.new_empty(int(size.sum()), self.model.config.hidden_size)
        first = size.cumsum(0) - size
        for part in torch.argsort(size, stable=True).split(64):
            tokens = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(titles[i]) for i in part], True)
            own = torch.arange(tokens.shape[1]) < size[part, None]
            tokens, item = tokens.to(self.states.device), torch.where(own, 1, -1).to(self.states.device)
            x = self.model.blocks(self.model.embed_tokens(tokens), layout(item), last=self.closed)
            at = (first[part, None] + torch.arange(tokens.shape[1]))[own]
            self.states[at.to(x.device)] = x[own.to(x.device)]

    def prefill(self, tokens: Tensor, item: Tensor, source: Tensor | None = None) -> Tensor:
        """The prompts (B, T), right-padded, once -> (B, d) where the title begins. source (B, T): where a title's token
        stands among all titles' tokens, one title after the other; -1 for context."""
        self.item, self.length, self.title = item, (item >= 0).sum(1), item.amax(1) + 1  # title: its number as an item
        self.users = torch.arange(len(item), device=item.device)  # rows of the batch that are not done
        self.fed = 0  # title tokens since, of all users
        self.slots = item.new_empty(len(item), 0)  # trie node of every token fed since, -1 where a row has none
        self.cache = Cache(self.model.config, *item.shape, self.model.head)
        last = torch.arange(len(item), device=item.device) * item.shape[1] + self.length - 1
        if self.states is None or source is None:
            return self.model(tokens, layout(item), self.cache, rows=last)
        x = self.states[source.clamp(min=0)]
        n = (item == 0).sum(1, keepdim=True)
        at = torch.argsort((item != 0).int(), dim=1, stable=True)[:, : int(n.max())]  # the context, packed
        own = torch.arange(at.shape[1], device=at.device) < n
        packed = layout(torch.where(own, 0, -1))
        packed.pos = at
        y = self.model.blocks(self.model.embed_tokens(tokens.gather(1, at)), packed, last=self.closed)
        x[torch.nonzero(own)[:, 0], at[own]] = y[own]
        h = self.model.blocks(x, layout(item), self.cache, first=self.closed, rows=last)
        return self.model.norm(h)

    def feed(self, nodes: Tensor) -> Tensor:
        """nodes (B, Q), -1 for none -> (F, d), one row after the other. A node sees the prompt and its ancestors in the
        trie, once fed: every prefix is computed once, the prompt's keys and values serve all of them, and no cache is
        ever reordered."""
        trie, Q = self.trie, nodes.shape[1]
        self.slots = torch.cat((self.slots, nodes), 1)
        q, k = nodes[:, :, None], self.slots[:, None, :]
        above = (trie.leaf[k] <= trie.leaf[q]) & (trie.leaf[q] < trie.leaf[k] + trie.leaves[k])
        above &= (trie.depth[k] <= trie.depth[q]) & (k >= 0)
        above[:, :, -Q:] |= torch.eye(Q, dtype=torch.bool, device=nodes.device)
        sees = torch.cat(((self.item >= 0)[:, None, :].expand(-1, Q, -1), above), 2)
        item = torch.cat((self.item, torch.where(self.slots >= 0, self.title[:, None], -1)), 1)
        pos = self.length[:, None] + trie.depth[nodes] - 1
        rows = torch.nonzero(nodes.flatten() >= 0).flatten()
        self.fed += len(rows)
        return self.model(trie.token[nodes], Layout(item, pos, sees), self.cache, rows)

    def expand(self, h: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (F, d) after the prefixes nodes (F,) -> row, child, log-probability (M,) of all that may follow."""
        row, child, z = trie_logits(self.model, self.trie, h, nodes, self.tau)
        if self.full:
            total = torch.cat([self.model.logits(part).logsumexp(-1) for part in h.split(ROWS)])
        else:
            total = segment_logsumexp(z, row, len(nodes))
        return row, child, z - total[row]

    def keep(self, user: Tensor):
        """Lets go of the others once half of the batch is done: a step costs as much as its busiest user, for each."""
        users = torch.unique(user)
        if 2 * len(users) > len(self.users):
            return
        at = torch.searchsorted(self.users, users)
        for name in ("users", "item", "length", "title", "slots"):
            setattr(self, name, getattr(self, name)[at])
        self.cache.k, self.cache.v = self.cache.k[:, at], self.cache.v[:, at]

    def advance(self, p: Prefixes) -> tuple[Tensor, Prefixes]:
        """Feeds the prefixes p, sorted by user, and what follows on the way to where titles part -> h (F, d) there, the
        prefixes there. full: p alone, for what follows is certain in the trie, but not in the vocabulary."""
        trie = self.trie
        goal = p.node if self.full else trie.stop[p.node]
        n = trie.depth[goal] - trie.depth[p.node] + 1  # tokens to feed
        row = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
        flat = torch.arange(len(row), device=n.device)
        path = (trie.start[trie.leaf[p.node]] + trie.depth[p.node] - 1 - (n.cumsum(0) - n))[row] + flat
        user = torch.searchsorted(self.users, p.user[row])
        column = flat - torch.searchsorted(user, user)
        grid = goal.new_full((len(self.users), int(column.max()) + 1), -1)
        grid[user, column] = trie.path_node[path]
        return self.feed(grid)[n.cumsum(0) - 1], Prefixes(p.user, goal, p.score, p.turn)

    @torch.inference_mode()
    def search(
        self,
        tokens: Tensor,
        item: Tensor,
        k: int = 10,
        beam: int = 20,
        exact: bool = True,
        limit: int = 1024,
        source: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Ranking:
        """The k best titles after each prompt (B, T). A step takes the shortest of a user's prefixes, the `beam` best
        of them, on to where their titles part (full scores: by a token): a beam search.
        What it leaves over is dropped, or (exact) waits until all beams are done and then goes on best first, as far as
        it can still enter the top k; Ranking.exact tells for whom nothing can. limit: once the title tokens of every
        step's busiest user add up to so many, what is left over is dropped. source: see prefill. target (B,): titles
        whose score is wanted, wherever they rank; none: NaN."""
        trie, B = self.trie, len(item)
        h, users = self.prefill(tokens, item, source), torch.arange(B, device=item.device)
        own = h.new_full((B,), torch.nan) if target is None else self.score_after(h, target[:, None])[:, 0]
        front = Prefixes(users, 0 * users, torch.zeros(B, device=item.device), 0 * users)
        done, wait, dropped = front[:0], front[:0], torch.full((B,), -torch.inf, device=item.device)
        while True:
            new = self.grow(front, h)
            over = (trie.fan[new.node] if self.full else trie.leaves[new.node] - 1) == 0
            done = done + new[over]
            order, rank = best_first(done.user, done.score)
            done, rank = done[order[rank < k]], rank[rank < k]
            worst = torch.full_like(dropped, -torch.inf)  # the score to beat: of the k-th, where there is one
            worst[done.user[rank == k - 1]] = done.score[rank == k - 1]
            wait = wait + new[~over]
            wait = wait[wait.score > worst[wait.user]]
            if self.slots.shape[1] >= limit:
                late = wait[wait.turn == LATE]
                dropped.scatter_reduce_(0, late.user, late.score, "amax")
                wait = wait[wait.turn < LATE]
            front, wait, left = self.choose(wait, beam, B)
            if exact:
                wait = wait + left
            else:
                dropped.scatter_reduce_(0, left.user, left.score, "amax")
            if not len(front):
                break
            self.keep(torch.cat((front.user, wait.user)))
            h, front = self.advance(front)
        leaf, score = torch.full((B, k), -1, device=item.device), torch.full((B, k), -torch.inf, device=item.device)
        leaf[done.user, rank], score[done.user, rank] = trie.leaf[done.node], done.score
        return Ranking(leaf, score, dropped <= score[:, -1], own)

    def grow(self, p: Prefixes, h: Tensor) -> Prefixes:
        """All that may follow the prefixes p, h (F, d) after them."""
        row, child, logp = self.expand(h, p.node)
        turn = torch.where(p.turn[row] == LATE, LATE, self.trie.depth[child])
        return Prefixes(p.user[row], child, p.score[row] + logp, turn)

    @staticmethod
    def choose(p: Prefixes, beam: int, B: int) -> tuple[Prefixes, Prefixes, Prefixes]:
        """Of every user's prefixes whose turn is next, the `beam` best; those whose turn has not come; what is left
        over of those whose turn it was, which come late from now on: once nobody's beam goes on."""
        turn = torch.full((B,), LATE, device=p.user.device).scatter_reduce(0, p.user, p.turn, "amin")
        next_ = (p.turn == turn[p.user]) & ((p.turn < LATE) | (p.turn == LATE).all())
        rest, p = p[~next_], p[next_]
        order, rank = best_first(p.user, p.score)
        left = p[order[rank >= beam]]
        left.turn = torch.full_like(left.turn, LATE)
        return p[order[rank < beam]], rest, left

    @torch.inference_mode()
    def score(self, tokens: Tensor, item: Tensor, leaves: Tensor) -> Tensor:
        """Exact log-probabilities (B, n) of the titles leaves (B, n)."""
        return self.score_after(self.prefill(tokens, item), leaves)

    def score_after(self, h: Tensor, leaves: Tensor) -> Tensor:
        """score, right after prefill with its h (B, d): all prefixes of a user's titles in one tree. What it feeds is
        forgotten, so that a search can follow."""
        trie, (B, n) = self.trie, leaves.shape
        size = (trie.start[leaves + 1] - trie.start[leaves]).flatten()
        pair = torch.repeat_interleave(torch.arange(B * n, device=leaves.device), size)
        first = trie.start[leaves].flatten() - (size.cumsum(0) - size)
        user, node = pair // n, trie.path_node[first[pair] + torch.arange(len(pair), device=leaves.device)]
        need = (trie.fan[node] > 0) if self.full else (trie.leaves[node] > 1)
        # depth first: a subtree is a run of columns, and whole subtrees of the root can be fed one after the other
        deep = int(trie.depth.max()) + 1
        key = torch.unique((user[need] * trie.n_leaves + trie.leaf[node[need]]) * deep + trie.depth[node[need]])
        u, leaf, depth = key // deep // trie.n_leaves, key // deep % trie.n_leaves, key % deep
        column = torch.arange(len(key), device=key.device) - torch.searchsorted(u, u)
        grid = leaves.new_full((B, int(column.max()) + 1 if len(key) else 0), -1)
        grid[u, column] = trie.path_node[trie.start[leaf] + depth - 1]
        # the edges on the titles' paths alone: B rows of all edges would not fit where the catalogue is large
        asked, at = torch.unique(user * trie.n_nodes + node, return_inverse=True)
        edge = torch.zeros(len(asked), device=leaves.device)

        def note(h: Tensor, user: Tensor, nodes: Tensor):
            row, child, logp = self.expand(h, nodes)
            found = user[row] * trie.n_nodes + child
            place = torch.searchsorted(asked, found).clamp(max=len(asked) - 1)
            hit = asked[place] == found
            edge[place[hit]] = logp[hit]

        users = torch.arange(B, device=leaves.device)
        note(h, users, 0 * users)
        for part in self.subtrees(grid):
            b, c = torch.nonzero(part >= 0, as_tuple=True)
            note(self.feed(part), b, part[b, c])
            self.slots, self.cache.n = self.slots[:, :0], self.item.shape[1]
        return torch.zeros(B * n, device=edge.device).index_add(0, pair, edge[at]).view(B, n)

    def subtrees(self, grid: Tensor) -> list[Tensor]:
        """Cuts grid (B, N) of nodes, depth first, into parts of about ROWS columns, where all users begin a subtree."""
        cuts = torch.nonzero(((grid < 0) | (self.trie.depth[grid] == 1)).all(0)).flatten().tolist() + [grid.shape[1]]
        parts, a = [], 0
        for cut, next_cut in zip(cuts, cuts[1:], strict=False):
            if next_cut - a > ROWS and cut > a:
                parts, a = [*parts, grid[:, a:cut]], cut
        return [*parts, grid[:, a:]] if grid.shape[1] else []
