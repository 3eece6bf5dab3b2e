"""What one training step means: idmm, supervised."""
