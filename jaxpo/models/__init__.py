"""Language models: what they compute, and how they come from and go to Hugging Face checkpoints."""
