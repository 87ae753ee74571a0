import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small models: threads cost more than they bring

from model import Parcae, ParcaeConfig  # noqa: E402


@pytest.fixture
def build():
    """build(**config) makes a small model whose every weight matters: none is left at zero."""
    def build(seed=0, **kwargs):
        torch.manual_seed(seed)
        base = {"vocab_size": 50, "block_size": 32, "n_embd": 32, "n_head": 2, "n_prelude": 1, "n_recurrent": 2, "n_coda": 1,
                "mean_recurrence": 4}
        model = Parcae(ParcaeConfig(**base | kwargs))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("attn.c_proj.weight", "mlp.proj.weight")):
                    p.normal_(std=0.2)
        return model
    return build


@pytest.fixture
def tokens():
    return torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(1))
