"""Hugging Face folder to Megatron checkpoint: `megatron-scope convert to-megatron` as a script.

python tools/convert_hf_to_megatron.py --hf HF_DIR --out DIR [--tp N --pp N --ep N] [--dtype DTYPE]
"""

import sys

from megatron_scope.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
