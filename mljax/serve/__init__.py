"""An exported model over HTTP, see `mljax.serve.__main__`."""

import os

# Here, as it must come before NumPy. Resizing a picture takes many small products, and
# OpenBLAS would share each out to threads, which then wait for each other: measured on
# two busy cores, 16 ms of CPU time a picture in place of 0.8. Pictures are decoded in
# threads of their own anyway.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
