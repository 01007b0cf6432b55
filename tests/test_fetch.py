"""extras/fetch.py against a server on this machine: downloads, what arrives damaged, raw formats."""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from extras import fetch
from hatllm import InputError

ONE, TWO = (gzip.compress(os.urandom(300_000), 0) for _ in range(2))


class Server(http.server.BaseHTTPRequestHandler):
    """Sends server.content[: server.stop] in pieces of 20,000 bytes; knows ranges where it has an ETag."""

    def do_GET(self):
        server, start = self.server, 0
        server.ranges.append(self.headers.get("Range"))
        if server.etag and self.headers.get("If-Range") == server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start > len(server.content) or self.path != "/file":
            return self.send_error(404 if self.path != "/file" else 416)
        self.send_response(206 if start else 200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        content = server.content[: server.stop]
        for at in range(start, len(content), 20_000):
            time.sleep(server.pause)
            self.wfile.write(content[at : at + 20_000])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        served.content, served.etag, served.stop, served.ranges, served.pause = ONE, '"1"', None, [], 0
        served.url = f"http://127.0.0.1:{served.server_port}/file"
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield served
        served.shutdown()


@pytest.mark.parametrize("etag, content", [('"1"', ONE), ('"2"', TWO), ('"1"', gzip.compress(b"short")), ("", TWO)])
def test_only_a_part_of_the_same_version_is_continued(server, tmp_path, etag, content):
    server.stop = 100_000
    with pytest.raises(InputError, match="stopped at 100000 of 300"):
        fetch.download(server.url, tmp_path / "a.gz", None)
    assert not (tmp_path / "a.gz").exists()
    server.stop, server.etag, server.content = None, etag, content
    fetch.download(server.url, tmp_path / "a.gz", None)
    assert (tmp_path / "a.gz").read_bytes() == content and os.listdir(tmp_path) == ["a.gz"]
    # the first is continued; the third is shorter than its part: 416, then the same source from zero
    assert server.ranges[:2] == [None, "bytes=100000-"] and len(server.ranges) == 2 + (len(content) < 100_000)


def test_limits_of_time_and_size(server, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "PATIENCE", 0.3)
    server.pause = 0.2
    with pytest.raises(InputError, match="run again to continue"):
        fetch.download(server.url, tmp_path / "a.gz", None)
    assert (tmp_path / "a.gz.part").stat().st_size < 200_000  # stopped in time, not after the last drop
    monkeypatch.setattr(fetch, "LIMIT", 10_000)
    with pytest.raises(InputError, match="stopped at 10000 of"):
        fetch.download(server.url, tmp_path / "b.gz", None)


def test_what_arrives_is_read_before_it_counts(server, tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'  # its 36 bytes are not there
    for name, content in (
        ("config.json", b'{"error": "rate limit exceeded"}'),
        ("tokenizer.json", b'{"error": "rate limit exceeded"}'),
        ("model.safetensors", len(header).to_bytes(8, "little") + header),
        ("ml-100k.zip", b"<html>please log in</html>"),
        ("meta_Beauty.json.gz", gzip.compress(os.urandom(1000))[:-10]),
    ):
        server.content = content
        with pytest.raises(InputError, match=f"not the published {name}"):
            fetch.download(server.url, tmp_path / name, None)
        assert not (tmp_path / name).exists()
    with pytest.raises(InputError, match="sha256"):
        fetch.download(server.url, tmp_path / "a", "0" * 64)


def test_bombs(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "LIMIT", 1000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(1001)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("ml-100k/u.data", bytes(1001))
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="unpacks to more than 1,000 bytes"):
            fetch.inspect(path, path.name)


def archives(folder, ratings="2\t11\t5\t300\n1\t9\t3\t100\n2\t10\t3\t200\n1\t10\t1\t100\n10\t9\t4\t50\n"):
    """The same films and ratings as GroupLens's zip and as recbole's wheel."""
    films = "9|Godfather, The (1972)|1\n10|Misérables, Les (1995)|1\n11|Time (1995) (V)|1\n267|unknown||\n\n"
    item = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n9\tGodfather, The\t1972\tDrama\n"
    item += "10\tMisérables, Les\t1995\tDrama\n"
    item += "11\tTime (1995)\tV\tDrama\n267\tunkonwn\tunkonwn\tunknown\n"
    with zipfile.ZipFile(folder / "ml-100k.zip", "w") as z:
        z.writestr("ml-100k/u.data", ratings)
        z.writestr("ml-100k/u.item", films.encode("latin-1"))
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    with zipfile.ZipFile(folder / "recbole.whl", "w") as z:
        z.writestr("recbole/dataset_example/ml-100k/ml-100k.item", item)
        z.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", header + ratings)
    return folder / "ml-100k.zip", folder / "recbole.whl"


def offline(monkeypatch, wheel, url="http://127.0.0.1:9/"):
    """ml-100k.zip is not at url (port 9 refuses connections), and pip brings the wheel."""
    pip = lambda command, **_: shutil.copy(wheel, command[command.index("-d") + 1])  # noqa: E731
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setitem(fetch.KNOWN, "ml-100k", {"ml-100k.zip": (url, None)})
    monkeypatch.setitem(fetch.WHEELS, "ml-100k", ("a==1", hashlib.sha256(wheel.read_bytes()).hexdigest()))


def table(path):
    return gzip.open(path, "rt", encoding="utf-8", newline="").read()


def test_movielens_is_the_same_from_both_sources(monkeypatch, tmp_path):
    published, wheel = archives(tmp_path)
    (tmp_path / "a/ml-100k.raw").mkdir(parents=True)
    published.rename(tmp_path / "a/ml-100k.raw/ml-100k.zip")  # put there by hand: used as it is
    (tmp_path / "b/.ml-100k.making/ml-100k").mkdir(parents=True)  # left by a killed run
    offline(monkeypatch, wheel)
    for place in [fetch.dataset("ml-100k", tmp_path / root) for root in "ab"]:
        titles = "9\tGodfather, The (1972)\n10\tMisérables, Les (1995)\n11\tTime (1995) (V)\n267\tunknown\n"
        assert table(place / "items.tsv.gz") == "item_id\ttitle\n" + titles
        # user 1 rated 9 and 10 in one second: the file's order stays, text order of the ids would turn it round
        sequences = "user_id\titem_ids\ttimestamp\n1\t9 10\t100 100\n2\t10 11\t200 300\n10\t9\t50\n"
        assert table(place / "sequences.tsv.gz") == sequences
    source = json.loads((tmp_path / "b/ml-100k/source.json").read_text())
    assert "wheel a==1" in source["from"][0] and source["sha256"] == {"recbole.whl": fetch.WHEELS["ml-100k"][1]}
    assert sorted(os.listdir(tmp_path / "b")) == [".ml-100k.lock", "ml-100k"]


def test_no_wheel_takes_the_place_of_a_broken_download(server, monkeypatch, tmp_path):
    wheel = archives(tmp_path)[1]
    offline(monkeypatch, wheel, server.url + "s")
    with pytest.raises(InputError, match="answered 404"):
        fetch.dataset("ml-100k", tmp_path)
    offline(monkeypatch, wheel)
    (tmp_path / "ml-100k.raw/other.part").write_text("came from there")
    with pytest.raises(InputError, match="put ml-100k.zip into .*ml-100k.raw by hand"):
        fetch.dataset("ml-100k", tmp_path)


def test_two_fetches_at_once_download_once(server, monkeypatch, tmp_path):
    server.content, server.pause, server.etag = archives(tmp_path)[0].read_bytes(), 0.2, ""
    monkeypatch.setitem(fetch.KNOWN, "ml-100k", {"ml-100k.zip": (server.url, None)})
    runs = [threading.Thread(target=fetch.dataset, args=("ml-100k", tmp_path)) for _ in range(2)]
    for act in (threading.Thread.start, threading.Thread.join):
        for run in runs:
            act(run)
    assert len(server.ranges) == 1 and (tmp_path / "ml-100k/source.json").exists()


def test_the_command_line_says_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "extras.fetch", "beauty", "--root", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and done.stderr.startswith("error: cannot make") and done.stderr.count("\n") == 1


REVIEWS = ["U2 B9 200", "U1 B9 100", "U2 A1 200", "U2 C3 100", "U2 B9 200", "U1 D4 300"]
META = r"""{'asin': 'B9', 'title': "Dr. Scholl's &quot;Quick&quot; Heat &amp; Bath", 'price': 3.5}
{'asin': 'ZZ', 'title': not read because nobody wants it
{'asin': 'A1', 'description': 'no title', 'related': {'also_viewed': ['B9']}}
{'title': '  5\" Cr\xe8me\tBrûlée ★\n ', 'asin': 'C3'}
""".encode()


def amazon_files(folder, reviews=REVIEWS, meta=META):
    rows = [f'{{"reviewerID": "{u}", "asin": "{a}", "unixReviewTime": {t}}}\n' for u, a, t in map(str.split, reviews)]
    folder.mkdir(exist_ok=True)
    (folder / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress("".join(rows).encode()))
    (folder / "meta_Beauty.json.gz").write_bytes(gzip.compress(meta))
    return folder / "reviews_Beauty_5.json.gz", folder / "meta_Beauty.json.gz"


def test_amazon(tmp_path):
    amazon_files(tmp_path / "beauty.raw")
    place = fetch.dataset("beauty", tmp_path)
    # numbered by first appearance: B9, A1, C3, D4; A1 has no title and D4 no entry
    items = 'item_id\ttitle\n1\tDr. Scholl\'s "Quick" Heat & Bath\n2\t\n3\t5" Crème Brûlée ★\n4\t\n'
    assert table(place / "items.tsv.gz") == items
    # user 1 is U2: C3 first, then A1 before B9 (one day, ASIN order), B9 once
    sequences = "user_id\titem_ids\ttimestamp\n1\t3 2 1\t100 200 200\n2\t1 4\t100 300\n"
    assert table(place / "sequences.tsv.gz") == sequences


def test_a_bad_line_is_named(tmp_path):
    for when in ("null", "1e400", "NaN", "9" * 300, "9" * 5000, "-1"):
        with pytest.raises(InputError, match=r"reviews_Beauty_5\.json\.gz, line 7"):
            fetch.write_dataset(amazon_files(tmp_path, [*REVIEWS, f"U1 B9 {when}"]), tmp_path / "x")
    for line in (
        b"{'asin': 'B9', 'title': 'open",
        b"['asin']",
        b"{'asin': 'B9', 'x': " + b"[" * 9999,
        b"['asin': 'B9']",
    ):
        with pytest.raises(InputError, match=r"meta_Beauty\.json\.gz, line 5"):
            fetch.write_dataset(amazon_files(tmp_path, meta=META + line), tmp_path / "x")
    for line in ("1\t1\t1", "1\t1\t1\t" + "9" * 22, "1\t1 2\t1\t5"):
        with pytest.raises(InputError, match=r"u\.data, line 2"):
            fetch.write_dataset(archives(tmp_path, "1\t9\t1\t5\n" + line)[:1], tmp_path / "x")
