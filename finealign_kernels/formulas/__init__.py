"""The mathematics as pure torch functions, right in float64: the specification that every kernel is held to."""
