"""Cross-entropy over a large vocabulary, a few hundred tokens at a time, its gradients found on the way.

Plain autograd keeps logits of every token, in float32 and more than once: for 4,096 tokens and 8,000 entries that is
memory traffic of the order of the matrix products themselves. Here a piece of the logits lives in the cache and is gone
before the next one, as in the output layers of Wijmans et al. (2024) and Hsu et al. (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PIECE_VALUES = 4 << 20  # logits at a time: 16 MB in float32
_MIN_TOKENS = 64  # below, the matrix products are slow


def vocabulary_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bf16: bool) -> Tensor:
    """The mean of -log softmax(hidden weightᵀ)[target]: a float32 scalar that can be differentiated once.

    hidden: [tokens, hidden], weight: [vocab, hidden], targets: [tokens]. bf16: matrix products in bfloat16.
    """
    with torch.autocast("cpu", enabled=False):
        loss: Tensor = _Loss.apply(hidden, weight, targets, torch.bfloat16 if bf16 else torch.float32)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        count = len(targets)
        states, matrix = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(states) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        total = torch.zeros(())
        size = max(_MIN_TOKENS, _PIECE_VALUES // len(weight))
        rows = max(1, _PIECE_VALUES // weight.shape[1])
        for start in range(0, count, size):
            piece, wanted = states[start : start + size], targets[start : start + size, None]
            logs = torch.log_softmax(torch.mm(piece, matrix.t()).float(), -1)  # [piece, vocab]
            total -= logs.gather(1, wanted).sum()
            if not (of_hidden or of_weight):
                continue
            # d loss / d logits = softmax - 1 at the target, over all the tokens of the mean
            errors = logs.exp_().scatter_add_(1, wanted, torch.full(wanted.shape, -1.0)).div_(count).to(dtype)
            if grad_hidden is not None:
                torch.mm(errors, matrix, out=grad_hidden[start : start + size])
            if grad_weight is not None:
                for row in range(0, len(weight), rows):  # the product of all rows at once is as large as the matrix
                    grad_weight[row : row + rows] += torch.mm(errors[:, row : row + rows].t(), piece)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if grad is None else grad.mul_(outer[0]).to(dtype) for grad, dtype in pairs]
        return (*grads, None, None)
