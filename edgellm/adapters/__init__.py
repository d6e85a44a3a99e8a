"""What changes a model without being one: low-rank adapters and control vectors, from their files into a program."""
