"""Can a trained transformer learn to loop? Make a looped one that computes the same at T = 1.

    python -m runs.retrofit out/gpt out/retrofit      reads a run directory and writes a new one
    python train.py --init-from out/retrofit ...      trains from there

Of n layers, n // 4 stay before the loop and n // 4 after it. The new parts start as the identity:
C_proj is I, and the injection passes e on unchanged (B = 1 / dt). The output of the prelude is not
normalised, since the plain transformer does not do it. At T = 2 the loop reads its own output as a
state, for which the layers were never trained.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from model import Parcae
from parts.cli import Parser, UserError, run_script
from parts.files import whole_directory, write_json
from parts.generation import check_predicts
from parts.reading import read_json


@torch.no_grad()
def retrofit(gpt):
    """Return a looped model in eval mode, made from a plain one. Raises UserError."""
    blocks = [*gpt.prelude, *gpt.coda]
    if gpt.config.n_recurrent or len(blocks) < 2:
        raise UserError("the model to start from must be a plain transformer of two layers or more")
    before = len(blocks) // 4  # layers before the loop, and equally many after it
    config = replace(gpt.config, n_prelude=before, n_recurrent=len(blocks) - 2 * before,
                     n_coda=before, prelude_norm=False, injection="diagonal")
    looped = Parcae(config)

    # copy what the plain model has: the layers in their order, the embeddings and the head
    for ours, theirs in zip([*looped.prelude, *looped.recurrent, *looped.coda], blocks):
        ours.load_state_dict(theirs.state_dict())
    for name in ("wte", "value_embeds", "norm_f", "lm_head"):
        getattr(looped, name).load_state_dict(getattr(gpt, name).state_dict())

    # the new parts: h = dt * B e = e after the first injection, and C_proj h = h at the end
    looped.C_proj.weight.copy_(torch.eye(config.n_embd))
    looped.injection.B.copy_(torch.diag(1 / F.softplus(looped.injection.dt_bias)))
    return looped.eval()


def check_free(path):
    """Raise UserError if path exists, so that nothing is replaced."""
    if path.exists():
        raise UserError(f"{path} exists already: choose another directory or remove it")


def write_run(model, source, out):
    """Write a run directory for train.py --init-from: the model, and the tokenizer of source."""
    with whole_directory(out, check_free) as directory:
        before = read_json(source / "config.json")  # keep what the weights were trained on
        record = {name: before[name] for name in ("data", "text") if name in before}
        record |= {"model": asdict(model.config), "settings": {}}
        write_json(directory / "config.json", record)
        torch.save({"model": model.state_dict()}, directory / "ckpt.pt")
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

    # check on random tokens that both models compute the same
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
