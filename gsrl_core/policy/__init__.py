"""The pi0.5 policy: network, flow sampler, critic, transforms, tokenizer and checkpoints."""
