"""`python -m megatron_scope`, the same as the `megatron-scope` command."""

from megatron_scope.cli import main

if __name__ == "__main__":  # child processes import this module again
    raise SystemExit(main())
