"""What train.py tells a newcomer: the model and the measures before, what the losses say after."""

import shlex

import numpy as np

from parts.settings import command_line

ENTROPY_OF = 1_000_000  # tokens that the entropy of single tokens is counted from


def layers_text(n):
    return "1 layer" if n == 1 else f"{n} layers"


def model_text(config):
    """A model's shape in words."""
    channels = f"{config.n_embd} channels, context {config.block_size} tokens"
    if not config.n_recurrent:
        plain = config.n_prelude + config.n_coda
        return f"{layers_text(plain)}, no loop; {channels}"
    prelude, block, coda = map(layers_text, (config.n_prelude, config.n_recurrent, config.n_coda))
    return f"{prelude}, then a loop of {block}, then {coda}; {channels}"


def loop_text(config, settings):
    """How often the loop runs in training. settings: those of the run, a dict."""
    mean, depth = config.mean_recurrence, config.backprop_depth
    if mean == 1:
        return "runs once (mean recurrence 1)"
    often = {"per-sequence": " on average, another number for each sequence",
             "per-batch": " on average, another number for each batch",
             "fixed": ""}.get(settings["depth_sampling"], f" ({settings['depth_sampling']})")
    late = settings["loop_from"]
    begins = f"; once only in the first {late:.0%}" if late else ""
    return (f"runs {mean} times{often} (mean recurrence {mean}); the last {min(mean, depth)} with "
            f"gradient{begins}")


def single_token_entropy(loader):
    """Loss in nats of a model that knows how frequent each token is and nothing else."""
    tokens = np.asarray(loader.shards[0][:ENTROPY_OF])
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def beginning(out, data, config, loader, record, dtype):
    """The lines before training. record: what config.json holds."""
    lines = [f"{out}: {record['parameters']:,} parameters",
             f"  model    {model_text(config)}"]
    if config.n_recurrent:
        lines.append(f"  loop     {loop_text(config, record['settings'])}")
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    lines += [
        f"  data     {data}: {len(loader) * config.block_size:,} train tokens",
        f"  machine  {record['ranks']} x {record['device']}, {threads}, "
        f"{str(dtype).removeprefix('torch.')}; MFU: the share of "
        f"{record['peak_flops'] / 1e9:,.0f} GFLOP/s, what its matmuls reach",
        f"  loss     in nats per token; {single_token_entropy(loader):.2f} is knowing how frequent "
        "each token is, and nothing else",
    ]
    return "\n".join(lines)


def ending(out, config, losses, settings):
    """The lines after training: what the losses {loops: nats} say, and what to try next. settings:
    those of the run, a dict."""
    lines, run = [], shlex.quote(str(out))
    mean = config.mean_recurrence
    if {1, mean} <= losses.keys() and mean > 1:
        gain = losses[1] - losses[mean]
        word = "better" if gain > 0 else "worse"
        lines.append(f"\nThe same weights, run {mean} times, predict {abs(gain):.3f} nats a token "
                     f"{word} than run once.")
    looped = config.n_recurrent and mean > 1
    loops = f" --recurrence 1 {mean} {2 * mean}" if looped else ""
    lines += ["\nnext, more text:",
              f'  python sample.py --run {run} --prompt "def "{loops}',
              "how the loss fell, as out/curves.png (needs matplotlib):",
              f"  python -m tools.curves {run}"]
    if looped:
        once = command_line(settings, mean_recurrence=1, backprop_depth=None, out=f"{out}-once")
        lines += ["is the loop worth its time? The same layers run once:", f"  {once}"]
    return "\n".join(lines)

