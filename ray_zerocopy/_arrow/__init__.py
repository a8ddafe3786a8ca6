"""What the public module `arrow` is made of. Knows pyarrow and torch, no Ray."""
