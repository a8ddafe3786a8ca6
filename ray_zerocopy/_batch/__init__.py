"""The way of a batch through a predictor. Needs no Ray cluster."""
