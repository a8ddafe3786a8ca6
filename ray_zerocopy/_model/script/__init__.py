"""TorchScript: take apart, read, rebuild. Knows torch, no Ray."""
