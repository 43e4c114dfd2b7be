"""The mathematics as plain torch functions. Every kernel is compared with them, in float64."""
