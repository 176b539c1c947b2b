"""An exported model over HTTP, see `mljax.serve.__main__`."""
