"""A trained run on one page: `python -m mljax.report --workdir DIR`."""
