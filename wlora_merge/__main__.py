"""`python -m wlora_merge` is `wlora-merge`."""

from .cli import main

if __name__ == "__main__":
    main()
