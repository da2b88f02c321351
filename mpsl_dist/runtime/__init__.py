"""The only door to torch.distributed: environment, RPC, placement, failures."""
