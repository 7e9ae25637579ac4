"""Import-only torchvision: SGLang's image processors are imported with it and never used on text."""

from import_only import make_import_only

__version__ = "0.28.0"

make_import_only(__name__)
