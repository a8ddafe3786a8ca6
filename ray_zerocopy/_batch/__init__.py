"""The way of a batch through a predictor. Knows no Ray cluster."""
