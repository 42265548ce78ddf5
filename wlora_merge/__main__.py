"""`python -m wlora_merge` is `wlora-merge`: the way in, which imports the rest under its own hand for a Ctrl-C."""


def main() -> None:
    """Run the program; exit 130 on a Ctrl-C, even while it is being imported."""
    try:
        from .cli.main import main as run

        run()
    except KeyboardInterrupt:
        import os

        os.write(2, b"Stopped.\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
