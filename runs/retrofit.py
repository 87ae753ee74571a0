"""Turn a plain transformer into a looped one that computes the same at T = 1.

    python -m runs.retrofit out/gpt out/retrofit
    python train.py --init-from out/retrofit ...      goes on from there

The middle half of its layers becomes the recurrent block. What is new starts as the identity:
C_proj, and what the injection lets through of e (B = 1 / dt); the prelude is not normalised, as
nothing stood there. At T = 2 the loop takes its own output for a state, which it was never
trained for.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from model import Parcae
from parts.cli import Parser, UserError, run_script
from parts.files import whole_directory, whole_file, write_json
from parts.generation import check_predicts
from parts.reading import read_json


@torch.no_grad()
def retrofit(gpt):
    """The looped model (in eval mode) of a plain one of at least two layers. Raises UserError."""
    blocks = [*gpt.prelude, *gpt.coda]
    if gpt.config.n_recurrent or len(blocks) < 2:
        raise UserError("the model to start from must be a plain transformer of two layers or more")
    before = len(blocks) // 4  # layers before the loop, and as many after it
    config = replace(gpt.config, n_prelude=before, n_recurrent=len(blocks) - 2 * before,
                     n_coda=before, prelude_norm=False, injection="diagonal")
    looped = Parcae(config)

    # What there was: the layers in their order, the embeddings and the head.
    for ours, theirs in zip([*looped.prelude, *looped.recurrent, *looped.coda], blocks):
        ours.load_state_dict(theirs.state_dict())
    for name in ("wte", "value_embeds", "norm_f", "lm_head"):
        getattr(looped, name).load_state_dict(getattr(gpt, name).state_dict())

    # What is new: h = dt * B e = e after the first injection, and C_proj h = h at the end.
    looped.C_proj.weight.copy_(torch.eye(config.n_embd))
    looped.injection.B.copy_(torch.diag(1 / F.softplus(looped.injection.dt_bias)))
    return looped.eval()


def check_free(path):
    """Raise UserError where something is that a new directory would replace."""
    if path.exists():
        raise UserError(f"{path} is there already: choose another directory, or remove it")


def write_run(model, source, out):
    """A run directory with the model and source's tokenizer, for train.py --init-from."""
    with whole_directory(out, check_free) as directory:
        before = read_json(source / "config.json")  # what the weights were trained on comes along
        record = {name: before[name] for name in ("data", "text") if name in before}
        record |= {"model": asdict(model.config), "settings": {}}
        write_json(directory / "config.json", record)
        with whole_file(directory / "ckpt.pt", "wb") as file:
            torch.save({"model": model.state_dict()}, file)
        shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("gpt", type=Path, metavar="GPT", help="run directory of a plain transformer")
    add("out", type=Path, metavar="OUT", help="run directory to write")
    args = parser.parse_args()
    check_free(args.out)
    gpt = Parcae.from_pretrained(args.gpt)
    looped = retrofit(gpt)

    # The claim, checked on random tokens.
    idx = torch.randint(gpt.config.vocab_size, (1, gpt.config.block_size))
    with torch.no_grad():
        difference = (looped(idx, recurrence=1)[0] - gpt(idx)[0]).abs().max()
    check_predicts(difference, 1)
    print(f"largest difference of the logits at T = 1: {difference:.1e}")
    write_run(looped, args.gpt, args.out)
    c = looped.config
    print(f"wrote {args.out}: {c.n_prelude}/{c.n_recurrent}/{c.n_coda} layers")


if __name__ == "__main__":
    run_script(main)
