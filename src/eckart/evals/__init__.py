"""Evaluations: a model that gives logits in, an EvalResult out. Nothing here knows how the model was compressed."""
