"""Megatron checkpoint to Hugging Face folder: `megatron-scope convert to-hf` as a script.

python tools/convert_megatron_to_hf.py --megatron DIR --out HF_DIR [--like HF_DIR] [--dtype DTYPE]
"""

import sys

from megatron_scope.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
