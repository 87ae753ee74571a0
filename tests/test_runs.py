import torch
from conftest import save_run, script

from model import Parcae


def test_a_retrofitted_transformer_computes_the_same_until_it_loops(build, tmp_path):
    gpt = build(n_prelude=6, n_recurrent=0, n_coda=0, value_embeds=True, vocab_size=320).eval()
    save_run(gpt, tmp_path)
    done = script("runs/retrofit.py", tmp_path, tmp_path / "looped")
    assert done.returncode == 0, done.stderr
    looped, idx = Parcae.from_pretrained(tmp_path / "looped"), torch.randint(320, (2, 20))
    assert (looped.config.n_prelude, looped.config.n_recurrent, looped.config.n_coda) == (1, 4, 1)
    assert torch.allclose(looped(idx, recurrence=1)[0], gpt(idx)[0], atol=1e-4)
    assert not torch.allclose(looped(idx, recurrence=2)[0], gpt(idx)[0], atol=1e-2)


def test_what_loops_already_is_refused(build, tmp_path):
    save_run(build(vocab_size=320), tmp_path)
    done = script("runs/retrofit.py", tmp_path, tmp_path / "looped")
    assert done.returncode == 2 and "must be a plain transformer" in done.stderr and not (tmp_path / "looped").exists()
