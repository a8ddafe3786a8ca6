"""A TorchScript module <-> archives without weights, and tensors. Imports torch, but not Ray."""
