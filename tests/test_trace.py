import json
import sys
from html.parser import HTMLParser

import pytest
import torch
from conftest import save_run, script

from data import make_tokenizer
from model import Parcae
from parts.tokenizer import save_tokenizer
from tools.trace import write_page


@pytest.fixture
def run_directory(build, tmp_path):
    save_run(build(vocab_size=320), tmp_path)
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "tokenizer.json")
    return tmp_path


def draw(directory, *words):
    return script("tools/trace.py", "--run", directory, *words)


class Scripts(HTMLParser):
    """What an HTML reader takes for script elements, a list of their texts."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.open, self.links = [], False, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open = tag == "script"
        self.texts += [""] * self.open
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, text):
        if self.open:
            self.texts[-1] += text


def test_no_text_of_a_token_ends_the_page(tmp_path):
    texts = ["</script>", "<!--", "<script>", "</SCRIPT ", '"', "&lt;", "\\u003c", "\u2028", "日"]
    tops = [[[(text, 0.5), ("__DATA__", 0.25)] for text in texts]]
    write_page(tmp_path / "t.html", texts, tops)
    scripts = Scripts((tmp_path / "t.html").read_text())
    assert len(scripts.texts) == 2 and scripts.texts[1].strip().startswith("const data = ")
    data = json.loads(scripts.texts[0])
    assert data["tokens"] == texts and data["loops"] == json.loads(json.dumps(tops))


PROMPT = """</script><!-- <script> "'&amp; \\n\r\n\té日\u2028"""


def test_a_page_holds_the_likeliest_tokens_of_each_loop(run_directory, tmp_path):
    page = tmp_path / "t.HTML"
    done = draw(run_directory, page, "--prompt", PROMPT, "--recurrence", "5")
    assert done.returncode == 0, done.stderr
    assert f"wrote {page}: 32 tokens, 5 loops" in done.stdout  # the context is 32
    assert page.read_bytes().isascii() and "http" not in page.read_text()
    scripts = Scripts(page.read_text())
    assert len(scripts.texts) == 2 and not scripts.links  # no text ended or began an element
    data = json.loads(scripts.texts[0])

    read = ["<|endoftext|>", *PROMPT.encode().decode("latin-1")]
    assert data["tokens"] == [c if c.isascii() else f"\\x{ord(c):x}" for c in read][-32:]
    tokenizer = make_tokenizer("bytes")
    ids = [tokenizer.eot_token, *tokenizer.encode(PROMPT)][-32:]
    model = Parcae.from_pretrained(run_directory)
    for loops, tops in enumerate(data["loops"], start=1):
        probs = model(torch.tensor([ids]), recurrence=loops)[0][0].softmax(-1)
        best = probs.topk(5)
        shown = torch.tensor([[p for _, p in top] for top in tops])
        torch.testing.assert_close(shown, best.values, atol=1e-5, rtol=0)
        for top, row in zip(tops, best.indices.tolist()):
            # the model's vocabulary of 320 is larger than the tokenizer's of 257
            texts = [chr(i) if i < 128 else f"\\x{i:x}" if i < 256 else "?" for i in row]
            eot = ["<|endoftext|>" if i == 256 else text for i, text in zip(row, texts)]
            assert [text for text, _ in top] == eot
    assert len(data["loops"]) == 5


def test_what_predicts_nothing_is_not_traced(run_directory, build, tmp_path):
    model = build(vocab_size=320, injection="concat")
    with torch.no_grad():
        model.injection.W.mul_(100)
    save_run(model, run_directory)
    flags = [tmp_path / "t.html", "--prompt", "x = 1"]
    assert draw(run_directory, *flags, "--recurrence", "2").returncode == 0
    (tmp_path / "t.html").unlink()
    done = draw(run_directory, *flags, "--recurrence", "64")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not finite" in done.stderr and not (tmp_path / "t.html").exists()


def test_a_page_needs_a_loop_and_a_prompt_but_no_matplotlib(
        run_directory, build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = [tmp_path / "t.html", "--prompt", "x = 1"]
    assert draw(run_directory, *flags).returncode == 0
    (tmp_path / "t.html").unlink()
    assert "required: --prompt" in draw(run_directory, *flags[:1]).stderr
    save_run(build(vocab_size=320, n_recurrent=0), run_directory)
    done = draw(run_directory, *flags)
    assert done.returncode == 2 and "needs a model that loops" in done.stderr
    assert not (tmp_path / "t.html").exists()
