"""Models by name. This file is light: a screen names the default model without what pulls models."""

DEFAULT_MODEL = "smollm2"  # of the catalogue
