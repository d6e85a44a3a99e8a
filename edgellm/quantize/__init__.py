"""From a model in any form to a GGUF file: sources, and what makes a file of them."""
