"""Draw what a model would predict after each loop, at each token of a prompt.

    python -m tools.trace --prompt "for i in range(10):" trace.png     a picture
    python -m tools.trace --prompt "for i in range(10):" trace.html    a web page

The page is one file and needs no network. A slider goes through the loops. Each token is coloured
by the probability of the likeliest next token; the five likeliest stand under the token that is
pointed at. FILE.html#loop=3 begins there.
"""

from pathlib import Path

import torch

from model import Parcae
from parts import figures
from parts.cli import LOOPS, Parser, UserError, new_file, run_script
from parts.files import json_text, write_text
from parts.generation import check_predicts
from parts.machine import pick_device, use_threads
from parts.quantize import prepare_weights
from parts.tokenizer import decode_stream, load_tokenizer
from sample import add_prompt_flags, read_prompt

TRACED = 40  # tokens of a prompt that a picture shows

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>What each loop predicts</title>
<style>
  :root { color-scheme: light dark; --blue: 59 130 246 }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem }
  header { position: sticky; top: 0; z-index: 2; padding: .6rem 0; background: Canvas }
  input { width: min(100%, 30rem); vertical-align: middle }
  #scale { display: inline-block; width: 8rem; height: .8rem; border: 1px solid GrayText;
           background: linear-gradient(to right, transparent, rgb(var(--blue) / .75)) }
  #text, #tip { font-family: ui-monospace, monospace; white-space: pre-wrap }
  #text { position: relative; line-height: 2; padding-bottom: 12rem; overflow-wrap: anywhere }
  #text > span { padding: .15rem 0; border-radius: 2px; box-shadow: inset 1px 0 Canvas }
  #text > .at { outline: 2px solid CanvasText }
  #tip { position: absolute; z-index: 1; padding: .3rem .6rem; width: 17rem; line-height: 1.5;
         background: Canvas; border: 1px solid GrayText; pointer-events: none }
  #tip div { display: flex; justify-content: space-between;
             background: linear-gradient(rgb(var(--blue) / .5) 0 0) no-repeat }
  #tip .right { font-weight: bold }
  #tip :first-child { overflow: hidden; white-space: pre }
</style>
<header>
  <label>after loop <output id="loop"></output> of <span id="loops"></span>
  <input id="slider" type="range" min="1" step="1" autofocus></label>
  <div>Probability of the likeliest next token: 0 <span id="scale"></span> 1. Point at a token, or
  go to it with Tab: the five likeliest after it (bold: what the text goes on with). Arrow keys
  left and right move the slider.</div>
</header>
<div id="text"><div id="tip" role="status"></div></div>
<script id="data" type="application/json">__DATA__</script>
<script>
  const data = JSON.parse(document.getElementById("data").textContent);
  const [slider, box, tip] = ["slider", "text", "tip"].map(id => document.getElementById(id));
  const visible = text => text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  let at = data.tokens.length - 1;  // the token pointed at
  const spans = data.tokens.map((token, i) => {
    const span = document.createElement("span");
    span.textContent = token.replaceAll("\n", "\u21b5\n");  // ends of lines are tokens, too
    span.tabIndex = 0;
    span.onfocus = span.onpointerover = () => { at = i; draw(); };
    return box.insertBefore(span, tip);
  });
  function draw() {
    const tops = data.loops[slider.value - 1];
    document.getElementById("loop").textContent = slider.value;
    spans.forEach((span, i) => {
      span.style.background = `rgb(var(--blue) / ${0.75 * tops[i][0][1]})`;
      span.className = i === at ? "at" : "";
    });
    tip.replaceChildren(...tops[at].map(([token, probability]) => {
      const row = document.createElement("div");
      row.style.backgroundSize = `${100 * probability}% 100%`;
      row.className = token === data.tokens[at + 1] ? "right" : "";
      for (const text of [visible(token).replaceAll(" ", "\u2423"), probability.toFixed(3)])
        row.appendChild(document.createElement("span")).textContent = text;
      return row;
    }));
    const first = spans[at].getClientRects()[0], outer = box.getBoundingClientRect();
    tip.style.top = `${first.bottom - outer.top + 6}px`;
    tip.style.left = `${Math.max(0, Math.min(first.left - outer.left,
                                             outer.width - tip.offsetWidth))}px`;
  }
  function go(loop) {
    slider.value = loop;  // the slider keeps it within its ends
    history.replaceState(null, "", `#loop=${slider.value}`);
    draw();
  }
  const asked = () => go(Number(new URLSearchParams(location.hash.slice(1)).get("loop")) || 1);
  document.getElementById("loops").textContent = slider.max = data.loops.length;
  slider.oninput = () => go(slider.value);
  onhashchange = asked;
  onresize = draw;
  onkeydown = event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(Number(slider.value) + step);
  };
  asked();
</script>
</html>
"""


def write_page(path, tokens, tops):
    """Write the page.

    tokens: the T texts that are read. tops: for each loop and token the likeliest next tokens,
    lists (loops, T, k) of (text, probability), the likeliest first."""
    # ASCII, and no "<": nothing in a text can end the script element that holds it
    data = json_text({"tokens": tokens, "loops": tops}, separators=(",", ":"))
    write_text(path, PAGE.replace("__DATA__", data.replace("<", "\\u003c")))


@torch.no_grad()
def trace(model, idx, recurrence, last, k):
    """Return what the model would predict after each loop at the last tokens of idx (1, T): the
    probabilities and numbers of the k likeliest tokens, (loops, last, k) each; and how far the loop
    moved the state, |h_t - h_{t-1}| / |h_t|, (loops, last). Raises UserError where a prediction is
    not finite."""
    tops, moved, before = [], [], 0
    for loops, (h, inputs) in enumerate(model.states(idx, recurrence), start=1):
        logits = model.lm_head(model.readout(h, inputs)[0, -last:]).float()  # (last, vocab_size)
        check_predicts(logits, loops)
        tops.append(logits.softmax(-1).topk(k))
        moved.append(((h - before).norm(dim=-1) / h.norm(dim=-1))[0, -last:])
        before = h
    probs, tokens = map(torch.stack, zip(*tops))
    return probs, tokens, torch.stack(moved)


def draw_trace(model, tokenizer, idx, recurrence, path):
    """Write the picture, or the page, of a trace of the last tokens of idx (1, T)."""
    if not model.config.n_recurrent or idx.shape[1] < 2:
        raise UserError("--trace needs a model that loops and a prompt")
    idx = idx[:, -model.config.block_size:]
    if is_page(path):
        probs, tokens, _ = trace(model, idx, recurrence, idx.shape[1], 5)
        tops = []
        for token_rows, prob_rows in zip(tokens.tolist(), probs.tolist()):
            tops.append([[(text_of(tokenizer, i), round(p, 5)) for i, p in zip(*top)]
                         for top in zip(token_rows, prob_rows)])
        write_page(path, [text_of(tokenizer, i) for i in idx[0].tolist()], tops)
    else:
        probs, tokens, moved = trace(model, idx, recurrence, TRACED, 1)
        idx = idx[:, -TRACED:]
        figures.trace(path, [label(tokenizer, i) for i in idx[0].tolist()],
                      [[label(tokenizer, i) for i in row] for row in tokens[..., 0].tolist()],
                      probs[..., 0].cpu().numpy(), moved.cpu().numpy())
    print(f"wrote {path}: {idx.shape[1]} tokens, {recurrence} loops")


def is_page(path):
    return Path(path).suffix.lower() == ".html"


def text_of(tokenizer, i):
    """Return token i as text; a byte that is not text alone, half a letter, as \\xc3."""
    try:
        return tokenizer.decode_single_token_bytes(i).decode("utf-8", errors="backslashreplace")
    except KeyError:
        return "?"  # vocabularies are rounded up


def label(tokenizer, i):
    """Return token i in up to five visible characters."""
    if i >= tokenizer.n_vocab:
        return "?"  # vocabularies are rounded up
    text = "".join(decode_stream(tokenizer, [i]))
    return repr(text)[1:-1].replace(" ", "\u2423")[:5]


def main():
    parser = Parser(description=__doc__)
    add_prompt_flags(parser)
    parser.add_argument("--recurrence", type=LOOPS, metavar="T",
                        help="loops (default: twice the model's mean)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("file", type=new_file, metavar="FILE",
                        help=f"FILE.html: a page with a slider over loops. Else a PNG, of the last "
                        f"{TRACED} tokens; needs matplotlib")
    args = parser.parse_args()
    if not is_page(args.file):
        figures.pyplot()  # where matplotlib is missing, say so now
    device = pick_device(args.device)
    model = Parcae.from_pretrained(args.run)
    use_threads(model.config.n_embd)
    prepare_weights(model, device, torch.float32)

    tokenizer = load_tokenizer(args.run)
    idx = read_prompt(args, tokenizer)[1].to(device)
    draw_trace(model, tokenizer, idx, args.recurrence or 2 * model.config.mean_recurrence,
               args.file)


if __name__ == "__main__":
    run_script(main)
