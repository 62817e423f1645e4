"""The optimizer keeps 32-bit copies of the weights, also in its state file."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_master_weights_keep_what_16_bits_lose() -> None:
    import torch
    from torch import nn

    from stages.training.optimizer import MixedPrecisionMuon

    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64)).bfloat16()
    optimizer = MixedPrecisionMuon(model, lr=1e-6, weight_decay=0.0)
    before = model[0].weight.detach().float().clone()
    for _ in range(3):
        model(torch.arange(8)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    masters = {name: optimizer.state[p]["master"] for name, p in model.named_parameters()}
    assert all(master.dtype == torch.float32 for master in masters.values())
    assert not torch.equal(masters["0.weight"], before)
    again = MixedPrecisionMuon(model, lr=1e-6, weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(again.state[p]["master"], masters[name]) for name, p in model.named_parameters())
