"""Write a web page that shows what a model would predict after each loop, at each prompt token.

    python -m tools.trace --prompt "for i in range(10):" out/trace.html

The page is one file, needs no network, and has a slider for the loop. The colour of a token is the
probability of the likeliest next token. Point at a token to see the five likeliest next tokens.
"""

from pathlib import Path

import torch

from parts.cli import LOOPS, Parser, UserError, new_file, run_script, some_path
from parts.files import json_text, write_text
from parts.generation import check_predicts
from sample import read_prompt
from tools.evaluate import open_run

LIKELIEST = 5  # next tokens shown for each prediction


@torch.no_grad()
def trace(model, idx, recurrence):
    """Yield, for each loop, what the model would predict at each of the tokens idx (1, S): the
    probabilities and the ids of the likeliest next tokens, (S, LIKELIEST) each. Raises UserError
    if a prediction is not finite."""
    for loops, (h, inputs) in enumerate(model.states(idx, recurrence), start=1):
        logits = model.head(model.readout(h, inputs)[0])  # (S, vocab_size)
        check_predicts(logits, loops)
        yield logits.softmax(-1).topk(LIKELIEST)


def text_of(tokenizer, i):
    """Return token i as text; a byte that is only part of a character is written in hexadecimal."""
    try:
        return tokenizer.decode_single_token_bytes(i).decode("utf-8", errors="backslashreplace")
    except KeyError:
        return "?"  # an unused id: vocabulary sizes are rounded up


def write_page(path, tokens, loops):
    """Write the page. tokens: the texts of the prompt tokens; loops: for each loop and each
    token, the likeliest next tokens, [(text, probability)], the likeliest first."""
    # the data are ASCII without "<", so that no text can end the script element that holds them
    data = json_text({"tokens": tokens, "loops": loops}, separators=(",", ":"))
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_text(path, page.replace("__DATA__", data.replace("<", "\\u003c")))


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=some_path, default="out/default", metavar="DIR",
                        help="run directory of train.py (default: %(default)s)")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to read")
    parser.add_argument("--recurrence", type=LOOPS, metavar="T",
                        help="loops (default: twice the mean of training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("file", type=new_file, metavar="FILE", help="the page to write")
    parser.set_defaults(dtype="float32")
    args = parser.parse_args()
    model, tokenizer, _ = open_run(args)
    _, idx = read_prompt(args, tokenizer)
    if not model.config.n_recurrent:
        raise UserError("a trace needs a model that loops")

    idx = idx[:, -model.config.block_size:].to(model.wte.weight.device)
    recurrence = args.recurrence or 2 * model.config.mean_recurrence
    read, loops = [text_of(tokenizer, i) for i in idx[0].tolist()], []
    for probs, tokens in trace(model, idx, recurrence):
        loops.append([[(text_of(tokenizer, i), round(p, 5)) for i, p in zip(*top)]
                      for top in zip(tokens.tolist(), probs.tolist())])
    write_page(args.file, read, loops)
    print(f"wrote {args.file}: {len(read)} tokens, {recurrence} loops")


if __name__ == "__main__":
    run_script(main)
