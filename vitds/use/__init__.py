"""A trained run in use: its view of any image, predictions, features, and weights for other libraries."""
