"""Sample makers, error budgets and measurements, shared by tests and benches."""
