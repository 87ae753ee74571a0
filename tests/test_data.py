import hashlib
import http.server
import json
import os
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from conftest import ROOT, script

import data
from data import make_tokenizer, prepare, tokens_of, write_shards
from parts import bpe as training
from parts import loader as loading
from parts import sources
from parts import tokenizer as tokenizing
from parts.bpe import train_bpe
from parts.comparable import texts_differ
from parts.errors import UserError
from parts.loader import Loader, open_shard
from parts.sources import read_text
from parts.tokenizer import load_tokenizer, save_tokenizer
from runs import p_hop

TEXTS = ["", "a", "def f(x):\n        return x + 1  # comment\n",
         "naïve café, 你好世界, здравствуй, שלום, ไทย",
         "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\u2028", "\x00\x01\r\n\t\v\f   \n\n\n     x",
         "<|endoftext|>", " " * 1000, "1234567890.5e-10"]


@pytest.fixture(scope="module")
def corpus():
    return [(ROOT / name).read_text() for name in ("model.py", "data.py", "train.py")]


@pytest.fixture(scope="module")
def bpe(corpus):
    return make_tokenizer("bpe:600", corpus)

# ------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_tokenizers_round_trip(name, bpe, tmp_path):
    tokenizer = bpe if name == "bpe" else make_tokenizer("bytes")
    assert tokenizer.n_vocab == (600 if name == "bpe" else 257)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path)
    characters = [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F300, 0x1FAFF)]
    for text in [*TEXTS, "".join(map(chr, characters))]:
        tokens = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(tokens) == text
        assert loaded.encode_ordinary(text) == tokens
    assert loaded.eot_token == tokenizer.n_vocab - 1


def test_bpe_merges_the_most_frequent_pair_every_time(corpus):
    """Against the definition: count all pairs anew for every merge."""
    ranks = train_bpe(corpus, 330)
    counts = Counter(w for doc in corpus for w in regex.findall(training.WORDS, doc))
    words = {w: [bytes([b]) for b in w.encode()] for w in counts}
    for token in list(ranks)[256:]:
        pairs = Counter()
        for w, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[w]
        best = max(pairs.values())
        pair = next(p for p, n in pairs.items() if p[0] + p[1] == token and n == best)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i:i + 2] = [token]
                i += 1


def test_every_part_of_a_long_word_is_counted(monkeypatch):
    monkeypatch.setattr(training, "LONGEST_WORD", 3)
    assert training.count_words(["abcdefgh abc"]) == {"abc": 1, "def": 1, "gh": 1, " ab": 1,
                                                        "c": 1}


def test_bpe_compresses_and_stops_when_nothing_is_left(corpus, bpe):
    assert len(bpe.encode_ordinary(corpus[0])) < 0.5 * len(corpus[0])
    assert len(train_bpe(["ab ab"], 1000)) == 258  # "ab" and " ab", then every word is one token


@pytest.mark.parametrize("name", ["bpe", "bpe:256", "bpe:x", "words", "bpe:70000"])
def test_unknown_tokenizers_are_refused(name):
    with pytest.raises(UserError, match="must be bytes, gpt2, bpe:N"):
        make_tokenizer(name)


def test_names_come_before_folders_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"tiktoken's {name}")
    saved = make_tokenizer("bpe:258", ["ab ab"])
    for name in ("bytes", "gpt2", "bpe:300", "bpe:5", "mine"):
        (tmp_path / name).mkdir()
        save_tokenizer(saved, tmp_path / name / "tokenizer.json")
    assert make_tokenizer("bytes").n_vocab == 257
    assert make_tokenizer("gpt2") == "tiktoken's gpt2"
    assert make_tokenizer("bpe:300", ["abcdefgh"] * 9).n_vocab == 264
    for folder in ("./bytes", "./gpt2", "./bpe:300", "bpe:5", "mine", tmp_path / "mine"):
        assert make_tokenizer(str(folder)).n_vocab == 258
    (tmp_path / "mine" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="mine/tokenizer.json does not exist"):
        make_tokenizer("mine")


def test_the_format_of_others_is_told_what_to_do_with(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(UserError, match="python -m tools.published tokenizer .* --out DIR"):
        load_tokenizer(tmp_path)


def test_streamed_text_is_the_decoded_text(bpe):
    text = "".join(TEXTS)
    assert "".join(tokenizing.decode_stream(bpe, [*bpe.encode_ordinary(text), 9999])) == text

# ------------------------------------------------------------------ sources and shards


def test_text_files_become_shards(tmp_path, bpe):
    files = [ROOT / "model.py", ROOT / "data.py"]
    out = prepare("text", tmp_path / "d", "bytes", files)
    train, val = (open_shard(out / f"{split}_000000.bin") for split in ("train", "val"))
    raw = np.fromfile(out / "train_000000.bin", dtype=np.int32, count=256)
    assert list(raw[:3]) == [20240520, 1, len(train)] and not raw[3:].any()
    eot = load_tokenizer(out).eot_token
    for i, file in enumerate(files):
        documents = []
        for shard in (train, val):
            document = np.split(shard, np.flatnonzero(shard == eot))[i + 1]
            documents.append(bytes(document[1:].tolist()))
        assert b"".join(documents) == file.read_bytes()
        assert len(documents[1]) == pytest.approx(0.1 * len(file.read_bytes()), rel=0.1)


def test_stdlib_is_split_by_file_and_repeats():
    train, val = sources.stdlib_docs()
    assert (train, val) == sources.stdlib_docs()
    assert not set(filter(None, train)) & {text for text in val if len(text) > 200}
    assert 0.02 < sum(map(len, val)) / sum(map(len, train)) < 0.1
    assert sum(map(len, train)) > 5e6


def test_p_hop_answers_follow_the_definition():
    docs, others = p_hop.p_hop_docs(n_train=200, n_val=10)
    assert len(docs) == 200 and len(others) == 10 and not set(docs) & set(others)
    asked = Counter()
    for doc in docs:
        hops, string, answers = doc[0::3], doc[1::3], doc[2::3]
        assert len(string) == 64 and all(a != b for a, b in zip(string, string[1:]))
        for i, (p, answer) in enumerate(zip(hops, answers)):
            for _ in range(int(p)):
                i = string.rindex(string[i], 0, i) + 1
            assert answer == string[i].upper()
        asked.update(hops)
    assert sorted(asked) == list("012345678") and min(asked.values()) > 500
    assert p_hop.p_hop_docs(n_train=200, n_val=10) == (docs, others)


def test_a_source_of_ones_own_is_one_function_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "mine", lambda: (["this is b ", "this is c "], ["a"]))
    out = prepare("mine", tmp_path / "d")
    train = open_shard(out / "train_000000.bin").tolist()
    assert train == [256, *b"this is b ", 256, *b"this is c "]


@pytest.fixture
def folder(tmp_path):
    """Texts in folders, and beside them what is not to be read."""
    folder = tmp_path / "mine"
    for i in range(40):
        file = folder / f"f{i % 3}" / f"{i}.{('txt', 'md', 'PY')[i % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"this is {i} ")
    for name in (".git/a.txt", "f0/.hidden.txt", "f0/a.bin", "f0/empty.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x" if "empty" not in name else "")
    return folder


def test_a_folder_is_its_files_in_one_order(folder):
    train, val = sources.text_docs([folder])
    texts = {path.read_text(): path.relative_to(folder).as_posix()
             for path in folder.rglob("f*/[0-9]*") if path.read_text()}
    assert sorted(filter(None, train + val)) == sorted(texts) and len(texts) == 40
    assert 1 <= len(val) <= 6  # whole files, every 20th or so
    (folder / "f1" / "4.md").rename(folder / "x")  # another order on the disk
    (folder / "x").rename(folder / "f1" / "4.md")
    assert sources.text_docs([str(folder)]) == (train, val)
    paths = [texts[doc] for doc in train if doc]
    assert paths == sorted(paths)
    (folder.parent / "beside.md").write_text((folder / "f1" / "4.md").read_text())
    more = sources.text_docs([folder.parent / "beside.md", folder])  # a file beside a folder
    assert [len(docs) for docs in more] == [len(train) + 1, len(val) + 1]


def test_a_folder_of_few_files_is_cut_as_files_are(tmp_path):
    for name, text in (("a.txt", "a" * 100), ("b.txt", "b" * 50), ("c.txt", "c")):
        (tmp_path / name).write_text(text)
    train, val = sources.text_docs([tmp_path])
    assert train == ["a" * 90, "b" * 45]
    assert val == ["a" * 10, "b" * 5]


def test_files_of_a_folder_that_are_not_utf8_are_counted_and_said(folder, capsys):
    for i in range(5):
        (folder / f"latin{i}.txt").write_bytes("café".encode("latin-1"))
    train, val = sources.text_docs([folder])
    assert capsys.readouterr().out == (
        f"{folder}: 5 of 46 files are not UTF-8 text and are left out: latin0.txt, latin1.txt, "
        "latin2.txt, ...\n")
    assert sum(map(len, train + val)) == sum(len(f"this is {i} ") for i in range(40))


@pytest.mark.parametrize("docs, said", [
    (([], []), "no text to train on"), (([], ["abc"]), "no text to train on"),
    ((["abc"], []), "no text to validate"), ((["abc"], [""]), "no text to validate")])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_data_without_text_replaces_nothing(tmp_path, monkeypatch, docs, said, tokenizer):
    out = prepare("text", tmp_path / "d", "bytes", [ROOT / "data.py"])
    before = tree(tmp_path)
    monkeypatch.setitem(sources.SOURCES, "mine", lambda: docs)
    with pytest.raises(UserError, match=f"SOURCE mine gives {said}: it is too short"):
        prepare("mine", out, tokenizer)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["", "a"])
def test_what_is_too_short_is_named(tmp_path, content):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "short.txt").write_text(content)
    for path, said in ((tmp_path / "d", "d has no text: none of its 1 files of the kinds .txt"),
                       (tmp_path / "d" / "short.txt", "short.txt is too short")):
        with pytest.raises(UserError, match=said):
            prepare("text", tmp_path / "out", files=[path])
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_large_texts_are_split_over_shards(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(data, "SHARD_TOKENS", 20_000)
    tokenizer = make_tokenizer("bytes")
    n = write_shards(tmp_path, "train", tokens_of(corpus, tokenizer, ""), tokenizer.n_vocab)
    shards = [open_shard(p) for p in sorted(tmp_path.glob("train_*.bin"))]
    assert sum(map(len, shards)) == n and len(shards) == -(-n // 20_000)
    expected = b"\0".join([b"", *(doc.encode() for doc in corpus)])
    tokens = np.concatenate(shards)
    assert bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8)) == expected


def test_failure_leaves_nothing_behind(tmp_path):
    bad = tmp_path / "latin.txt"
    bad.write_bytes("café".encode("latin-1") * 10)
    for files, error, message in (
            ([bad], UserError, "latin.txt is not UTF-8.*byte 3"),
            ([tmp_path / "none.txt"], FileNotFoundError, "No such file.*none.txt")):
        with pytest.raises(error, match=message):
            prepare("text", tmp_path / "out", "bytes", files)
    assert [p.name for p in tmp_path.iterdir()] == ["latin.txt"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "t.txt").write_bytes(mark + b"hello " + mark + b"world, this is a text")
    out = prepare("text", tmp_path / "out", "bytes", [tmp_path / "t.txt"])
    tokens = [*open_shard(out / "train_000000.bin"), *open_shard(out / "val_000000.bin")[1:]]
    assert tokens == [256, *b"hello ", *mark, *b"world, this is a text"]  # only at the start
    (tmp_path / "t.txt").write_bytes(mark + b"hello\xff")
    with pytest.raises(UserError, match="byte 8$"):
        read_text(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_bytes("hello".encode("utf-16"))  # another mark
    with pytest.raises(UserError, match="is not UTF-8 text: .* at byte 0$"):
        read_text(tmp_path / "t.txt")

# ------------------------------------------------------------------ loader


@pytest.fixture
def numbers(tmp_path):
    """Two train shards that count upwards: a window shows where it was cut."""
    for i, (start, stop) in enumerate(((0, 1000), (1000, 1637))):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, stop - start
        numbers = np.arange(start, stop, dtype=np.uint16)
        path = tmp_path / f"train_{i:06d}.bin"
        path.write_bytes(header.tobytes() + numbers.tobytes())
    return tmp_path


def test_an_epoch_is_every_window_once_in_random_order(numbers):
    loader = Loader(numbers, "train", 10, 2000, seed=3)
    idx, targets = loader.batch(range(len(loader)))
    assert ((targets - idx) == 1).all()  # the next token, within one shard
    assert len(idx.flatten().unique()) == idx.numel() > 0.97 * 1637
    assert (idx[1:, 0] < idx[:-1, 0]).any()
    again, _ = loader.batch(range(len(loader), 2 * len(loader)))
    assert not (again[:, 0].sort().values == idx[:, 0].sort().values).all()  # cut elsewhere


def test_samples_are_a_function_of_seed_and_number(numbers):
    a, b = (Loader(numbers, "train", 10, 2000, seed=3) for _ in range(2))
    whole = a.batch(range(400))[0]
    assert (b.batch(range(300, 400))[0] == whole[300:]).all()  # resumed
    assert (b.batch(range(1, 400, 2))[0] == whole[1::2]).all()  # the second of two ranks
    assert (Loader(numbers, "train", 10, 2000, seed=4).batch(range(400))[0] != whole).any()


def test_the_order_of_an_epoch_is_drawn_once(numbers, monkeypatch):
    """Batches ask in order of depth: across the border of two epochs, back and forth."""
    loader, drawn, rng = Loader(numbers, "train", 10, 2000, seed=7), [], np.random.default_rng
    n, right = len(loader), Loader(numbers, "train", 10, 2000, seed=7)
    single = {i: right.batch([i])[0][0] for i in range(10 * n)}
    loading.epoch_order.cache_clear()
    monkeypatch.setattr(np.random, "default_rng", lambda s: drawn.append(s[1]) or rng(s))
    shuffled = rng(0).permutation(np.arange(n - 32, n + 32))
    for part in np.split(shuffled, 4):  # micro-batches of one step
        assert (loader.batch(part)[0] == torch.stack([single[i] for i in part.tolist()])).all()
    assert drawn == [0, 1]
    every = rng(1).permutation(10 * n)  # of a text shorter than the batch
    assert (loader.batch(every)[0] == torch.stack([single[i] for i in every.tolist()])).all()
    assert sorted(drawn) == [0, 1, *range(2, 10)]


def test_bad_shards_are_refused(numbers, monkeypatch):
    said = "train_000001.bin has token 1.* must be below 1000, the number of tokens"
    with pytest.raises(UserError, match=said):
        Loader(numbers, "train", 10, 1000)
    monkeypatch.setattr(loading, "SHARD_TOKENS", 1000)  # large data: as it comes
    with pytest.raises(UserError, match=said):
        Loader(numbers, "train", 10, 1000).batch(range(150))
    with pytest.raises(UserError, match="no val_"):
        Loader(numbers, "val", 10, 2000)
    with pytest.raises(UserError, match="of more than 2048 tokens"):
        Loader(numbers, "train", 2048, 2000)
    path = numbers / "train_000000.bin"
    good = path.read_bytes()
    for content, message in ((good[:-10], "is damaged"),
                             (b"x" * 2000, "magic number is 2021161080"),
                             (b"", "magic number is missing"),
                             (good[:4] + b"\x02" + good[5:], "version 2, must be 1")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Loader(numbers, "train", 10, 2000)

# ------------------------------------------------------------------ downloads


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local server that answers as the Hugging Face hub does; .site: its files, .cut: bytes
    after which it hangs up, once."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    site = tmp_path / "site"
    site.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        cut, requests = None, []

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            file = site / Path(self.path).name
            if not file.exists():
                return self.send_error(404, "Entry not found")
            content, start = file.read_bytes(), 0
            if self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                Handler.requests.append((file.name, start))
                cut, Handler.cut = Handler.cut, None
                self.wfile.write(content[start:cut])

        def log_message(self, *args):
            pass

    Handler.site = site
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    fetch = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments, **options: fetch(
        *arguments, **options, endpoint=f"http://127.0.0.1:{httpd.server_port}"))
    yield Handler
    httpd.shutdown()


def test_fineweb_edu_shards(hub, tmp_path, numbers):
    for i, name in enumerate(("finewebedu_val_000000.bin", "finewebedu_train_000001.bin")):
        (hub.site / name).write_bytes((numbers / f"train_{i:06d}.bin").read_bytes())
    (hub.site / "finewebedu_train_000002.bin").write_bytes(b"not a shard" * 200)
    out = tmp_path / "fw"
    with pytest.raises(UserError, match="not a token shard"):
        prepare("fineweb-edu", out, shards=2)
    assert sorted(p.name for p in out.iterdir()) == ["train_000000.bin", "val_000000.bin"]
    hub.requests.clear()
    prepare("fineweb-edu", out, shards=1)
    assert hub.requests == []  # what is there is not fetched again
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "fw"))) == ["fw"]
    saved = json.loads((out / "tokenizer.json").read_text())
    assert saved["name"] == "gpt2" and saved["text"]["source"].endswith(", 1 train shards")
    prepare("fineweb-edu", out, shards=1)
    assert len(Loader(out, "train", 10, 50257)) > 0
    (hub.site / "finewebedu_train_000002.bin").unlink()
    with pytest.raises(UserError, match="not fetched from the Hugging Face hub"):
        prepare("fineweb-edu", out, shards=2)


def test_no_file_is_read_twice(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"text number {i}")
    for files in (["notes", "notes/1.txt"], ["notes/1.txt"] * 2):
        with pytest.raises(UserError, match="1.txt is there twice"):
            sources.text_docs([tmp_path / file for file in files])
    (folder / "link.txt").symlink_to(folder / "0.txt")
    with pytest.raises(UserError, match="is there twice"):
        sources.text_docs([folder])


def test_an_interrupted_download_is_not_taken_for_whole(hub, tmp_path):
    with open(hub.site / "finewebedu_val_000000.bin", "wb") as file:
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, 2 ** 20
        file.write(header.tobytes() + np.arange(2 ** 20, dtype=np.uint16).tobytes())
    hub.cut = 1_000_000
    with pytest.raises(UserError, match="not fetched"):  # the next file is not there
        prepare("fineweb-edu", tmp_path / "fw", shards=1)
    assert open_shard(tmp_path / "fw" / "val_000000.bin")[-1] == 65535
    assert [name for name, _ in hub.requests] == ["finewebedu_val_000000.bin"] * 2


def test_fineweb_edu_does_not_take_other_shards_for_its_own(tmp_path):
    out = prepare("text", tmp_path / "d", "bytes", [ROOT / "model.py"])
    saved = {"name": "gpt2", "text": {"source": "text"}}
    (out / "tokenizer.json").write_text(json.dumps(saved))
    before = tree(out)
    with pytest.raises(UserError, match="holds other data"):
        prepare("fineweb-edu", out)
    assert tree(out) == before


def test_fineweb_edu_does_not_go_among_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds thesis.txt"):
        prepare("fineweb-edu", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

# ------------------------------------------------------------------ command line


@pytest.mark.parametrize("arguments, message", [
    (["text"], "SOURCE text needs files"), (["stdlib", "x.txt"], "takes no files, got x.txt"),
    (["fineweb-edu", "--tokenizer", "bytes"], "--tokenizer is bytes, must be gpt2"),
    (["stdlib", "--shards", "2"], "--shards is for SOURCE fineweb-edu"),
    (["fineweb-edu", "x.txt"], "takes no files, got x.txt"), (["moon"], "SOURCE is 'moon', must"),
    (["fineweb-edu", "--shards", "0"], "--shards is 0, must be at least 1 and at most 99"),
    (["text", "none.txt"], "none.txt: No such file"),
    (["text", "model.py", "--tokenizer", "bpe:9"], "tokenizer is 'bpe:9'")])
def test_mistakes_get_one_line(arguments, message, tmp_path):
    run = script("data.py", *arguments, "--out", tmp_path / "d", cwd=ROOT)
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

# ------------------------------------------------------------------ what must not be lost


def tree(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def foreign_directories(folder):
    """Directories that data.py must leave alone, each with something of the user's."""
    for name, file, content in (("thesis", "thesis.tex", b"x"), ("nested", "a/b.txt", b"x"),
                                ("shard-like", "train_000000.bin", b"my own numbers"),
                                ("their tokenizer", "tokenizer.json", b'{"model": {}}'),
                                ("hidden", ".notes", b"x"),
                                ("input", "notes.txt", b"abc " * 100)):
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_bytes(content)
        yield folder / name
    yield folder  # a parent


def test_a_directory_of_the_users_is_never_replaced(tmp_path):
    (tmp_path / "t.txt").write_text("hello " * 100)
    for folder in list(foreign_directories(tmp_path / "d")):
        before = tree(tmp_path)
        done = script("data.py", "text", tmp_path / "t.txt", "--out", folder)
        assert done.returncode == 2 and "which data.py did not make" in done.stderr
        assert done.stderr.count("\n") == 1
        assert tree(tmp_path) == before


@pytest.mark.parametrize("out, said", [
    ("", "--out is empty"), (".", "is the current directory"), ("t.txt", "is not a directory"),
    ("t.txt/x", "t.txt: File exists"), ("/proc/x", "/proc"), ("loop", "Too many levels"),
    ("x" * 300, "too long")])
def test_places_that_cannot_be_written_get_one_line(tmp_path, out, said):
    (tmp_path / "t.txt").write_text("hello " * 100)
    (tmp_path / "loop").symlink_to("loop")
    here = tmp_path
    if out == ".":
        here = tmp_path / "e"
        here.mkdir()
    before = set(tmp_path.iterdir())
    done = script("data.py", "text", "--out", out, tmp_path / "t.txt", cwd=here)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_data_is_replaced_by_data_also_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "d").symlink_to(tmp_path / "disk")
    (tmp_path / "d.tmp").mkdir()  # of somebody else
    for tokenizer in ("bytes", "bpe:300"):
        prepare("text", tmp_path / "d", tokenizer, [ROOT / "data.py"])
        assert load_tokenizer(tmp_path / "d").name == tokenizer
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "d.tmp", "disk"]
    assert (tmp_path / "d").is_symlink()


def test_an_interruption_at_any_rename_leaves_one_of_the_two_whole(tmp_path, monkeypatch):
    out, rename = prepare("text", tmp_path / "d", "bytes", [ROOT / "data.py"]), os.rename
    before = tree(out)
    for fatal in (1, 2):
        countdown = iter([None] * (fatal - 1))

        def interrupted(a, b, countdown=countdown):
            if next(countdown, "now") == "now":
                monkeypatch.setattr(os, "rename", rename)
                raise KeyboardInterrupt
            rename(a, b)
        monkeypatch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("text", out, "bpe:300", [ROOT / "model.py"])
        assert tree(out) == before and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_two_preparations_at_once_both_end_well(tmp_path):
    done = []

    def make(tokenizer):
        done.append(prepare("text", tmp_path / "d", tokenizer, [ROOT / "data.py"]))
    threads = [threading.Thread(target=make, args=[name]) for name in ["bytes", "bpe:280"] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8 and [p.name for p in tmp_path.iterdir()] == ["d"]
    assert load_tokenizer(tmp_path / "d").name in ("bytes", "bpe:280")
    assert len(Loader(tmp_path / "d", "train", 32, 300)) > 0


def test_ids_above_65535_are_kept(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b" T": 70_000}
    tokenizer = tiktoken.Encoding("large", pat_str=training.WORDS, mergeable_ranks=ranks,
                                  special_tokens={tokenizing.EOT: 128_000})
    write_shards(tmp_path, "train", tokens_of([" T T"], tokenizer, ""), tokenizer.n_vocab)
    assert open_shard(tmp_path / "train_000000.bin").tolist() == [128_000, 70_000, 70_000]
    header = np.fromfile(tmp_path / "train_000000.bin", dtype=np.int32, count=3)
    assert list(header) == [20240801, 7, 3]
    write_shards(tmp_path, "val", [np.array([65_535])], 65_536)
    assert open_shard(tmp_path / "val_000000.bin").dtype == np.uint16


def test_a_shard_of_more_than_2_to_the_30_tokens_opens(tmp_path):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, 1_100_000_000
    with open(tmp_path / "s.bin", "wb") as file:
        file.write(header.tobytes())
        file.truncate(1024 + 2 * 1_100_000_000)  # sparse
    assert len(open_shard(tmp_path / "s.bin")) == 1_100_000_000


def test_pieces_have_the_tokens_of_the_whole(corpus, bpe, monkeypatch):
    text = "\n".join([*corpus, *TEXTS])
    whole = bpe.encode_ordinary(text)
    monkeypatch.setattr(tokenizing, "PIECE", 2000)
    assert np.concatenate(list(tokenizing.encode(bpe, text))).tolist() == whole
    seen = []
    list(tokenizing.encode(bpe, text, types.SimpleNamespace(update=seen.append)))
    assert sum(seen) == len(text)  # a bar counts characters
    assert max(map(len, tokenizing.pieces(text))) <= 2000
    assert "".join(tokenizing.pieces(text)) == text


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "\n" * 1_200_000 + "x",
                                  "-" * 1_200_000, "abcdefgh" * 150_000])
def test_long_runs_and_words_take_seconds(text, bpe):
    start = time.perf_counter()
    assert bpe.decode(np.concatenate(list(tokenizing.encode(bpe, text))).tolist()) == text
    assert len(train_bpe([text, "hello world\n" * 2000], 280)) > 256
    assert time.perf_counter() - start < 20


def test_data_tells_of_what_text_it_was_made(tmp_path):
    for name, file in (("a", "data.py"), ("b", "data.py"), ("c", "model.py")):
        prepare("text", tmp_path / name, "bytes", [ROOT / file])
    saved = [json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in "abc"]
    a, b, c = (tokenizer["text"] for tokenizer in saved)
    assert a == b and a["sha256"] != c["sha256"]
    shards = [open_shard(tmp_path / "a" / f"{split}_000000.bin") for split in ("train", "val")]
    tokens = np.concatenate(shards)
    assert a["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest() and a["files"] == 2


def test_what_is_said_of_data_is_of_the_text_that_is_trained_on(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\u00e9" * 1000)
    prepare("text", tmp_path / "d", "bytes", [tmp_path / "t.txt"])
    said = capsys.readouterr().out
    assert "1,801 train and 201 val tokens" in said and "0.50 characters each" in said


def test_a_tokenizer_alone_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "mine" / "tokenizer.json")
    (tmp_path / "text").write_text("some text " * 40)
    done = script("data.py", "text", tmp_path / "text", "--out", tmp_path / "mine")
    assert done.returncode == 2 and "holds only a tokenizer" in done.stderr


@pytest.mark.parametrize("text, other, differ", [
    ({"source": "text", "sha256": "a"}, {"source": "text", "sha256": "b"}, True),
    # the same tokens, made by another Python from a file of another name
    ({"source": "text", "python": "3.11", "sha256": "a"}, {"source": "x", "sha256": "a"}, False),
    ({"source": "kjj0/x"}, {"source": "kjj0/x"}, False),
    ({"source": "kjj0/x"}, {"source": "text", "sha256": "a"}, True),
    (None, {"source": "text", "sha256": "a"}, False), ({"sha256": "a"}, None, False),
    ("a", {"sha256": "b"}, False)])
def test_texts_differ_where_that_is_known(text, other, differ):
    assert texts_differ(text, other) == texts_differ(other, text) == differ
