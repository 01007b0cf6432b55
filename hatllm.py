"""HatLLM in one file: which token may look at which, layer by layer (arXiv 2510.10955, sec. 3; no public code exists).

A prompt is context (instruction, separators, response header), the titles the user bought, and the title to come.
Every token carries `item`: 0 context, k = 1..n the k-th bought item, n + 1 the target title, -1 padding.
Each layer is of one kind, and a *plan* names the kinds from the first layer to the last:

    IN         intra-item, shallow layers: an item's token does not look at the tokens of other items
    OR         original, middle layers: plain causal attention
    CR         cross-item, deep layers: an item's token does not look at the other tokens of its own item
    IN-closed  IN in which items and context do not look at each other either: the state of an item's tokens is then
               a function of its title alone, and can be computed once for all users (eval.py does)

All-OR is the plain LLM. `python hatllm.py` draws the masks of a small example.
"""

import sys
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that says what, where and what to do. main() prints only that."""


KINDS = ("IN", "OR", "CR", "IN-closed")
PLAN = "IN:1/4 OR CR:1/4"  # the default: 8 + 14 + 8 of 30 layers, 2 + 2 + 2 of 6


def parse_plan(text: str, n_layers: int) -> list[str]:
    """'IN:8 OR:14 CR:8' -> the kind of every layer. A count may be a fraction of the depth (halves round up), and one
    kind may stand without a count: it takes what is left. Raises InputError if the plan does not fit n_layers."""
    runs, rest = [], None
    for part in text.split():
        kind, colon, count = part.partition(":")
        if kind not in KINDS:
            raise InputError(f"plan '{text}': unknown layer kind '{kind}'; the kinds are {', '.join(KINDS)}")
        try:
            size = Fraction(count) if colon else Fraction(0)
        except (ValueError, ZeroDivisionError):
            size = Fraction(-1)
        if size < 0 or (size.denominator > 1 and size >= 1) or (not colon and rest is not None):
            raise InputError(
                f"plan '{text}': '{part}' needs a count like {kind}:8 or {kind}:1/4 (one kind may go without)"
            )
        rest = rest if colon else len(runs)
        runs.append([kind, int(size if size.denominator == 1 else size * n_layers + Fraction(1, 2))])
    total = sum(n for _, n in runs)
    if rest is not None and total <= n_layers:
        runs[rest][1] = n_layers - total
    if not runs or sum(n for _, n in runs) != n_layers:
        raise InputError(f"plan '{text}' covers {total} layers, but the model has {n_layers}; try '{PLAN}'")
    return [kind for kind, n in runs for _ in range(n)]


@dataclass
class Layout:
    """What the tokens are. The queries are the last Tq of the T tokens: all of them in training and prefill, the new
    ones when decoding with a cache. A mask is built once per forward and kind and shared by the layers of that kind."""

    item: Tensor  # (B, T) 0 context, 1.. items, -1 padding
    pos: Tensor  # (B, Tq) position of the queries, for RoPE
    sees: Tensor  # (B, Tq, T) bool: the key comes before the query in one and the same text, or is the query itself
    masks: dict = field(default_factory=dict)

    def mask(self, kind: str) -> Tensor:
        """(B, 1, Tq, T) bool, True where a query may look at a key in a layer of this kind."""
        if kind not in self.masks:
            self.masks[kind] = mask(kind, self.item, self.sees).unsqueeze(1)
        return self.masks[kind]

    def additive_mask(self, kind: str, G: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, G * Tq, T) the same as the paper's M, 0 or -inf, for G heads one after the other."""
        if (kind, dtype) not in self.masks:
            M = torch.zeros_like(seen := self.mask(kind), dtype=dtype).masked_fill_(~seen, -torch.inf)
            self.masks[kind, dtype] = M.repeat(1, 1, G, 1)
        return self.masks[kind, dtype]


def mask(kind: str, item: Tensor, sees: Tensor) -> Tensor:
    """The method. item (B, T), sees (B, Tq, T) with the queries last -> (B, Tq, T) bool, `sees` less what `kind` hides.

    In the paper's terms softmax(QK'/sqrt(d) + M) V, with M = 0 where this is True and -inf elsewhere. What the paper
    leaves open is decided here: context sees all and is seen by all, except in IN-closed; a token always sees itself.
    """
    q, k = item[:, -sees.shape[1] :, None], item[:, None, :]
    both_items, same = (q > 0) & (k > 0), q == k
    at = torch.arange(item.shape[1], device=item.device)
    itself = at[-sees.shape[1] :, None] == at
    if kind == "OR":
        return sees
    if kind == "IN":
        return sees & (~both_items | same)
    if kind == "IN-closed":
        return sees & same
    if kind == "CR":
        return sees & (~(both_items & same) | itself)
    raise InputError(f"unknown layer kind '{kind}'; the kinds are {', '.join(KINDS)}")


def layout(item: Tensor, branch: Tensor | None = None, fork: Tensor | None = None) -> Layout:
    """Layout of whole texts. item (B, T), padding (-1) last.

    Several continuations may share one history: branch (B, T) is 0 on the trunk and b = 1.. on the b-th continuation,
    which sees the trunk's first fork (B, T) tokens and itself. Without branches all is trunk: causal attention.
    """
    T = item.shape[1]
    at = torch.arange(T, device=item.device).expand_as(item)
    sees = (at[:, None, :] <= at[:, :, None]) & (item >= 0)[:, None, :]
    pos = at
    if branch is not None:
        q, k = branch[:, :, None], branch[:, None, :]
        sees = sees & ((q == k) | ((k == 0) & (at[:, None, :] < fork[:, :, None])))
        own = ((q == k) & sees).sum(-1) - 1  # how many tokens of its own branch precede a token
        pos = torch.where(branch > 0, fork + own, at)
    sees = sees | torch.eye(T, dtype=torch.bool, device=item.device)  # padding sees itself: no empty softmax, no NaN
    return Layout(item, pos, sees)


# ---------------------------------------------------------------------------------------------------------------------
# python hatllm.py: the masks of a small example


def draw(kinds=("IN", "OR", "CR"), words=("Bought:", "red", "pen", ",", "ink", "well", ".", "Next:", "paper", "clip"),
         item=(0, 1, 1, 0, 2, 2, 0, 0, 3, 3), colour: bool = False) -> str:  # fmt: skip
    """The masks side by side, queries down and keys across: # own item, + other item, o context, . hidden."""
    lay = layout(torch.tensor([item]))
    paint = {"#": "\033[92m", "+": "\033[94m", "o": "\033[90m", ".": "\033[90m"}
    wide = max(map(len, words)) + 1
    lines = [" " * wide + "  ".join(f"{kind:<{len(item)}}" for kind in kinds)]
    for i, word in enumerate(words):
        cells = []
        for kind in kinds:
            row = ""
            for j in range(len(item)):
                c = "o" if not (item[i] and item[j]) else "#" if item[i] == item[j] else "+"
                c = c if lay.mask(kind)[0, 0, i, j] else "." if j <= i else " "
                row += f"{paint[c]}{c}\033[0m" if colour and c in paint else c
            cells.append(row)
        lines.append(f"{word:<{wide}}" + "  ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(f"plan {PLAN}: the layers of a 6-layer model are {' '.join(parse_plan(PLAN, 6))}\n")
    print(draw((*KINDS,), colour=sys.stdout.isatty()))
    print("\n# own item   + other item   o from or to context   . hidden by the mask")
