"""A Llama, by hand: loads and saves Hugging Face Llama (and Qwen2) folders, and gives every layer its HatLLM mask.

Shapes: B users, T tokens (Tq of them queries), d width, H heads, G query heads per key/value head, D head width,
V vocabulary. Module names are those of the checkpoints, so a state dict needs no table of names. Equal to transformers'
LlamaForCausalLM within 1e-5 in fp32 (tests/test_model.py).
"""

import json
import math
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hatllm import InputError, Layout, parse_plan

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Config:
    """The part of config.json that changes the computation, under Hugging Face's names."""

    hidden_size: int  # d
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # H / G
    vocab_size: int
    head_dim: int = 0  # D; 0 means hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None or llama3's factor, low_freq_factor, high_freq_factor, ...
    tie_word_embeddings: bool = True
    qkv_bias: bool = False  # Qwen2 has a bias on q, k, v
    max_position_embeddings: int = 2048
    eos_token_id: int = 0

    def __post_init__(self):
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)

    @staticmethod
    def read(path: Path) -> "Config":
        """From a Hugging Face config.json. Raises InputError that names the key this Llama cannot honour."""
        try:
            c = json.loads(Path(path).read_text())
            if not isinstance(c, dict):
                raise ValueError("it holds no JSON object")
        except (OSError, ValueError) as e:
            raise InputError(
                f"{path}: cannot be read as a model's config ({e}); a Hugging Face folder has one"
            ) from None
        qwen = c.get("model_type") == "qwen2"
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # transformers 5 | 4
        kind = rope.get("rope_type", rope.get("type", "default"))
        allowed = {
            "model_type": (c.get("model_type", "llama"), ("llama", "qwen2")),
            "hidden_act": (c.get("hidden_act", "silu"), ("silu",)),
            "rope_type": (kind, ("default", "llama3")),
            "attention_bias": (c.get("attention_bias", False), (False,)),
            "mlp_bias": (c.get("mlp_bias", False), (False,)),
            "use_sliding_window": (c.get("use_sliding_window", False), (False,)),
        }
        for key, (value, known) in allowed.items():
            if value not in known:
                raise InputError(
                    f"{path}: {key} is {value!r}, but only {', '.join(map(repr, known))} is supported here"
                )
        if kind == "llama3" and (lacking := [k for k in LLAMA3 if k not in rope]):
            raise InputError(f"{path}: rope scaling 'llama3' lacks {', '.join(lacking)}")
        eos = c.get("eos_token_id")
        own = {k: c[k] for k in Config.__dataclass_fields__ if c.get(k) is not None}
        own |= {
            "num_key_value_heads": c.get("num_key_value_heads") or c.get("num_attention_heads"),
            "rope_theta": float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
            "rope_scaling": rope if kind == "llama3" else None,
            "tie_word_embeddings": c.get("tie_word_embeddings", False),
            "qkv_bias": qwen,
            "eos_token_id": eos[0] if isinstance(eos, list) and eos else eos,
        }
        needed = [k for k, field in Config.__dataclass_fields__.items() if field.default is MISSING] + ["eos_token_id"]
        if missing := [k for k in needed if own.get(k) is None]:
            raise InputError(f"{path}: key {', '.join(missing)} is missing")
        return Config(**own)

    def to_json(self) -> dict:
        c = {k: v for k, v in asdict(self).items() if k not in ("qkv_bias", "rope_scaling")}
        c["model_type"], c["architectures"] = (
            ("qwen2", ["Qwen2ForCausalLM"]) if self.qkv_bias else ("llama", ["LlamaForCausalLM"])
        )
        return c | {"hidden_act": "silu", "rope_scaling": self.rope_scaling}


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rope(nn.Module):
    """Rotary positions (Su et al. 2021) in the half-split layout of Hugging Face checkpoints."""

    def __init__(self, c: Config):
        super().__init__()
        self.c, self.freq = c, None

    def frequencies(self) -> Tensor:
        """(D/2,) radians per position; llama3 scaling as in transformers' modeling_rope_utils.py."""
        freq = self.c.rope_theta ** -(torch.arange(0, self.c.head_dim, 2).float() / self.c.head_dim)
        if (s := self.c.rope_scaling) is not None:
            turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # over the original context
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, stretched by factor; 1: fast, kept
            freq = (1 - smooth) * freq / s["factor"] + smooth * freq
        return freq

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """pos (B, T) -> cos, sin (B, 1, T, D)."""
        if self.freq is None or self.freq.device != pos.device:
            self.freq = self.frequencies().to(pos.device)
        angle = pos[:, None, :, None].float() * self.freq
        return torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(),) * 2, -1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, heads, T, D), turned by its position."""
    a, b = x.chunk(2, -1)
    return (x * rope[0] + torch.cat((-b, a), -1) * rope[1]).to(x.dtype)


class Cache:
    """Keys and values of the tokens so far, one slot per token, in the order of the calls; room grows by doubling."""

    def __init__(self, c: Config, B: int, size: int, like: Tensor):
        shape = (c.num_hidden_layers, B, c.num_key_value_heads, size, c.head_dim)
        self.k, self.v, self.n = like.new_zeros(shape), like.new_zeros(shape), 0  # zeros: a masked NaN is a NaN still

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.n + k.shape[2]
        if end > self.k.shape[3]:
            room = 0, 0, 0, max(end, 2 * self.n) - self.k.shape[3]
            self.k, self.v = F.pad(self.k, room), F.pad(self.v, room)
        self.k[layer, :, :, self.n : end], self.v[layer, :, :, self.n : end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v: q (B, heads, n, D); k, v (B, heads, T, D); mask (B, 1, n, T), 0 or -inf."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # there torch's kernel takes twice as long as this
        return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3) + mask).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        d, H, Hkv, self.D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(d, H * self.D, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, Hkv * self.D, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, Hkv * self.D, bias=c.qkv_bias)
        self.o_proj = nn.Linear(H * self.D, d, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.D)).transpose(1, 2)  # (B, T, heads * D) -> (B, heads, T, D)

    def qk(self, x: Tensor, rope) -> tuple[Tensor, Tensor]:
        return rotate(self.heads(self.q_proj(x)), rope), rotate(self.heads(self.k_proj(x)), rope)

    def forward(self, x: Tensor, rope, mask: Tensor, cache: Cache | None, layer: int) -> Tensor:
        """x (B, Tq, d) -> (B, Tq, d); mask (B, 1, G * Tq, T) is added to the scores."""
        (q, k), v = self.qk(x, rope), self.heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        B, H, Tq, D = q.shape
        # the G heads that share a key become G times the queries: no copy of K and V, on every SDPA backend
        y = attend(q.reshape(B, k.shape[1], -1, D), k, v, mask)
        return self.o_proj(y.reshape(B, H, Tq, D).transpose(1, 2).flatten(2))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():  # keep gate and up alone for the backward pass: a fifth of all that is kept
            return self.down_proj(checkpoint(swiglu, gate, up, use_reentrant=False, preserve_rng_state=False))
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int, kind: str, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)  # of both branches, before they join the residual stream
        self.layer, self.kind, self.G = layer, kind, c.num_attention_heads // c.num_key_value_heads
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.compiled = self.compute  # train.py --compile replaces it: decoding has too many shapes to be compiled

    def forward(
        self, x: Tensor, rope, layout: Layout, cache: Cache | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """x (B, Tq, d) -> (B, Tq, d), or (R, d) of the tokens rows (R,) of x.flatten(0, 1), which alone go on."""
        amp = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if amp else x.dtype
        mask = layout.additive_mask(self.kind, self.G, dtype)  # all of HatLLM: what this layer's tokens may look at
        compute = self.compiled if cache is None and torch.is_grad_enabled() else self.compute
        return compute(x, rope, mask, cache, rows)

    def compute(self, x: Tensor, rope, mask: Tensor, cache: Cache | None, rows: Tensor | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache, self.layer))
        x = x if rows is None else x.flatten(0, 1)[rows]
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    def __init__(self, c: Config, plan: str = "OR", dropout: float = 0.0):
        """dropout: on the embeddings and on both branches of every block, for training from scratch."""
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.config, self.plan, self.checkpointing = c, parse_plan(plan, c.num_hidden_layers), False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i, kind, dropout) for i, kind in enumerate(self.plan))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.rope = Rope(c)

    def init_weights(self) -> "Llama":
        """GPT-2's: N(0, 0.02), the projections into the residual stream less by sqrt(2 * layers)."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.layers)) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    def forward(self, tokens: Tensor, layout: Layout, cache: Cache | None = None, rows: Tensor | None = None) -> Tensor:
        """tokens (B, Tq) -> (B, Tq, d) after the last norm, or (R, d) where only rows (R,), of the B * Tq tokens, are
        needed: the last MLP sees them alone. `logits` is the caller's."""
        return self.norm(self.blocks(self.dropout(self.embed_tokens(tokens)), layout, cache, rows=rows))

    def blocks(
        self,
        x: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        first: int = 0,
        last: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x (B, Tq, d) through the layers first .. last - 1; rows: see forward."""
        rope, Tq = self.rope(layout.pos), x.shape[1]
        for block in self.layers[first:last]:
            args = x, rope, layout, cache, rows if block is self.layers[-1] else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        if cache is not None:
            cache.n += Tq
        return x

    @property
    def head(self) -> Tensor:
        """(V, d): a row per token of the vocabulary."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """x (..., d) -> (..., V) in fp32, or (..., len(columns)) for these tokens only, then computed in fp32: a
        bfloat16 logit of 16 stands in steps of 1/8, and two titles would tie."""
        if columns is None:
            return F.linear(x, self.head).float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head[columns].float())


# ---------------------------------------------------------------------------------------------------------------------
# LoRA (Hu et al. 2021) with the semantics of peft: y = Wx + B A dropout(x) * alpha / r, A Kaiming, B zero, both fp32


class LoRALinear(nn.Linear):
    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.r, self.alpha, self.merged = base.weight, base.bias, r, alpha, False
        device = base.weight.device
        self.lora_A = nn.Linear(
            base.in_features, r, bias=False, device=device
        )  # nn.Linear's init is Kaiming, a = sqrt 5
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        return y + (self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * (self.alpha / self.r)).to(
            y.dtype
        )

    @torch.no_grad()
    def merge(self, on: bool = True):
        """Adds B A alpha / r to the weight (or takes it back), once however often it is called."""
        if on != self.merged:
            delta = (self.lora_B.weight @ self.lora_A.weight) * (self.alpha / self.r) * (1 if on else -1)
            self.weight.data = (self.weight.float() + delta).to(self.weight.dtype)
            self.merged = on


def add_lora(
    model: Llama, r: int = 8, alpha: float = 16, dropout: float = 0.0, targets: str = "q_proj,v_proj"
) -> Llama:
    """Freezes the model and puts adapters beside the linear layers whose names are in targets."""
    model.requires_grad_(False)
    names = {t.strip() for t in targets.split(",")}
    blocks = model.layers  # not lm_head: `logits` reads its weight alone
    found = [(n, m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in names]
    if unknown := names - {n.rpartition(".")[2] for n, _ in found}:
        linear = sorted({n.rpartition(".")[2] for n, m in blocks.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(
            f"--lora_targets: no block has a linear layer {', '.join(sorted(unknown))}; it has {', '.join(linear)}"
        )
    for name, base in found:
        setattr(
            blocks.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], LoRALinear(base, r, alpha, dropout)
        )
    return model


def merge_lora(model: Llama, on: bool = True) -> Llama:
    for m in model.modules():
        if isinstance(m, LoRALinear):
            m.merge(on)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Weights in and out: safetensors under Hugging Face's and peft's names


def hf_name(name: str) -> str | None:
    """Our name of a parameter -> the checkpoint's; None for adapters."""
    return None if "lora_" in name else name if name.startswith("lm_head.") else "model." + name


def peft_name(name: str) -> str | None:
    return "base_model.model.model." + name if "lora_" in name else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    shards, tensors = ["model.safetensors"], {}
    try:
        if not file.exists() and index.exists():
            file = index
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for file in (folder / s for s in shards):
            tensors.update(read_safetensors(file))
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise InputError(f"{file}: damaged ({e!r}); fetch the model again") from None
    return tensors


def read_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise InputError(f"{file} is missing; a model's folder holds config.json, tokenizer.json and *.safetensors")
    try:
        with safe_open(file, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file}: damaged or not a safetensors file ({e})") from None


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
    model.load_state_dict({own[k][0]: v for k, v in tensors.items()}, strict=False, assign=True)


def load(folder: Path, plan: str = "OR", dtype: torch.dtype = torch.float32) -> Llama:
    """A Hugging Face Llama folder as a Llama with this plan. Memory: that of the weights, since none is initialised."""
    folder = Path(folder)
    c = Config.read(folder / "config.json")
    with torch.device("meta"):
        model = Llama(c, plan)
    tensors = {k: v.to(dtype) for k, v in read_tensors(folder).items() if not k.endswith("rotary_emb.inv_freq")}
    if c.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some checkpoints store the tied head as well
    assign(model, tensors, hf_name, folder)
    return model


def save(model: Llama, folder: Path):
    """Writes what transformers' LlamaForCausalLM.from_pretrained reads, adapters merged in."""
    if unmerged := [m for m in model.modules() if isinstance(m, LoRALinear) and not m.merged]:
        raise ValueError(f"{len(unmerged)} adapters are not merged and would be lost; merge_lora first, or save_lora")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(n): p.detach().contiguous() for n, p in model.named_parameters() if hf_name(n)}
    config = model.config.to_json() | {"torch_dtype": str(model.head.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_lora(model: Llama, folder: Path, base: str = ""):
    """Writes what peft's PeftModel.from_pretrained reads: adapter_model.safetensors and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    one = next(iter(adapters.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": one.r,
        "bias": "none",
    }
    config |= {"lora_alpha": one.alpha, "lora_dropout": one.dropout.p, "target_modules": sorted(adapters)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    tensors = {peft_name(n): p.detach().contiguous() for n, p in model.named_parameters() if peft_name(n)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_lora(model: Llama, folder: Path) -> Llama:
    """Adds the adapters of a folder that save_lora or peft wrote. Adapters that would change nothing are an error."""
    try:
        c = json.loads((folder / "adapter_config.json").read_text())
        args = c["r"], c["lora_alpha"], c["lora_dropout"], ",".join(c["target_modules"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise InputError(f"{folder}/adapter_config.json: cannot be read ({e!r})") from None
    for key in ("use_rslora", "alpha_pattern", "target_modules"):  # another scale, or targets as a regular expression
        if c.get(key) and not isinstance(c[key], list):
            raise InputError(f"{folder}/adapter_config.json: {key} is {c[key]!r}, which is not supported here")
    add_lora(model, *args)
    file = folder / "adapter_model.safetensors"
    tensors = read_safetensors(file)
    assign(model, {k: v.to(model.head.device, torch.float32) for k, v in tensors.items()}, peft_name, file)
    if not any(v.any() for k, v in tensors.items() if "lora_B" in k):
        raise InputError(f"{file}: all of lora_B is zero, so these adapters change nothing: were they ever trained?")
    return model
