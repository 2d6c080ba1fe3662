"""Engine: where work runs."""
