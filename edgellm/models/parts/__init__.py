"""What architecture files are made of, for running a model and for converting a checkpoint to it."""
