"""Ray's object store: the only `ray.put` and `ray.get` of weights."""
