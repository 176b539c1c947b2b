"""What a model is exported to. A format is a file here and a line in `FORMATS`.

Such a file has `write(program, path)`, which makes a new file or directory, and
`read(path)`, which gives back a function of images, uint8 [batch, height, width, 3] ->
(probabilities, labels), and the description that was written (`Program.about`). It
imports what it needs only when one of the two is called. `owns(path)` tells whether
a path is of this format, `may_replace(path)` whether mljax wrote it, and all of it.
"""

from types import ModuleType

from mljax.formats import onnx_file, saved_model, stablehlo

FORMATS: dict[str, ModuleType] = {
    "stablehlo": stablehlo,
    "savedmodel": saved_model,
    "onnx": onnx_file,
}
