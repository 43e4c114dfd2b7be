"""Five small studies: does each method do what its paper says. `python -m bench.studies --help`."""
