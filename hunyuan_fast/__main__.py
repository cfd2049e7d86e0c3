"""``python -m hunyuan_fast`` is the command ``hunyuan-fast``."""

from hunyuan_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
