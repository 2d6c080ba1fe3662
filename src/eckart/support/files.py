"""Files: names that several rooms have to agree on."""

# Squared gradients: in a calibration's folder, and beside the weights of a fine-tuned model, which they are none of.
GRADIENTS = "gradients.safetensors"
