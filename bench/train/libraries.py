"""One step of a toy model, before memory is measured."""

from __future__ import annotations

import torch


def load_libraries(device: torch.device) -> None:
    """One step of a toy model: torch imports and sets up much on first use, which is no method's memory or time."""
    layer = torch.nn.Linear(8, 8, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    query = layer(torch.ones(1, 2, 4, 8, device=device))
    mixed = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    mixed.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
