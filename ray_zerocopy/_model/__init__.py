"""A model <-> a skeleton, tensors and buffers. Knows torch and cloudpickle, no Ray cluster and no store."""
