"""Serving: our checkpoints in programs that know nothing of them: vLLM, ONNX Runtime, those that import no eckart."""
