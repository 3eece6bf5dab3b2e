"""What is compiled: the pixels of views and the softmax of logits. It knows no settings."""
