"""What is compiled: pixels on the host (view specs and bytes in, pixels out) and the softmax of logits; no settings, no torch."""
