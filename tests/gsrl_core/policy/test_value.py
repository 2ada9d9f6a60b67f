import torch

from gsrl_core.policy.value import ValueHead, masked_mean


def test_masked_mean_ignores_padding():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    valid = torch.tensor([[True, True, False]])
    torch.testing.assert_close(masked_mean(hidden, valid), torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(masked_mean(hidden[:, :2], valid[:, :2]), torch.tensor([[2.0, 3.0]]))


def test_value_head_size_and_start():
    head = ValueHead(2048, (512, 256, 128))
    assert sum(p.numel() for p in head.parameters()) == 1_213_441
    assert all(not layer.bias.any() for layer in head.mlp if hasattr(layer, "bias"))
    assert head(torch.zeros(3, 2048)).tolist() == [0.0, 0.0, 0.0]
    assert head.mlp[-1].weight.std().item() < 0.04
