"""Only the rows of an embedding that the data uses take part in training: the others would get no gradient anyway.

For a small encoder the embedding is half of all weights, and the optimiser would walk through all of it at every step.
The result is that of training the whole table, for rows without gradient and without decay do not move.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class UsedRows:
    """Puts a small embedding in the place of the model's, until `restore`."""

    def __init__(self, model: Any, ids: Iterable[int]) -> None:
        self._model = model
        self._whole: nn.Embedding = model.get_input_embeddings()
        self._rows = torch.tensor(sorted(set(ids)), dtype=torch.long)
        self._place = torch.full((self._whole.num_embeddings,), -1, dtype=torch.long)  # id → row of the small table
        self._place[self._rows] = torch.arange(len(self._rows))
        kind: Any = type(self._whole)
        small = kind.__new__(kind)  # keeps a subclass's own scaling, as gemma3's has
        nn.Module.__init__(small)
        small.__dict__.update({k: v for k, v in self._whole.__dict__.items() if not k.startswith("_")})
        small.num_embeddings, small.padding_idx = len(self._rows), None
        small.weight = nn.Parameter(self._whole.weight.detach()[self._rows].clone())
        for name, value in self._whole.named_buffers():
            small.register_buffer(name, value, persistent=False)
        small.register_forward_pre_hook(lambda module, inputs: (self._place[inputs[0]],))
        model.set_input_embeddings(small)

    def restore(self) -> None:
        """The whole table again, with what its rows have learned."""
        with torch.no_grad():
            self._whole.weight[self._rows] = self._model.get_input_embeddings().weight
        self._model.set_input_embeddings(self._whole)
