"""Muon, the optimiser for the layers' matrices: it orthogonalises momentum, as published.

A plain update moves a matrix mostly along the largest singular directions of its gradient. Muon
moves it equally far along all. For a matrix W (rows, columns) with gradient G, each step computes:

    M <- M + (1 - mu) (G - M);   G <- G + mu (M - G)           Nesterov momentum
    X <- G / (1.02 |G| + 1e-6), five times X <- a X + (b S + c S S) X with S = X X^T
                                                               near to U V^T, for G = U D V^T
    v <- v + (1 - beta2) (mean of squares of each row - v)     (columns if W is wide)
    X <- X / sqrt(v), scaled so that X keeps its norm          NorMuon
    W <- W - lr sqrt(max(1, rows / columns)) (X + decay * W')
                                W' is W where X and W have the same sign, and 0 elsewhere

The sources are Muon (Jordan et al. 2024), the coefficients of each step (Polar Express, arXiv
2505.16932), NorMuon (arXiv 2510.05491) and cautious weight decay (arXiv 2510.12402). The published
code of Parcae combines them and multiplies matrices in bfloat16.
"""

import torch

# (a, b, c) of each step: together they bring singular values from near 0 to near 1
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
WARM_UP = 300  # steps in which the momentum rises


def momentum_at(step):
    """Return the momentum mu of a step: 0.85, rising to 0.95 over the first 300 steps."""
    return 0.85 + 0.10 * min(1, step / WARM_UP)


def orthogonalise(G, dtype):
    """Return U V^T, roughly, for each matrix G = U D V^T in a stack (n, rows, columns); products
    are computed in dtype."""
    X = G.to(dtype)
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = X.shape[-2] > X.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        S = X.mT @ X if tall else X @ X.mT  # the smaller of the two
        S = b * S + c * (S @ S)
        X = a * X + (X @ S if tall else S @ X)
    return X.to(G.dtype)


def even_out(X, v, beta2):
    """Return a stack X (n, rows, columns) with the rows (or columns) of each matrix made about
    equally long, and its norm kept. Updates v, the running means of their squares, (n, rows, 1) or
    (n, 1, columns)."""
    v.lerp_(X.square().mean(-1 if v.shape[-1] == 1 else -2, keepdim=True), 1 - beta2)
    even = X * v.clamp(min=1e-10).rsqrt()
    before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (X, even))
    return even * (before / after.clamp(min=1e-10))


def decays(X, W):
    """Return a mask of the weights W to decay: those that the update X makes smaller anyway."""
    return X * W >= 0


class Muon(torch.optim.Optimizer):
    """Train 2-D parameters with Muon. Those of equal shape form a group and are updated together.

    products: the dtype in which matrices are orthogonalised. None is bfloat16 on a GPU, as
    published, and the weights' dtype on other devices, where bfloat16 may be slower."""

    def __init__(self, params, lr=8e-3, momentum=0.95, weight_decay=0.2, beta2=0.95,
                 products=None):
        self.products = products
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([{"params": alike} for alike in shapes.values()],
                         dict(lr=lr, momentum=momentum, weight_decay=weight_decay, beta2=beta2))

    @torch.no_grad()
    def step(self):
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            params = group["params"]
            rows, columns = params[0].shape
            shape = (rows, 1) if rows >= columns else (1, columns)
            for p in params:
                if p not in self.state:
                    self.state[p] = {"momentum": torch.zeros_like(p), "squares": p.new_zeros(shape)}
            momenta, squares = ([self.state[p][name] for p in params]
                                for name in ("momentum", "squares"))
            G, W, M, v = map(torch.stack, ([p.grad for p in params], params, momenta, squares))

            # momentum, then equally long directions, then equally long rows or columns
            M.lerp_(G, 1 - group["momentum"])
            products = self.products or (torch.bfloat16 if G.is_cuda else G.dtype)
            X = orthogonalise(G.lerp(M, group["momentum"]), products)
            X = even_out(X, v, group["beta2"])
            # the weights
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            W = W - lr * (X + group["weight_decay"] * W * decays(X, W))

            for stored, stack in ((momenta, M), (squares, v), (params, W)):
                torch._foreach_copy_(stored, list(stack))
