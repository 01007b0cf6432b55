"""A Llama, by hand: loads and saves Hugging Face Llama, Qwen2 and Qwen3 folders, and gives every layer its mask.

Shapes: B users, T tokens (Tq of them queries), d width, H heads, G query heads per key/value head, D head width,
V vocabulary. Module names are those of the checkpoints, so a state dict needs no table of names. Equal to transformers'
LlamaForCausalLM within 1e-5 in fp32 (tests/test_model.py).
"""

import functools
import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hatllm import InputError, Layout, mark_dynamic, parse_plan, shorten

CLASSES = dict(llama="LlamaForCausalLM", qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
FIXED = dict(  # keys of config.json that change the computation, and the one value known here
    hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False, rope_interleaved=False,
    partial_rotary_factor=1.0, pretraining_tp=1, quantization_config={},
)  # fmt: skip
PLAIN_LORA = dict(  # the same of adapter_config.json
    peft_type="LORA", bias="none", use_rslora=False, use_dora=False, rank_pattern={}, alpha_pattern={},
    fan_in_fan_out=False, layers_to_transform=[], init_lora_weights=True, alora_invocation_tokens=[],
)  # fmt: skip


# --- JSON in and out ------------------------------------------------------------------------------------------------


def read_json(path: Path, types: dict[str, type] | None = None) -> dict:
    """A JSON object whose keys in types are of these types. Raises InputError that names the file and the key."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    check_type(path, "what it holds", found, dict)
    for key, kind in (types or {}).items():
        check_type(path, key, found.get(key), kind)
    return found


def check_type(path: Path, key: str, value, kind: type, least: float = -math.inf):
    """Raises InputError unless value is of that type; a number must also be finite, at least `least`, not enormous."""
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind in (int, float) and not least <= value < (10**9 if kind is int else math.inf)):
        raise InputError(f"{path}: {key} is {value!r:.60}, but a {kind.__name__} is needed")


def refuse_others(path: Path, found: dict, fixed: dict):
    """fixed: keys, and the one value of each that is known here."""
    for key, value in fixed.items():
        if found.get(key) not in (None, value):
            raise InputError(f"{path}: {key} is {found[key]!r:.60}, but only {value!r} is known here")


def write_json(path: Path, value):
    """Whole or not at all. A list is written line by line."""
    text = "".join(json.dumps(v) + "\n" for v in value) if isinstance(value, list) else json.dumps(value, indent=1)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({e})") from e


# --- The model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The part of config.json that changes the computation, under Hugging Face's names."""

    hidden_size: int  # d
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # H / G
    vocab_size: int
    eos_token_id: int
    head_dim: int = 0  # D; 0 means hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None or llama3's factor, low_freq_factor, high_freq_factor, ...
    tie_word_embeddings: bool = True
    model_type: str = "llama"  # qwen2 has a bias on q, k, v; qwen3 a norm on q, k
    max_position_embeddings: int = 2048
    hatllm_plan: str = "OR"  # the plan it was trained with; transformers ignores it

    def __post_init__(self):
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)

    @staticmethod
    def read(path: Path) -> "Config":
        """From a Hugging Face config.json. Raises InputError that names the key this Llama cannot honour."""
        found, fields = read_json(path), Config.__dataclass_fields__
        kind, eos = found.get("model_type", "llama"), found.get("eos_token_id")
        refuse_others(path, found, FIXED | {"model_type": kind if kind in [*CLASSES] else " or ".join(CLASSES)})
        own = {"num_key_value_heads": found.get("num_attention_heads"), "tie_word_embeddings": False}
        own |= {"head_dim": 128} if kind == "qwen3" else {}  # where it is not given
        own |= {key: found[key] for key in fields if found.get(key) is not None}
        own |= read_rope(path, found) | {"model_type": kind}
        own["eos_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
        for key, field in fields.items():
            if key != "rope_scaling" and (key in own or field.default is MISSING):
                check_type(path, key, own.get(key), field.type, 0 if key == "eos_token_id" else 1e-12)
        c = Config(**own)
        heads, layers = (c.num_attention_heads, c.num_key_value_heads), c.num_hidden_layers
        if heads[0] % heads[1] or c.head_dim % 2 or layers > 1000 or c.eos_token_id >= c.vocab_size:
            raise InputError(f"{path}: no Llama has {layers} layers, {heads} heads of {c.head_dim}, a vocabulary of "
                             f"{c.vocab_size} with end token {c.eos_token_id}")  # fmt: skip
        return c

    def to_json(self) -> dict:
        return asdict(self) | {"architectures": [CLASSES[self.model_type]], "hidden_act": "silu"}


def read_rope(path: Path, found: dict) -> dict:
    """rope_theta and rope_scaling out of config.json as transformers 4 or 5 writes it."""
    scaling = found.get("rope_scaling") or found.get("rope_parameters") or {}
    check_type(path, "rope_scaling", scaling, dict)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    by_layer = any(isinstance(value, dict) for value in scaling.values())
    if kind not in ("default", "llama3") or by_layer or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{path}: rope scaling {scaling!r:.200} is not known here, only the types default and llama3")
    for key in LLAMA3 if kind == "llama3" else ():
        check_type(path, key, scaling.get(key), float, 1e-12)
    theta = scaling.get("rope_theta", found.get("rope_theta", 10000.0))
    check_type(path, "rope_theta", theta, float, 1e-12)
    return {"rope_theta": float(theta), "rope_scaling": scaling if kind == "llama3" else None}


def rope_frequencies(c: Config, device) -> Tensor:
    """(D/2,) radians per position; llama3 scaling as in transformers' modeling_rope_utils.py."""
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if c.rope_scaling is None:
        return freq
    factor, low, high, context = (c.rope_scaling[key] for key in LLAMA3)
    turns = context * freq / (2 * math.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, stretched by factor; 1: fast, kept
    return (1 - smooth) * freq / factor + smooth * freq


def rope(c: Config, pos: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021): pos (B, T) -> cos, sin (B, T, 1, D), half-split as in Hugging Face's files; of
    sin the first half is negative."""
    angle = pos[:, :, None, None].float() * rope_frequencies(c, pos.device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, heads, D), turned by its position: (a, b) -> (a cos - b sin, b cos + a sin) of its halves."""
    cos, sin = cos_sin
    swapped = x.roll(x.shape[3] // 2, 3)  # (b, a); the minus of -b stands in sin
    return torch.addcmul(x * cos, swapped, sin)


class Cache:
    """Keys and values of the tokens so far, in the order of the calls."""

    def __init__(self, layers: int):
        self.k, self.v = [None] * layers, [None] * layers

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, Hkv, Tq, D) of the new tokens -> those of all tokens (B, Hkv, T, D)."""
        if self.k[layer] is not None:
            k, v = torch.cat((self.k[layer], k), 2), torch.cat((self.v[layer], v), 2)
        self.k[layer], self.v[layer] = k, v
        return k, v


@functools.cache
def compiled_flex():
    """FlexAttention, compiled when it is first called: importing the compiler takes seconds."""
    return torch.compile(flex_attention, dynamic=False)  # see hatllm.mark_dynamic


def by_blocks(x: Tensor, D: int) -> bool:
    """Whether FlexAttention can do it."""
    return x.is_cuda and D >= 16


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v: q (B, H, Tq, D); k, v (B, H / G, T, D) -> (B, H, Tq, D). mask: see Layout; None
    is causal attention."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if isinstance(mask, BlockMask):
        if torch.compiler.is_compiling():
            return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        mark_dynamic(q, k, v)
        return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)
    # the G heads that share a key stand one after the other as more queries, so that K and V are never copied
    x = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, H / G, G * Tq, D)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # there torch's kernel takes twice as long as this
        y = (x * x.shape[3] ** -0.5 @ k.transpose(2, 3) + mask).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(x, k, v, attn_mask=mask)
    return y.reshape(q.shape)


class Linear(nn.Linear):
    """Computes in the type of x. Trained weights stay in fp32 and are cast here; frozen ones have that type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        d, H, Hkv, self.D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        bias, norm = c.model_type == "qwen2", c.model_type == "qwen3"
        self.q_proj = Linear(d, H * self.D, bias=bias)
        self.k_proj = Linear(d, Hkv * self.D, bias=bias)
        self.v_proj = Linear(d, Hkv * self.D, bias=bias)
        self.o_proj = Linear(H * self.D, d, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.D, c.rms_norm_eps) if norm else nn.Identity() for _ in "qk")

    def qkv(self, x: Tensor, cos_sin, real: Tensor | None = None) -> list[Tensor]:
        """x (B, T, d), or (F, d) of the tokens real (F,) of B * T -> q, k, v (B, heads, T, D), else 0."""
        flat = [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)]
        B, T, _, _ = cos_sin[0].shape
        if real is not None:
            flat = [y.new_zeros(B * T, y.shape[1]).index_copy(0, real, y) for y in flat]
        q, k, v = (y.view(B, T, y.shape[-1] // self.D, self.D) for y in flat)
        q, k = rotate(self.q_norm(q), cos_sin), rotate(self.k_norm(k), cos_sin)
        return [y.transpose(1, 2) for y in (q, k, v)]

    def forward(self, x: Tensor, cos_sin, mask, cache: Cache | None, layer: int, real=None) -> Tensor:
        """x (B, Tq, d) -> (B, Tq, d), or (F, d) of the tokens real (F,) of B * Tq -> (F, d). mask: one of Layout's two.
        The cache may lack the first tokens if the new ones see none of them in this layer."""
        q, k, v = self.qkv(x, cos_sin, real)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            if mask is not None and k.shape[2] < mask.shape[3]:  # in the layers of the item cache
                mask = mask[..., -k.shape[2] :].contiguous()  # else its rows are not aligned for a GPU's kernels
        y = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.o_proj(y if real is None else y.flatten(0, 1)[real])


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int, kind: str, dropout: float = 0.0):
        super().__init__()
        self.layer, self.kind, self.G = layer, kind, c.num_attention_heads // c.num_key_value_heads
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.dropout = nn.Dropout(dropout)  # of both branches, before they join the residual stream
        self.compiled = None  # of `compute`, by train.py --compile: decoding has too many shapes to be compiled

    def forward(self, x: Tensor, cos_sin, layout: Layout, cache: Cache | None = None, rows: Tensor | None = None):
        """x (B, Tq, d) -> (B, Tq, d), or (R, d) of the tokens rows (R,) of x.flatten(0, 1), which alone go on. With
        layout.real (F, d) -> (F, d)."""
        learns = torch.is_grad_enabled() and cache is None
        # all of HatLLM: what this layer's tokens may look at
        if learns and by_blocks(x, self.self_attn.D):
            mask = layout.block_mask(self.kind)
        else:
            mask = layout.additive_mask(self.kind, self.G, x.dtype)
        if learns and self.compiled:
            mark_dynamic(x, *cos_sin, rows)
            return self.compiled(x, cos_sin, mask, cache, rows, layout.real)
        return self.compute(x, cos_sin, mask, cache, rows, layout.real)

    def compute(self, x: Tensor, cos_sin, mask, cache: Cache | None, rows: Tensor | None, real=None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos_sin, mask, cache, self.layer, real))
        x = x if rows is None else x.flatten(0, 1)[rows]
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    def __init__(self, c: Config, plan: str = "OR", dropout: float = 0.0):
        """plan: see hatllm.py. dropout: on the embeddings and both branches of every block, to train from scratch."""
        super().__init__()
        self.config, self.plan = replace(c, hatllm_plan=plan), parse_plan(plan, c.num_hidden_layers)
        self.dtype = None  # of the computation; None: that of the weights
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        # the first of the CR-last layers at the end
        self.first_short = max((i + 1 for i, kind in enumerate(self.plan) if kind != "CR-last"), default=0)
        self.layers = nn.ModuleList(Block(c, i, kind, dropout) for i, kind in enumerate(self.plan))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def init_weights(self) -> "Llama":
        """GPT-2's: N(0, 0.02), the projections into the residual stream less by sqrt(2 * layers)."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.layers)) if deep else 0.02)
        return self

    def forward(self, tokens: Tensor, layout: Layout, cache: Cache | None = None, rows: Tensor | None = None) -> Tensor:
        """tokens (B, Tq) -> (B, Tq, d) after the last norm, or (R, d) where only rows (R,), of the B * Tq tokens, are
        needed: the last MLP sees them alone. tokens (F,) -> (F, d) with layout.real. `logits` is the caller's."""
        x = self.dropout(self.embed_tokens(tokens))
        return self.norm(self.blocks(x.to(self.dtype or x.dtype), layout, cache, rows=rows))

    def blocks(self, x: Tensor, layout: Layout, cache=None, first=0, last=None, rows=None) -> Tensor:
        """x (B, Tq, d) through the layers first .. last - 1; rows: see forward."""
        cos_sin = rope(self.config, layout.pos, x.dtype)
        for block in self.layers[first:last]:
            if block.layer == self.first_short and (rows is not None or layout.shorter is not None):
                x, rows, layout = shorten(x, rows, layout)
                cos_sin = rope(self.config, layout.pos, x.dtype)
            x = block(x, cos_sin, layout, cache, rows if block is self.layers[-1] else None)
        return x

    @property
    def head(self) -> Tensor:
        """(V, d): a row per token of the vocabulary."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """x (..., d) -> (..., V), or (..., len(columns)) for these tokens only. Always computed in fp32: a bfloat16
        logit of 16 stands in steps of 1/8, and two titles would tie."""
        head = self.head if columns is None else self.head[columns]
        return F.linear(x.float(), head.float())


# LoRA (Hu et al. 2021) with the semantics of peft: y = Wx + B A dropout(x) * alpha / r, A Kaiming, B zero, both fp32


class LoRALinear(Linear):
    """Holds the weight of base, not base itself: so the weight keeps its name in the checkpoint."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.r, self.alpha, self.dropout = r, alpha, nn.Dropout(dropout)
        self.lora_A = Linear(base.in_features, r, bias=False, device=base.weight.device)  # Kaiming, a = sqrt 5
        self.lora_B = Linear(r, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(self.dropout(x)) * (self.alpha / self.r))


def add_lora(model: Llama, r: int, alpha: float, dropout: float, targets: list[str]) -> Llama:
    """Freezes the model and puts adapters beside the linear layers of the blocks whose names are in targets."""
    model.requires_grad_(False)
    linear = {name: m for name, m in model.layers.named_modules() if isinstance(m, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    if not targets or set(targets) - known:
        raise InputError(f"adapters for {targets}: a block's layers are {', '.join(sorted(known))}")
    for name, base in linear.items():
        if name.rpartition(".")[2] in targets:
            model.layers.set_submodule(name, LoRALinear(base, r, alpha, dropout))
    return model


def adapters(model: Llama) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge_lora(model: Llama) -> Llama:
    """Every layer with adapters becomes one with the weight W + B A alpha / r."""
    for name, m in adapters(model).items():
        # in double: validation merges on a GPU, whose products in fp32 are rounded to TF32, the test on a CPU
        delta = (m.lora_B.weight.double() @ m.lora_A.weight.double()) * (m.alpha / m.r)
        one = Linear(m.in_features, m.out_features, m.bias is not None, device="meta")
        one.weight, one.bias = nn.Parameter((m.weight + delta).to(m.weight.dtype), False), m.bias
        model.set_submodule(name, one)
    return model


# --- Weights in and out: safetensors under Hugging Face's and peft's names ------------------------------------------


def hf_name(name: str) -> str:
    """Our name of a parameter -> the checkpoint's."""
    return name if name.startswith("lm_head.") else "model." + name


def peft_name(name: str) -> str | None:
    """None for what is no adapter."""
    return "base_model.model.model." + name if "lora_" in name else None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise InputError(f"{file} is missing; transformers saves folders of config.json, tokenizer.json, *.safetensors")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file}: damaged or not a safetensors file ({e})") from None
    for name, t in tensors.items():
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise InputError(f"{file}: tensor {name} is of type {t.dtype}; quantised weights are not supported")
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].exists() and index.exists():
        shards = read_json(index, {"weight_map": dict})["weight_map"].values()
        files = [folder / Path(name).name for name in sorted(set(map(str, shards)))]
    tensors = {k: v for file in files for k, v in read_safetensors(file).items()}
    return {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}


def assign(model: nn.Module, tensors: dict[str, Tensor], rename, where: Path):
    """Makes tensors the parameters whose rename(name) they bear; names and shapes must agree both ways."""
    own = {rename(n): (n, p) for n, p in model.named_parameters() if rename(n)}
    for what, names in (("lacks", own.keys() - tensors.keys()), ("has an unknown", tensors.keys() - own.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{where} {what} tensor {shown}; is it the model that its config describes?")
    for name, (_, p) in own.items():
        if tensors[name].shape != p.shape:
            raise InputError(f"{where}: tensor {name} has shape {[*tensors[name].shape]}, expected {[*p.shape]}")
        if not tensors[name].isfinite().all():
            raise InputError(f"{where}: tensor {name} holds numbers that are not finite")
    model.load_state_dict({own[k][0]: v for k, v in tensors.items()}, strict=False, assign=True)


def load(folder: str | Path, plan: str | None = None, dtype: torch.dtype = torch.float32, dropout=0.0) -> Llama:
    """A Hugging Face Llama folder as a Llama. plan: None takes the one stored by `save`, else OR. Memory: that of the
    weights, since none is initialised. Raises InputError."""
    folder = Path(folder)
    c, tensors = Config.read(folder / "config.json"), read_tensors(folder)
    if c.tie_word_embeddings and "lm_head.weight" in tensors:  # stored twice, or under this name alone
        head = tensors.pop("lm_head.weight")
        if not torch.equal(tensors.setdefault("model.embed_tokens.weight", head), head):
            raise InputError(f"{folder}: lm_head.weight differs from the embedding, though tie_word_embeddings is true")
    with torch.device("meta"):
        model = Llama(c, c.hatllm_plan if plan is None else plan, dropout)
    assign(model, {k: v.to(dtype) for k, v in tensors.items()}, hf_name, folder)
    return model


def save(model: Llama, folder: str | Path):
    """Writes what transformers' LlamaForCausalLM.from_pretrained reads, adapters merged in. transformers knows no
    masks: it computes the plan OR. `load` reads the plan as well."""
    if adapters(model):
        raise ValueError("adapters would be lost; merge_lora first, or save_lora")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(n): p.detach().contiguous() for n, p in model.named_parameters()}
    dtype = str(model.head.dtype).removeprefix("torch.")
    write_json(folder / "config.json", model.config.to_json() | {"torch_dtype": dtype})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_lora(model: Llama, folder: str | Path, base: str = ""):
    """Writes what peft's PeftModel.from_pretrained reads: adapter_model.safetensors and adapter_config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = adapters(model)
    one = next(iter(own.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none"}
    config |= {"r": one.r, "lora_alpha": one.alpha, "lora_dropout": one.dropout.p}
    config |= {"target_modules": sorted({n.rpartition(".")[2] for n in own})}
    write_json(folder / "adapter_config.json", config)
    tensors = {peft_name(n): p.detach().contiguous() for n, p in model.named_parameters() if peft_name(n)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # apart: peft warns of keys that it does not know, and two of safetensors' metadata have no fixed order in the file
    write_json(folder / "hatllm.json", {"hatllm_plan": model.config.hatllm_plan})


def load_lora(model: Llama, folder: str | Path) -> Llama:
    """Adds the adapters of a folder that save_lora wrote, or peft with its plain LoRA."""
    path, file = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    c = read_json(path, {"r": int, "lora_alpha": float, "lora_dropout": float, "target_modules": list})
    refuse_others(path, c, PLAIN_LORA)
    add_lora(model, c["r"], c["lora_alpha"], c["lora_dropout"], c["target_modules"])
    tensors = {k: v.to(model.head.device, torch.float32) for k, v in read_safetensors(file).items()}
    assign(model, tensors, peft_name, file)
    return model
