"""A web page of what each loop predicts (sample.py --trace FILE.html): one file, no network.

A slider goes through the loops. Each token is coloured by the probability of the likeliest next
token; the five likeliest stand under the token that is pointed at. FILE.html#loop=3 begins there.
"""

from common import json_text, nothing_to_run, write_text

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
    loops = [[[(text, round(probability, 5)) for text, probability in top] for top in row]
             for row in tops]
    # ASCII, and no "<": nothing in a text can end the script element that holds it
    data = json_text({"tokens": tokens, "loops": loops}, separators=(",", ":"))
    write_text(path, PAGE.replace("__DATA__", data.replace("<", "\\u003c")))


if __name__ == "__main__":
    nothing_to_run(__doc__)
