"""Models: transformers' families, their compressible linears, the low-rank module, and the checkpoint."""
