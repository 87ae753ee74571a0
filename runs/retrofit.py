"""Turn a plain transformer into a looped one that computes the same at T = 1.

    python runs/retrofit.py out/gpt out/retrofit
    python train.py --init-from out/retrofit ...      goes on from there

The middle half of its layers becomes the recurrent block. What is new starts as the identity: C_proj, and what the injection lets
through of e (B = 1 / dt); the prelude is not normalised, as nothing stood there. At T = 2 the loop takes its own output for a
state, which it was never trained for.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent.parent))
from model import Parcae, UserError


@torch.no_grad()
def retrofit(gpt):
    blocks = [*gpt.prelude, *gpt.coda]
    layers = len(blocks)
    if gpt.config.n_recurrent or layers < 2:
        raise UserError("the model to start from must be a plain transformer of two layers or more")
    first, last = layers // 4, layers - layers // 4  # of the recurrent block, and of the coda
    looped = Parcae(replace(gpt.config, n_prelude=first, n_recurrent=last - first, n_coda=layers - last, prelude_norm=False))
    for ours, theirs in zip([*looped.prelude, *looped.recurrent, *looped.coda], blocks):
        ours.load_state_dict(theirs.state_dict())
    for name in ("wte", "value_embeds", "norm_f", "lm_head"):
        getattr(looped, name).load_state_dict(getattr(gpt, name).state_dict())
    looped.C_proj.weight.copy_(torch.eye(gpt.config.n_embd))
    looped.injection.B.copy_(torch.diag(1 / F.softplus(looped.injection.dt_bias)))
    return looped.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpt", metavar="GPT", help="run directory of a plain transformer")
    parser.add_argument("out", metavar="OUT", help="directory to write, in the published format")
    args = parser.parse_args()
    try:
        gpt = Parcae.from_pretrained(args.gpt)
        looped = retrofit(gpt)
    except UserError as error:
        parser.error(str(error))
    idx = torch.randint(gpt.config.vocab_size, (1, gpt.config.block_size))
    with torch.no_grad():
        print(f"largest difference of the logits at T = 1: {(looped(idx, recurrence=1)[0] - gpt(idx)[0]).abs().max():.1e}")
    looped.export(args.out)
    print(f"wrote {args.out}: {looped.config.n_prelude}/{looped.config.n_recurrent}/{looped.config.n_coda} layers")
