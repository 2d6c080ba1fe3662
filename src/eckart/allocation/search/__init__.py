"""Search: ranks by measuring the model."""
