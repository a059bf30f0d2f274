"""What the probe sees of a training besides its steps: losses, inputs, gradients by layer, activations."""
