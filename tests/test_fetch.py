"""extras/fetch.py against a server on this machine: downloads, what arrives damaged, raw formats."""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import threading
import zipfile
from types import SimpleNamespace

import pytest
from test_prepare import table
from test_train import write_base, write_data

from extras import fetch
from hatllm import InputError


class Host(http.server.BaseHTTPRequestHandler):
    """Promises 1,000 bytes, and sends half of them at /half; at /other it speaks no HTTP."""

    def do_GET(self):
        if self.path == "/none":
            return self.send_error(404)
        if self.path == "/other":
            return self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(500 if self.path == "/half" else 1000))

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_a_broken_download_is_a_sentence(host, tmp_path):
    """And never a wheel in its place, which stands for a host that gives no answer (ConnectionError)."""
    fetch.download(f"{host}/whole", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == bytes(1000)
    for name, words in (("half", "broke off"), ("none", "answered 404")):
        with pytest.raises(InputError, match=words):
            fetch.download(f"{host}/{name}", tmp_path / "b")
    for url in ("http://127.0.0.1:9/", f"{host}/other"):  # port 9 refuses connections
        with pytest.raises(ConnectionError):
            fetch.download(url, tmp_path / "c")


@pytest.mark.parametrize("name, content, words", [
    ("config.json", b'{"error": "rate limit exceeded"}', "config.json: hidden_size"),
    ("tokenizer.json", b"<html>please log in</html>", "tokenizer.json: not a tokenizer"),
    ("model.safetensors", b"0" * 99, "model.safetensors: damaged")])  # fmt: skip
def test_what_arrives_is_read_before_it_counts(tmp_path, name, content, words):
    base = write_base(tmp_path / "smollm2-135m.raw", write_data(tmp_path / "shop"))
    (base / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        fetch.fetch("smollm2-135m", tmp_path)
    assert not (tmp_path / "smollm2-135m").exists()


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


def offline(monkeypatch, wheel):
    """The host of ml-100k.zip does not answer, and pip brings the wheel."""

    def pip(command):
        shutil.copy(wheel, command[command.index("-d") + 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setitem(fetch.KNOWN, "ml-100k", ["http://127.0.0.1:9/ml-100k.zip"])
    monkeypatch.setitem(fetch.WHEELS, "ml-100k", ("a==1", hashlib.sha256(wheel.read_bytes()).hexdigest()))


def test_movielens_is_the_same_from_both_sources(monkeypatch, tmp_path):
    published, wheel = archives(tmp_path)
    (tmp_path / "a/ml-100k.raw").mkdir(parents=True)
    published.rename(tmp_path / "a/ml-100k.raw/ml-100k.zip")  # put there by hand: used as it is
    offline(monkeypatch, wheel)
    monkeypatch.setattr(fetch, "SHA256", {})
    for place in [fetch.fetch("ml-100k", tmp_path / root) for root in "ab"]:
        titles = "9\tGodfather, The (1972)\n10\tMisérables, Les (1995)\n11\tTime (1995) (V)\n267\tunknown\n"
        assert table(place / "items.tsv.gz") == "item_id\ttitle\n" + titles
        # user 1 rated 9 and 10 in one second: the file's order stays, text order of the ids would turn it round
        sequences = "user_id\titem_ids\ttimes\n1\t9 10\t100 100\n2\t10 11\t200 300\n10\t9\t50\n"
        assert table(place / "sequences.tsv.gz") == sequences
    source = json.loads((tmp_path / "b/ml-100k/source.json").read_text())
    assert "wheel a==1" in source["from"][0] and source["sha256"] == {"recbole.whl": fetch.WHEELS["ml-100k"][1]}
    assert sorted(os.listdir(tmp_path / "b")) == [".ml-100k.lock", "ml-100k"]


def test_what_must_not_be_used(monkeypatch, tmp_path):
    """A wheel or a zip of another sha256; a wheel beside published files, of which others would be missing."""
    zip_, wheel = archives(tmp_path)
    offline(monkeypatch, wheel)
    monkeypatch.setitem(fetch.WHEELS, "ml-100k", ("a==1", "0" * 64))
    with pytest.raises(InputError, match="recbole.whl is not the published one"):
        fetch.fetch("ml-100k", tmp_path)
    (tmp_path / "ml-100k.raw").mkdir()
    zip_.rename(tmp_path / "ml-100k.raw/ml-100k.zip")
    with pytest.raises(InputError, match="ml-100k.zip is not the published one"):
        fetch.fetch("ml-100k", tmp_path)
    monkeypatch.setattr(fetch, "SHA256", {})
    monkeypatch.setitem(fetch.KNOWN, "ml-100k", ["http://127.0.0.1:9/ml-100k.zip", "http://127.0.0.1:9/b"])
    with pytest.raises(InputError, match="put ml-100k.zip, b into .*ml-100k.raw by hand"):
        fetch.fetch("ml-100k", tmp_path)
    assert not (tmp_path / "ml-100k").exists()


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
    place = fetch.fetch("beauty", tmp_path)
    # numbered by first appearance: B9, A1, C3, D4; A1 has no title and D4 no entry
    items = 'item_id\ttitle\n1\tDr. Scholl\'s "Quick" Heat & Bath\n2\t\n3\t5" Crème Brûlée ★\n4\t\n'
    assert table(place / "items.tsv.gz") == items
    # user 1 is U2: C3 first, then A1 before B9 (one day, ASIN order), B9 once
    sequences = "user_id\titem_ids\ttimes\n1\t3 2 1\t100 200 200\n2\t1 4\t100 300\n"
    assert table(place / "sequences.tsv.gz") == sequences


def test_published_files_lose_no_interaction(tmp_path):
    """Such a file is damaged: a data set without its lines would be another one under the same name."""
    amazon_files(tmp_path / "beauty.raw", [*REVIEWS, "U1 B9 null"])
    with pytest.raises(InputError, match=r"reviews_Beauty_5\.json\.gz, line 7"):
        fetch.fetch("beauty", tmp_path)
    (tmp_path / "beauty").mkdir()
    with pytest.raises(InputError, match="beauty is there without source.json"):
        fetch.fetch("beauty", tmp_path)
