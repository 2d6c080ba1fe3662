"""Data: names of corpora and labelled sets into text and tokens; the built-in corpus and model."""
