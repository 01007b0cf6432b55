"""HatLLM in one file: which token may look at which, layer by layer (arXiv 2510.10955; no public code exists).

A prompt is context (instruction, separators, response header), the titles the user bought, and the title to come.
Every token carries `item`: 0 context, k = 1.. the k-th bought item, TARGET the title to come, -1 padding.
Each layer is of one kind, and a *plan* names the kinds from the first layer to the last:

    IN         intra-item, shallow layers: an item's token does not look at the tokens of other items
    OR         original, middle layers: plain causal attention
    CR         cross-item, deep layers: an item's token does not look at the other tokens of its own item
    IN-closed  IN in which items and context do not look at each other either: the state of an item's tokens is then
               a function of its title alone, and can be computed once for all users (eval.py does)
    CR-own     CR in which the title to come sees itself: it is written, and a writer needs the word before
    CR-last    CR-own in which of an item only its last token is seen, which has read the whole title; where a plan ends
               with such layers, the tokens that nobody sees are not computed in them (`shorten`)

All-OR is the plain LLM. `python hatllm.py` draws the masks of a small example.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that says what, where and what to do. main() prints only that."""


KINDS = ("IN", "OR", "CR", "IN-closed", "CR-own", "CR-last")
TARGET = 1 << 20  # the `item` of the title to come
PLAN = "IN:1/4 OR CR:1/4"  # the default: 8 + 14 + 8 of 30 layers, 1 + 2 + 1 of 4


def split_plan(text: str) -> list[tuple[str, str]]:
    """'IN:1/4 OR' -> [('IN', '1/4'), ('OR', '')]. Raises InputError for what fits no model."""
    parts = []
    for part in text.split():
        kind, colon, count = part.partition(":")
        if kind not in KINDS:
            raise InputError(f"plan '{text}': unknown layer kind '{kind}'; the kinds are {', '.join(KINDS)}")
        takes_the_rest = not colon and all(n for _, n in parts)
        if not takes_the_rest and not re.fullmatch(r"\d{1,9}(/[1-9]\d{0,8})?", count):
            raise InputError(f"plan '{text}': '{part}' needs a count, {kind}:8 or {kind}:1/4; one kind may go without")
        parts.append((kind, count))
    return parts


def parse_plan(text: str, n_layers: int) -> list[str]:
    """'IN:8 OR:14 CR:8' -> the kind of every layer, first to last. A count may be a fraction of the depth (halves round
    up). One kind may stand without a count and takes what is left. Raises InputError if the plan does not fit."""
    parts, plan = split_plan(text), []
    shares = [Fraction(count or 0) * (n_layers if "/" in count else 1) for _, count in parts]
    sizes = [int(share + Fraction(1, 2)) for share in shares]
    left = n_layers - sum(sizes)
    if left < 0 or (left > 0 and all(count for _, count in parts)):
        covers = f"covers {sum(sizes)} layers, but the model has {n_layers}"
        raise InputError(f"plan '{text}' {covers}; one kind may go without a count, as in '{PLAN}'")
    for (kind, count), size in zip(parts, sizes, strict=True):
        plan += [kind] * (size if count else left)
    return plan


@dataclass
class Layout:
    """What the tokens are. The queries are the last Tq of the T tokens: all of them in training and prefill, the new
    ones when decoding with a cache. A mask is built once per forward and kind and shared by the layers of that kind."""

    item: Tensor  # (B, T) 0 context, 1.. bought items, TARGET, -1 padding
    pos: Tensor  # (B, Tq) position of the queries, for RoPE
    sees: Tensor  # (B, Tq, T) bool: the key comes before the query in one and the same text, or is the query itself
    places: Tensor | None = None  # (B, S) of the tokens that CR-last layers need, -1 for none; see `needed`
    shorter: "Layout | None" = None  # of these tokens alone; None: `shorten` makes it
    causal: bool = False  # `sees` is causal attention, but for padding, which comes last
    real: Tensor | None = None  # (F,) which of the B * Tq places hold a token; then x is (F, d). None: all do
    masks: dict = field(default_factory=dict)

    def additive_mask(self, kind: str, G: int, dtype: torch.dtype) -> Tensor | None:
        """The paper's M, (B, 1, G * Tq, T): 0 where a token may look, else -inf; repeated for G heads. None: causal
        attention and no more, for which torch has a faster kernel."""
        key = kind, G, dtype
        if key not in self.masks:
            seen, M = mask(kind, self.item, self.sees), None
            faster = dtype == (torch.bfloat16 if seen.is_cuda else torch.float32)
            if not (self.causal and seen is self.sees and faster):
                T = seen.shape[2]
                # in memory a row is a multiple of 8 numbers: else a GPU's kernel makes such a copy in every layer
                seen = F.pad(seen[:, None], (0, -T % 8))
                M = torch.where(seen, 0.0, -torch.inf).to(dtype).repeat(1, 1, G, 1)[..., :T]
            self.masks[key] = M
        return self.masks[key]

    def block_mask(self, kind: str) -> BlockMask:
        """The same for a GPU's kernel. It skips every block of 128 x 128 tokens in which nothing is seen."""
        if kind not in self.masks:
            seen = mask(kind, self.item, self.sees)
            size = len(seen), None, *seen.shape[1:]
            self.masks[kind] = create_block_mask(lambda b, h, q, k: seen[b, q, k], *size, device=seen.device)
            mark_dynamic(seen, *self.masks[kind].as_tuple())
        return self.masks[kind]


def mask(kind: str, item: Tensor, sees: Tensor) -> Tensor:
    """The method. item (B, T), sees (B, Tq, T) with the queries last -> (B, Tq, T) bool, `sees` less what `kind` hides.

    In the paper's terms softmax(QK'/sqrt(d) + M) V, with M = 0 where this is True and -inf elsewhere. What the paper
    leaves open is decided here: context sees all and is seen by all, except in IN-closed and CR-last; a token always
    sees itself.
    """
    Tq = sees.shape[1]
    q_item, k_item = item[:, -Tq:, None], item[:, None, :]
    both_items, same = (q_item > 0) & (k_item > 0), q_item == k_item
    if kind == "OR":
        return sees
    if kind == "IN":
        return sees & (~both_items | same)
    if kind == "IN-closed":
        return sees & same
    if kind not in ("CR", "CR-own", "CR-last"):
        raise InputError(f"layers of kind '{kind}': hatllm.KINDS names it, but hatllm.mask has no lines for it")
    at = torch.arange(item.shape[1], device=item.device)
    itself = at[-Tq:, None] == at  # (Tq, T)
    hidden = both_items & same & ~itself  # CR
    if kind in ("CR-own", "CR-last"):
        hidden = hidden & (q_item != TARGET)
    if kind == "CR-last":
        hidden = hidden | ((k_item > 0) & ~same & ~is_last(item)[:, None, :])
    return sees & ~hidden


def is_last(item: Tensor) -> Tensor:
    """(B, T) bool: the token is the last one of its item."""
    return F.pad(item[:, 1:] != item[:, :-1], (0, 1), value=True)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def needed(item: Tensor, multiple: int = 1) -> Tensor:
    """item (B, T) -> places (B, S) of what CR-last layers need: context, items' last tokens, the title to come. S is
    rounded up to a multiple, but is at most T."""
    kept = (item == 0) | (item == TARGET) | ((item > 0) & is_last(item))
    n = kept.sum(1, keepdim=True)
    places = torch.argsort(~kept, dim=1, stable=True)[:, : round_up(int(n.max()), multiple)]
    return torch.where(torch.arange(places.shape[1], device=item.device) < n, places, -1)


def shorten(x: Tensor, rows: Tensor, lay: Layout) -> tuple[Tensor, Tensor, Layout]:
    """Leaves out the tokens that the CR-last layers at the end of a plan do not need. x (B, T, d), rows (R,) of
    x.flatten(0, 1) and the layout -> the same with S in place of T. `lay.shorter` is there when decoding with a cache:
    then all new tokens are needed, and x and rows stay."""
    if lay.shorter is not None:
        return x, rows, lay.shorter
    places = needed(lay.item) if lay.places is None else lay.places
    at, there = places.clamp(min=0), places >= 0
    S, T = at.shape[1], lay.item.shape[1]
    sees = lay.sees.take_along_dim(at[:, :, None], 1).take_along_dim(at[:, None, :], 2)  # (B, S, S)
    sees = (sees & there[:, None, :]) | torch.eye(S, dtype=torch.bool, device=x.device)
    item = lay.item.gather(1, at).where(there, -1)
    earlier = torch.zeros_like(lay.item).scatter_add(1, at, there.long()).cumsum(1) - 1  # (B, T) needed tokens before
    rows = rows // T * S + earlier.flatten()[rows]
    return x.take_along_dim(at[:, :, None], 1), rows, Layout(item, lay.pos.gather(1, at), sees)


def layout(item: Tensor, branch: Tensor | None = None, fork: Tensor | None = None, places=None, start=None) -> Layout:
    """Layout of whole texts. item (B, T), padding (-1) last. places: see `needed`; None: they are found when needed.
    start (B, T): where a token's text begins; None: every row is one text. Positions run on: RoPE sees only distances.

    Several titles may be learnt from one history. It is the trunk, and each title is a branch that forks from it:

        tokens  Bought: red pen , ink | Next: ink | Next: well    after red pen came ink, after both came well
        branch  0       0   0   0 0   | 1     1   | 2     2
        fork                          | 3     3   | 5     5       so many tokens of the trunk a branch sees, and itself

    Without branches all is trunk: causal attention. fork counts from the row's beginning.
    """
    T = item.shape[1]
    at = torch.arange(T, device=item.device).expand_as(item)
    sees = (at[:, None, :] <= at[:, :, None]) & (item >= 0)[:, None, :]
    if start is not None:
        sees = sees & (at[:, None, :] >= start[:, :, None])
    pos = at
    if branch is not None:
        q_branch, k_branch = branch[:, :, None], branch[:, None, :]
        same = q_branch == k_branch
        sees = sees & (same | ((k_branch == 0) & (at[:, None, :] < fork[:, :, None])))
        own = (same & sees).sum(-1) - 1  # how many tokens of its own branch precede a token
        pos = torch.where(branch > 0, fork + own, at)
    sees = sees | torch.eye(T, dtype=torch.bool, device=item.device)  # padding sees itself: no empty softmax, no NaN
    return Layout(item, pos, sees, places, causal=branch is None and start is None)


def mark_dynamic(*found):
    """Tells torch.compile that the first size of these tensors, the number of rows, differs from call to call. Under
    dynamic=False all other sizes are fixed: FlexAttention is several times as fast if it knows the length of rows."""
    for t in found:
        if isinstance(t, Tensor):
            torch._dynamo.maybe_mark_dynamic(t, 0)


# --- python hatllm.py: the masks of a small example -----------------------------------------------------------------


def draw() -> str:
    """The masks side by side, queries down and keys across: # own item, + other item, o context, . hidden."""
    words, item = "Bought: red pen , ink well . Next: paper clip".split(), [0, 1, 1, 0, 2, 2, 0, 0, TARGET, TARGET]
    lay, wide = layout(torch.tensor([item])), max(map(len, words)) + 1
    lines = [" " * wide + "  ".join(f"{kind:<{len(item)}}" for kind in KINDS)]
    for i, word in enumerate(words):
        cells = []
        for kind in KINDS:
            seen = mask(kind, lay.item, lay.sees)[0, i].tolist()
            signs = ["o" if not (item[i] and k) else "#" if item[i] == k else "+" for k in item]
            cells.append("".join(signs[j] if seen[j] else "." if j <= i else " " for j in range(len(item))))
        lines.append(f"{word:<{wide}}" + "  ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(f"plan {PLAN}: the layers of a 4-layer model are {' '.join(parse_plan(PLAN, 4))}\n")
    print(draw())
    print("\n# own item   + other item   o from or to context   . hidden by the mask")
