"""What users differentiate: each op checks its arguments, chooses a backend and enters its autograd function."""
