"""A model <-> a skeleton, tensors and buffers. Needs torch and cloudpickle, but no Ray cluster or object store."""
