"""The way of a call: a shared model called in a Ray task."""
